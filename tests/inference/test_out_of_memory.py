"""Memory running out in inference: smaller tiles, the same answers where nothing else changes, and a log."""

import logging
import subprocess
import sys
from functools import partial

import pytest
import torch

from ccnet_d2.inference import MultiScaleFlip, SlidingWindow, WholeImage
from ccnet_d2.inference.build import configured_mode
from ccnet_d2.inference.out_of_memory import is_out_of_memory
from ccnet_d2.model_zoo import get_config

TOO_MUCH = 1 << 62  # bytes that no machine has: the allocator really fails


class Hungry(torch.nn.Module):
    """Runs a segmenter, after asking for memory that is not there when a call has more pixels than the limit."""

    def __init__(self, segmenter: torch.nn.Module, limit: int):
        super().__init__()
        self.segmenter = segmenter
        self.limit = limit
        self.failures = 0

    def forward(self, batched_inputs):
        if sum(item["image"][0].numel() for item in batched_inputs) > self.limit:
            self.failures += 1
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return self.segmenter(batched_inputs)


@pytest.fixture
def hungry(make_segmenter):
    return lambda limit: Hungry(make_segmenter(), limit).eval()


def test_the_allocator_says_so():
    with pytest.raises(RuntimeError) as error:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("method", ["forward", "predict_labels"])
def test_whole_image_falls_to_tiles(hungry, random_image, caplog, method):
    model = hungry(limit=40 * 30)
    image = random_image(80, 60)
    item = {"image": image, "height": 80, "width": 60}
    with caplog.at_level(logging.WARNING, "ccnet_d2"):
        found = getattr(WholeImage(model, smallest_tile=16), method)([item])
    tiles = SlidingWindow(model.segmenter, tile=(40, 30), stride=(27, 20))
    wanted = getattr(tiles, method)([item])
    if method == "forward":
        found, wanted = [found[0]["sem_seg"]], [wanted[0]["sem_seg"]]
    assert torch.equal(found[0], wanted[0])
    assert model.failures == 1
    (record,) = caplog.records
    assert "60x80" in record.getMessage() and "tile=(40, 30)" in record.getMessage()


def test_tiles_are_halved_until_they_fit_and_it_is_remembered(hungry, random_image, caplog):
    model = hungry(limit=400)
    mode = SlidingWindow(model, tile=64, stride=64, smallest_tile=8)
    image = random_image(64, 64)
    mode.logits(image, (64, 64))
    assert model.failures == 2  # 64 and 32
    assert set(shape for call in model.segmenter.calls for shape in call) == {(3, 16, 16)}
    mode.logits(image, (64, 64))
    mode.logits(random_image(32, 32), (32, 32))
    assert model.failures == 2
    small = random_image(16, 20)
    assert torch.equal(
        mode.logits(small, (16, 20)), model([{"image": small, "height": 16, "width": 20}])[0]["sem_seg"]
    )
    assert len(caplog.records) == 2


@pytest.mark.parametrize("mode", [WholeImage, partial(SlidingWindow, tile=64)])
def test_what_did_not_fit_is_told_by_its_pixels_not_its_height(hungry, random_image, mode):
    model = hungry(limit=20 * 40)
    mode = mode(model, smallest_tile=8)
    mode.logits(random_image(60, 20), (60, 20))
    mode.logits(random_image(20, 60), (20, 60))
    assert model.failures == 1
    model.segmenter.calls.clear()
    mode.logits(random_image(20, 40), (20, 40))
    assert model.segmenter.calls == [[(3, 20, 40)]]


def test_fewer_tiles_at_once_come_first_and_change_nothing(hungry, random_image):
    model = hungry(limit=24 * 24)
    image = random_image(50, 60)
    mode = SlidingWindow(model, tile=24, tiles_per_batch=4)
    alone = SlidingWindow(model.segmenter, tile=24).logits(image, (50, 60))
    torch.testing.assert_close(mode.logits(image, (50, 60)), alone)
    assert (mode.tile, mode.tiles_per_batch, model.failures) == ((24, 24), 1, 1)


def test_images_together_then_one_at_a_time(hungry, random_image):
    model = hungry(limit=20 * 20)
    items = [{"image": random_image(20, 20, seed), "height": 20, "width": 20} for seed in range(3)]
    found = WholeImage(model)(items)
    for one, item in zip(found, items, strict=True):
        torch.testing.assert_close(one["sem_seg"], model.segmenter([item])[0]["sem_seg"])
    assert model.failures == 1


def test_scales_that_do_not_fit_are_cut(hungry, random_image):
    model = hungry(limit=40 * 40)
    mode = MultiScaleFlip(WholeImage(model, smallest_tile=8), scales=(0.5, 1.0, 2.0), flip=False)
    assert mode.logits(random_image(40, 40), (40, 40)).isfinite().all()
    assert model.failures == 1


