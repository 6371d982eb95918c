"""Criss-cross attention across the frames of a clip, against its definition voxel by voxel."""

import re

import pytest
import torch
from torch import Tensor

from ccnet_d2.layers import RCCA, ClipRCCA, build_context, clips_of


def with_gamma(layer: ClipRCCA, gamma: float = 0.7) -> ClipRCCA:
    torch.nn.init.constant_(layer.gamma, gamma)
    return layer


def keys_of(sizes: tuple[int, int, int], t: int, h: int, w: int) -> list[tuple[int, int, int]]:
    """The voxels on the three lines through a voxel, itself once."""
    frames, height, width = sizes
    lines = [(i, h, w) for i in range(frames) if i != t]
    lines += [(t, i, w) for i in range(height) if i != h]
    lines += [(t, h, i) for i in range(width) if i != w]
    return [*lines, (t, h, w)]


def one_loop(layer: ClipRCCA, x: Tensor) -> Tensor:
    """A loop of attention on one clip (C, T, H, W), each voxel written out."""
    weight, bias = layer.qkv.weight.flatten(1), layer.qkv.bias
    out = torch.empty_like(x)
    sizes = x.shape[1:]
    for t in range(sizes[0]):
        for h in range(sizes[1]):
            for w in range(sizes[2]):
                keys = keys_of(sizes, t, h, w)
                assert len(keys) == len(set(keys)) == sum(sizes) - 2
                projected = torch.stack([weight @ x[:, a, b, c] + bias for a, b, c in keys])
                n = layer.key_channels
                query, key, value = projected[-1, :n], projected[:, n : 2 * n], projected[:, 2 * n :]
                share = (key @ query).softmax(dim=0)
                out[:, t, h, w] = layer.gamma * (share @ value) + x[:, t, h, w]
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recurrence", [1, 3])
@pytest.mark.parametrize("frames", [1, 3])
def test_against_a_loop_over_voxels(frames, recurrence, memory_format):
    torch.manual_seed(0)
    layer = with_gamma(ClipRCCA(16, recurrence).double())
    x = torch.randn(2 * frames, 16, 3, 4).double().contiguous(memory_format=memory_format)
    with clips_of(layer, frames), torch.no_grad():
        out = layer(x)
        expected = []
        for clip in x.unflatten(0, (2, frames)):
            voxels = clip.transpose(0, 1)
            for _ in range(recurrence):
                voxels = one_loop(layer, voxels)
            expected.append(voxels.transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=1e-12)


def dependence(recurrence: int, sizes: tuple[int, int, int]) -> Tensor:
    """(T, H, W, T, H, W): whether the first voxel's output depends on the second voxel's input, by gradient."""
    torch.manual_seed(0)
    layer = with_gamma(ClipRCCA(8, recurrence).double(), 1.0)
    x = torch.randn(sizes[0], 8, *sizes[1:]).double()
    with clips_of(layer, sizes[0]):
        jacobian = torch.autograd.functional.jacobian(layer, x)  # (T, C, H, W, T, C, H, W)
    return jacobian.abs().sum(dim=(1, 5)) > 0


def test_after_three_loops_every_voxel_depends_on_every_voxel():
    sizes = (3, 4, 3)
    one, two, three = (dependence(r, sizes) for r in (1, 2, 3))
    for t in range(sizes[0]):
        for h in range(sizes[1]):
            for w in range(sizes[2]):
                own = torch.zeros(sizes, dtype=torch.bool)
                for key in keys_of(sizes, t, h, w):
                    own[key] = True
                assert torch.equal(one[t, h, w], own)
                # Two loops reach what differs in two coordinates, not what differs in all three.
                other_frame = [i for i in range(sizes[0]) if i != t]
                missing = ~two[t, h, w]
                assert missing.sum() == (sizes[0] - 1) * (sizes[1] - 1) * (sizes[2] - 1)
                assert not missing[t].any() and missing[other_frame].any()
    assert three.all()


def test_with_one_frame_it_is_the_2d_layer_with_the_same_parameters():
    torch.manual_seed(0)
    flat = RCCA(16, 3)
    torch.nn.init.constant_(flat.gamma, 0.7)
    deep = build_context("rcca3d", 16, 16)
    deep.load_state_dict(flat.state_dict())
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(deep(x), flat(x), rtol=0, atol=0)


def test_the_number_of_frames_holds_within_the_block_only():
    model = torch.nn.Sequential(ClipRCCA(8), torch.nn.Conv2d(8, 8, 1), with_gamma(ClipRCCA(8)))
    x = torch.randn(4, 8, 3, 3)
    alone = model(x)
    with pytest.raises(ValueError, match="stop"), clips_of(model, 2):
        assert not torch.allclose(model(x), alone)
        with clips_of(model, 4):
            assert model[0].frames == model[2].frames == 4
        assert model[0].frames == model[2].frames == 2
        raise ValueError("stop")
    torch.testing.assert_close(model(x), alone, rtol=0, atol=0)


def test_its_arguments_are_those_of_the_2d_layer():
    layer = ClipRCCA(16, 4, reduction=4, backend="reference", recompute=5)
    assert (layer.recurrence, layer.key_channels, layer.backend, layer.recompute) == (4, 4, "reference", 5)


def test_inputs_that_are_no_frames_are_named():
    layer = ClipRCCA(8)
    for shape in (
        (1, 8, 2, 3, 3),
        (2, 9, 3, 3),
    ):  # clips with their frames beside the channels; other channels
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            layer(torch.zeros(shape))


def test_wrong_numbers_of_frames_are_named():
    layer = ClipRCCA(8)
    with pytest.raises(ValueError, match="4 frames do not make clips of 3"), clips_of(layer, 3):
        layer(torch.zeros(4, 8, 2, 2))
    with pytest.raises(ValueError, match="at least 1 frame, got frames=0"), clips_of(layer, 0):
        pass
