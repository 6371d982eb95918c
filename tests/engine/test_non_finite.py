"""Losses and gradients that are not finite are traced to where they begin, and can be shown again."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes
from torch import nn

from ccnet_d2.checkpoint import CheckpointError
from ccnet_d2.engine.non_finite import NonFiniteError, NonFiniteGuard, load_step, replay
from ccnet_d2.engine.non_finite_search import all_finite, find, gradients_are_finite
from ccnet_d2.engine.plain_batch import from_plain, to_plain
from ccnet_d2.engine.trainer import Trainer
from ccnet_d2.errors import UserError


class Log(nn.Module):
    """NaN for negative input; at zero its value can be clamped and its gradient not."""

    def forward(self, x):
        return torch.log(x)


class Root(nn.Module):
    """Finite at zero, with an infinite gradient there."""

    def forward(self, x):
        return torch.sqrt(x)


class Net(nn.Module):
    """Losses of a batch of {"image", "file_name"}."""

    def __init__(self, odd: nn.Module | None = None, odd_loss=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.odd = odd or nn.Identity()
        self.last = nn.Linear(4, 1)
        self.odd_loss = odd_loss

    def forward(self, batch):
        x = self.drop(self.norm(self.first(torch.stack([record["image"] for record in batch]))))
        return {"loss": self.odd_loss(self.last(self.odd(x)).square().mean())}


def batch(number=0):
    generator = torch.Generator().manual_seed(number)
    return [
        {"image": torch.randn(3, generator=generator), "file_name": f"{number}_{i}.png"} for i in range(4)
    ]


def found(net, data=None):
    data = data or batch()
    return find(net, data, lambda: net(data))


def test_forward():
    finding = found(Net(Log()))
    assert (finding.where, finding.name) == ("output", "odd") and "odd (Log)" in finding.detail


def test_in_the_loss():
    finding = found(Net(odd_loss=lambda x: x / 0))
    assert (finding.where, finding.name) == ("output", "") and "the model (Net)" in finding.detail


def test_backward():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    net = Net(nn.Sequential(Zero(), Root()))
    finding = found(net)
    assert (finding.where, finding.name) == ("gradient", "odd.0")


def test_gradient_of_a_parameter():
    class Power(nn.Module):
        """x ** 1 at x = 0 has the gradient 0 * log(0) with respect to the exponent."""

        def __init__(self):
            super().__init__()
            self.exponent = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return x + (self.exponent * 0).sqrt()

    finding = found(Net(Power()))
    assert (finding.where, finding.name) == ("gradient", "odd.exponent")


def test_what_was_there_before():
    net = Net()
    with torch.no_grad():
        net.last.weight[0, 0] = math.inf
    assert (found(net).where, found(net).name) == ("parameter", "last.weight")
    net = Net()
    net.norm.running_mean[1] = math.nan
    assert (found(net).where, found(net).name) == ("buffer", "norm.running_mean")
    data = batch()
    data[2]["image"][0] = math.nan
    assert (found(Net(), data).where, found(Net(), data).name) == ("input", "0_2.png")
    assert found(Net()).where == "nowhere"


def test_gradients_that_are_there_already_are_not_those_of_the_step():
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert found(net).where == "nowhere"


def trainer(net, batches, output_dir=None, retries=0):
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    return Trainer(net, iter(batches), optimizer, guard=NonFiniteGuard(output_dir, retries))


def test_the_message_says_it_all_and_the_file_repeats_it(tmp_path):
    torch.manual_seed(3)
    net = Net(Log())
    with pytest.raises(NonFiniteError) as error:
        trainer(net, [batch(5)] * 2, str(tmp_path)).train(7, 9)
    message = str(error.value)
    for words in ("iteration 7", "loss=nan", "5_0.png", "5_3.png", "odd (Log)", "replay_non_finite"):
        assert words in message, message
    assert isinstance(error.value, FloatingPointError) and isinstance(error.value, UserError)
    (path,) = (tmp_path / "non_finite").iterdir()
    assert str(path) in message
    step = load_step(path)
    assert step.iteration == 7 and math.isnan(step.losses["loss"]) and step.images[0] == "5_0.png"
    assert not net.norm.running_mean.isnan().any(), "the step's statistics were not taken back"
    torch.manual_seed(99)
    assert replay(Net(Log()), step) == step.finding


def test_statistics_that_the_step_spoiled_are_not_taken_for_its_cause():
    large = batch()
    for record in large:
        record["image"] = record["image"].sign() * 3e38  # finite, until they are added up
    net = Net(nn.ReLU())
    nn.init.constant_(net.first.weight, 2.0)
    with pytest.raises(NonFiniteError, match=r"not finite is first \(Linear\)"):
        trainer(net, [large]).train(0, 1)


def test_a_stored_step_repeats_dropout(tmp_path):
    """The loss is infinite only with the weights, images and dropout mask of the step."""

    def net():
        return Net(odd_loss=lambda x: x / 0 if x == worst else x)

    torch.manual_seed(1)
    probe = Net()
    torch.manual_seed(1)
    worst = probe(batch(0))["loss"].detach()
    model = net()
    torch.manual_seed(1)
    with pytest.raises(NonFiniteError):
        trainer(model, [batch(0)], str(tmp_path)).train(0, 1)
    step = load_step(next((tmp_path / "non_finite").iterdir()))
    assert step.finding.where == "output"
    assert replay(net(), step) == step.finding
    other = net()
    other.drop.p = 0.4
    assert replay(other, step).where == "nowhere"


def test_dropping_a_batch_leaves_no_trace(tmp_path):
    bad = batch(1)
    bad[0]["image"][:] = math.inf
    torch.manual_seed(2)
    with_bad, without = Net(nn.ReLU()), Net(nn.ReLU())
    with_bad.drop.p = without.drop.p = 0.0
    dropping = trainer(with_bad, [batch(0), bad, batch(2), bad, batch(3)], str(tmp_path), retries=2)
    dropping.train(0, 3)
    trainer(without, [batch(0), batch(2), batch(3)]).train(0, 3)
    for (name, a), b in zip(with_bad.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert dropping.guard.dropped == 2 and dropping.state_dict()["batches_dropped"] == 2
    assert len(list((tmp_path / "non_finite").iterdir())) == 2


def test_dropping_is_bounded(caplog):
    bad = batch(1)
    bad[0]["image"][:] = math.nan
    with pytest.raises(NonFiniteError, match=r"1_0\.png"):
        trainer(Net(), [bad] * 9, retries=3).train(0, 5)
    assert caplog.text.count("Batch dropped") == 3
    with pytest.raises(UserError, match="negative"):
        NonFiniteGuard(None, -1)


def test_gradients_that_are_not_finite_never_reach_the_weights():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    net = Net(nn.Sequential(Zero(), Root()))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(NonFiniteError, match="going backward"):
        trainer(net, [batch()]).train(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_norms_that_would_overflow_are_finite():
    net = nn.Linear(2, 2)
    assert gradients_are_finite(net)
    net.weight.grad = torch.full((2, 2), 3e38)
    net.bias.grad = torch.zeros(2)
    assert gradients_are_finite(net)
    net.bias.grad[1] = -math.inf
    assert not gradients_are_finite(net)
    net.bias.grad[1] = math.nan
    assert not gradients_are_finite(net)


def test_gradients_whose_squares_overflow_are_stepped_with():
    net = nn.Linear(1, 1, bias=False)
    weight = net.weight.detach().clone()
    model = _Scaled(net)
    Trainer(model, iter([1e25]), torch.optim.SGD(net.parameters(), 1e-25)).train(0, 1)
    torch.testing.assert_close(net.weight, weight - 1)


class _Scaled(nn.Module):
    """A loss whose gradient is the batch."""

    def __init__(self, net: nn.Linear):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return {"loss": (self.net.weight * batch).sum()}


def test_losses_are_logged_as_they_are():
    class Two(_Scaled):
        def forward(self, batch):
            return {"first": super().forward(batch)["loss"], "second": self.net.weight.sum().double() / 3}

    net = nn.Linear(1, 1, bias=False)
    weight = net.weight.item()
    run = Trainer(Two(net), iter([2.0]), torch.optim.SGD(net.parameters(), 0.1))
    run.train(0, 1)
    logged = {name: value for name, (value, _) in run.storage.latest().items()}
    assert logged["first"] == 2 * weight and logged["second"] == weight / 3
    assert logged["total_loss"] == logged["first"] + logged["second"]


def test_buffers_of_several_dtypes_are_put_back():
    net = Net()
    guard = NonFiniteGuard()
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert {value.dtype for value in before.values()} == {torch.float32, torch.int64}
    for _ in range(2):
        guard.remember_buffers(net)
    net(batch())
    guard._put_buffers_back(net)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_batches_of_detectors_as_plain_data(tmp_path):
    instances = Instances((4, 6), gt_classes=torch.tensor([1, 2]), gt_boxes=Boxes(torch.rand(2, 4)))
    instances.gt_masks = BitMasks(torch.rand(2, 4, 6) > 0.5)
    instances.gt_keypoints = Keypoints(torch.rand(2, 17, 3))
    instances.turned = RotatedBoxes(torch.rand(2, 5))
    polygons = Instances((4, 6), gt_masks=PolygonMasks([[np.array([0.0, 0, 4, 0, 4, 4])]]))
    data = [
        {"image": torch.rand(3, 4, 6), "instances": instances, "size": (4, 6), "area": np.float64(0.5)},
        {"instances": polygons, "array": np.arange(3)[::-1], "none": None, "other": object()},
    ]
    torch.save(to_plain(data), tmp_path / "x")
    back = from_plain(torch.load(tmp_path / "x", weights_only=True))
    assert torch.equal(back[0]["image"], data[0]["image"]) and back[0]["size"] == [4, 6]
    assert torch.equal(back[0]["instances"].gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(back[0]["instances"].gt_masks.tensor, instances.gt_masks.tensor)
    assert torch.equal(back[0]["instances"].gt_keypoints.tensor, instances.gt_keypoints.tensor)
    assert torch.equal(back[0]["instances"].turned.tensor, instances.turned.tensor)
    kinds = [type(value) for value in back[0]["instances"].get_fields().values()]
    assert kinds == [torch.Tensor, Boxes, BitMasks, Keypoints, RotatedBoxes]
    assert back[0]["area"] == 0.5 and back[0]["instances"].image_size == (4, 6)
    np.testing.assert_array_equal(back[1]["instances"].gt_masks.polygons[0][0], [0, 0, 4, 0, 4, 4])
    np.testing.assert_array_equal(back[1]["array"], [2, 1, 0])
    assert back[1]["none"] is None and back[1]["other"] == "<builtins.object>"
    assert all_finite(data)
    instances.gt_boxes.tensor[0, 0] = math.nan
    assert not all_finite(data)


def test_a_part_of_a_larger_tensor_is_stored_alone():
    """torch.save would write the whole of what it is a view of."""
    whole = torch.zeros(1000, 4, requires_grad=True)
    described = to_plain({"part": whole[:2], "boxes": Boxes(whole[:2])})
    for tensor in (described["part"], described["boxes"]["value"]):
        assert tensor.untyped_storage().nbytes() == 2 * 4 * 4 and not tensor.requires_grad


def test_other_files_are_no_steps(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="is not a file of non_finite/"):
        load_step(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"^\S*missing.pth does not exist: name a file of non_finite/"):
        load_step(tmp_path / "missing.pth")
