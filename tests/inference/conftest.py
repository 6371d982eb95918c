"""A small convolutional network of Detectron2's convention, to test what is built around models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class TinySegmenter(nn.Module):
    """3x3 convolutions, stride 2; records the inputs it was called with."""

    input_format = "RGB"

    def __init__(
        self, num_classes: int = 5, *, kernel: int = 3, stride: int = 2, align_corners: bool = False
    ):
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor([123.0, 116.0, 103.0]).view(-1, 1, 1))
        self.convs = nn.Sequential(
            nn.Conv2d(3, 6, kernel, stride=stride, padding=kernel // 2),
            nn.Tanh(),
            nn.Conv2d(6, num_classes, kernel, padding=kernel // 2),
        )
        self.align_corners = align_corners
        self.calls: list[list[tuple[int, ...]]] = []
        self.last_images: list[torch.Tensor] = []

    def forward(self, batched_inputs):
        self.last_images = [item["image"] for item in batched_inputs]
        self.calls.append([tuple(image.shape) for image in self.last_images])
        batch = torch.stack([(image - self.pixel_mean) / 60 for image in self.last_images])
        logits = self.convs(batch)
        sizes = [(item["height"], item["width"]) for item in batched_inputs]
        return [
            {"sem_seg": F.interpolate(one[None], size, mode="bilinear", align_corners=self.align_corners)[0]}
            for one, size in zip(logits, sizes, strict=True)
        ]


@pytest.fixture
def make_segmenter():
    def make(*args, **kwargs) -> TinySegmenter:
        torch.manual_seed(0)
        return TinySegmenter(*args, **kwargs).eval()

    return make


@pytest.fixture
def random_image():
    def make(height: int, width: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)

    return make