@pytest.mark.parametrize(
    ("size", "tile", "stride", "cut"),
    [
        ((64, 64), (64, 64), (64, 64), ((32, 32), (32, 32))),  # no overlap, and none afterwards
        ((64, 64), (64, 64), (16, 48), ((32, 32), (8, 24))),
        ((20, 90), (64, 64), (60, 40), ((10, 32), (10, 20))),  # the part of the tile in the image
        ((90, 20), (64, 64), (40, 60), ((32, 10), (20, 10))),
        ((12, 99), (64, 99), (64, 33), ((12, 50), (12, 16))),  # 6 is below the smallest side
    ],
)
def test_the_overlap_of_halved_tiles(hungry, random_image, size, tile, stride, cut):
    model = hungry(limit=cut[0][0] * cut[0][1])
    image = random_image(*size)
    found = SlidingWindow(model, tile=tile, stride=stride, smallest_tile=8).logits(image, size)
    wanted = SlidingWindow(model.segmenter, tile=cut[0], stride=cut[1]).logits(image, size)
    assert model.failures == 1
    assert torch.equal(found, wanted)


def test_halved_tiles_pad_and_resize_as_whole_ones(make_segmenter, random_image):
    """Of 32 to 16 pixels: the image is lower than both. Its corners are aligned, which the model does not ask for."""
    model = Hungry(make_segmenter(), 16 * 16).eval()
    image, options = random_image(10, 64), {"pad": [7.0, 8.0, 9.0], "align_corners": True}
    found = SlidingWindow(model, tile=32, stride=32, smallest_tile=8, **options).logits(image, (23, 40))
    wanted = SlidingWindow(model.segmenter, tile=16, stride=16, **options).logits(image, (23, 40))
    assert model.failures == 1 and torch.equal(found, wanted)
    assert model.segmenter.last_images[0].shape == (3, 16, 16)


def test_what_did_not_fit_is_told_by_all_the_tiles_of_a_call(hungry, random_image):
    model = hungry(limit=3 * 16 * 16)
    mode = SlidingWindow(model, tile=16, stride=16, tiles_per_batch=4, smallest_tile=16)
    assert mode.pixels(random_image(32, 32)) == 4 * 16 * 16
    assert mode.pixels(random_image(8, 32)) == 4 * 8 * 16
    mode.logits(random_image(32, 32), (32, 32))
    assert model.failures == 1 and mode.tiles_per_batch == 1 and mode.accumulate_on == torch.device("cpu")


@pytest.mark.parametrize(
    "run", ["cityscapes/ranet_R_101_D8_769x769_40k.py", "lip/ce2p_ccl_R_101_D16_384x384_48k.py"]
)
def test_runs_over_scales_cut_them_too(hungry, random_image, run):
    """Their configs name no mode for the single scale."""
    model = hungry(limit=270 * 270)
    mode = configured_mode(get_config(run)).bind(model)
    assert mode.logits(random_image(300, 300), (300, 300)).isfinite().all()
    assert model.failures > 0


def test_there_is_an_end(hungry, random_image):
    model = hungry(limit=0)
    with pytest.raises(RuntimeError, match="allocate"):
        WholeImage(model, smallest_tile=8).logits(random_image(32, 32), (32, 32))
    assert model.failures == 3  # 32, 16, 8
    with pytest.raises(RuntimeError, match="allocate"):
        WholeImage(model, smallest_tile=None).logits(random_image(32, 32), (32, 32))
    assert model.failures == 4


@pytest.mark.parametrize("images", [1, 2])
def test_other_errors_pass(random_image, images):
    """At once: nothing is tried again in tiles, or one image after the other."""
    calls = []

    def broken(inputs):
        calls.append(len(inputs))
        raise RuntimeError("shapes cannot be multiplied")

    items = [{"image": random_image(32, 32), "height": 32, "width": 32}] * images
    with pytest.raises(RuntimeError, match="multiplied"):
        WholeImage(broken, smallest_tile=8)(items)
    assert calls == [images]


def test_another_model_starts_afresh(hungry, random_image):
    mode = WholeImage(smallest_tile=8)
    image = random_image(32, 32)
    small = hungry(limit=300)
    mode.bind(small).logits(image, (32, 32))
    assert small.failures == 1
    large = hungry(limit=32 * 32)
    mode.bind(large).logits(image, (32, 32))
    assert large.failures == 0 and large.segmenter.calls == [[(3, 32, 32)]]


_LIMITED = """
import logging, resource, sys
import torch
from torch import nn
from ccnet_d2.inference import WholeImage

logging.basicConfig(level=logging.WARNING)
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(256, 5, 1)

    def forward(self, inputs):
        image = torch.stack([item["image"] for item in inputs]).float() / 255
        return [{"sem_seg": logits} for logits in self.last(self.first(image).relu())]

torch.manual_seed(0)
net = Net().eval()
mode = WholeImage(net, smallest_tile=32)

def logits(side):
    return mode([{"image": torch.rand(3, side, side), "height": side, "width": side}])[0]["sem_seg"]

logits(64)  # loads the libraries before there is a limit
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# 1024x1024 needs 1 GiB for the features alone.
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
print(tuple(logits(1024).shape))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_process_with_little_memory():
    run = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(5, 1024, 1024)"
    assert "Out of memory with an image of 1024x1024" in run.stderr and "tile=(512, 512)" in run.stderr
