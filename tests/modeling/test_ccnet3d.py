"""CCNet3D: the 2D network on single frames, the clip's context between them."""

import pytest
import torch
from detectron2.config import instantiate

from ccnet_d2.checkpoint import load_checkpoint
from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling import CCNet, CCNet3D

SMALL = ["model.sem_seg_head.channels=16", "model.sem_seg_head.aux_channels=8"]


def build(name, *overrides):
    model = instantiate(apply_overrides(get_config(name), [*SMALL, *overrides]).model)
    torch.nn.init.constant_(model.sem_seg_head.context.gamma, 0.7)
    return model


@pytest.fixture(scope="module")
def pair():
    """A 2D and a 3D network with the same weights."""
    torch.manual_seed(0)
    flat = build("camvid/ccnet_R_18_D8_half.py", "model.sem_seg_head.context=rcca_r3").eval()
    deep = build("camvid/ccnet3d_T5_R_18_D8_half.py").eval()
    assert type(flat) is CCNet and type(deep) is CCNet3D
    deep.load_state_dict(flat.state_dict())
    return flat, deep


@pytest.fixture
def clip():
    return torch.randint(
        0, 256, (4, 3, 33, 46), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def logits(model, *images, **entries):
    with torch.no_grad():
        return [answer["sem_seg"] for answer in model([{"image": image, **entries} for image in images])]


def test_with_one_frame_it_is_the_2d_network(pair, clip):
    flat, deep = pair
    expected = logits(flat, *clip)
    for frame, as_image, as_clip, wanted in zip(
        clip, logits(deep, *clip), logits(deep, *(frame[None] for frame in clip)), expected, strict=True
    ):
        assert as_image.shape == (11, *frame.shape[1:]) and as_clip.shape == (1, *as_image.shape)
        assert (as_image - wanted).abs().max() <= 1e-5
        assert (as_clip[0] - wanted).abs().max() <= 1e-5
    (larger,) = logits(deep, clip[:1], height=66, width=92)
    (wanted,) = logits(flat, clip[0], height=66, width=92)
    assert larger.shape == (1, 11, 66, 92) and (larger[0] - wanted).abs().max() <= 1e-5


def test_frames_of_a_clip_see_each_other_and_no_other_clip(pair, clip):
    _, deep = pair
    (together,) = logits(deep, clip)
    assert together.shape == (4, 11, 33, 46)
    assert not torch.allclose(together, torch.stack(logits(deep, *clip)), rtol=0, atol=1e-4)
    changed = clip.clone()
    changed[0] = 255 - changed[0]
    other, again = logits(deep, changed, clip)
    torch.testing.assert_close(again, together, rtol=0, atol=1e-5)
    for before, after in zip(together[1:], other[1:], strict=True):
        assert (before - after).abs().max() > 1e-4


def test_clips_of_different_lengths_and_images_in_one_batch(pair, clip):
    _, deep = pair
    mixed = logits(deep, clip, clip[0], clip[:2], clip[2:])
    alone = [logits(deep, one)[0] for one in (clip, clip[0], clip[:2], clip[2:])]
    for one, expected in zip(mixed, alone, strict=True):
        assert one.shape == expected.shape
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


def test_loss_is_over_the_labelled_pixels_of_all_frames(clip):
    torch.manual_seed(0)
    model = build("camvid/ccnet3d_T5_R_18_D8_half.py", "model.sem_seg_head.dropout=0.0").train()
    labels = torch.randint(0, 11, (4, 33, 46))
    labels[1] = 255

    def losses(target):
        torch.manual_seed(1)
        return model([{"image": clip, "sem_seg": target}, {"image": clip.flip(0), "sem_seg": target.flip(0)}])

    found = losses(labels)
    assert set(found) == {"loss_sem_seg", "loss_sem_seg_aux"}
    parts = []
    for t in (0, 2, 3):
        only = torch.full_like(labels, 255)
        only[t] = labels[t]
        parts.append(losses(only))
    for key, loss in found.items():
        mean = sum(part[key] for part in parts) / 3
        torch.testing.assert_close(loss, mean, rtol=1e-4, atol=1e-5)
    sum(found.values()).backward()
    assert model.sem_seg_head.context.qkv.weight.grad.abs().sum() > 0

    with pytest.raises(UserError, match="clips of 2 and of 4 frames in one batch"):
        model([{"image": clip, "sem_seg": labels}, {"image": clip[:2], "sem_seg": labels[:2]}])


def test_a_checkpoint_of_the_2d_network_loads(tmp_path, pair, clip):
    flat, _ = pair
    path = tmp_path / "flat.pth"
    torch.save({"model": flat.state_dict()}, path)
    torch.manual_seed(5)
    fresh = build("camvid/ccnet3d_T5_R_18_D8_half.py").eval()
    load_checkpoint(fresh, path)
    torch.testing.assert_close(logits(fresh, clip[0])[0], logits(flat, clip[0])[0], rtol=0, atol=1e-5)


def test_empty_and_flat_inputs_are_refused(pair):
    _, deep = pair
    for image in (torch.zeros(0, 3, 8, 8), torch.zeros(8, 8)):
        with pytest.raises(ValueError, match="must be a clip"):
            deep([{"image": image}])
