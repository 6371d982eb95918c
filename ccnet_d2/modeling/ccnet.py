"""The CCNet meta-architecture: a semantic segmentor in Detectron2's input and output format."""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.errors import UserError
from ccnet_d2.ops.autocast import autocasts

from .config import own_keys


@META_ARCH_REGISTRY.register()
class CCNet(nn.Module):
    """Backbone and segmentation head; images are normalised and padded here.

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        size_divisibility: int = 0,
        ignore_value: int = 255,
    ) -> None:
        """
        Args:
            backbone: a Detectron2 backbone.
            sem_seg_head: called as `head(features, targets, image_size)`, see `CCNetHead.forward`.
            pixel_mean: per channel, in the range of the input (0-255), in the order of `input_format`.
            pixel_std: likewise.
            input_format: channel order of the images the model expects, "RGB" or "BGR".
            size_divisibility: pad images up to a multiple of this; 0 pads no further than the batch needs.
            ignore_value: label of padded pixels.

        Raises:
            ValueError: `pixel_mean` or `pixel_std` is not of three channels, or one for all; `input_format` is unknown.
        """
        super().__init__()
        check_choice("input_format", input_format, ("RGB", "BGR"))
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) not in (1, 3):
                raise ValueError(f"{name} has {len(values)} values, but images have 3 channels.")
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.input_format = input_format
        self.size_divisibility = size_divisibility
        self.ignore_value = ignore_value
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        ccnet = own_keys(cfg, "CCNET", "MODEL.META_ARCHITECTURE CCNet")
        mean = cfg.MODEL.PIXEL_MEAN
        if len(mean) != 3:  # Detectron2's backbones take as many channels
            raise UserError(
                f"MODEL.PIXEL_MEAN is {list(mean)}, but needs a value for each of the 3 channels."
            )
        backbone = build_backbone(cfg)
        head = build_sem_seg_head(cfg, backbone.output_shape())
        if len(inspect.signature(head.forward).parameters) < 3:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.NAME {cfg.MODEL.SEM_SEG_HEAD.NAME} is a head of Detectron2's SemanticSegmentor, "
                "which is not told the size to answer in: choose CCNetHead for MODEL.META_ARCHITECTURE CCNet."
            )
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "pixel_mean": mean,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "size_divisibility": ccnet.SIZE_DIVISIBILITY,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: one dict an image:
                "image": (3, h, w) tensor, uint8 or float, 0-255, channels as `input_format`;
                "sem_seg": (h, w) integer labels, in training;
                "height", "width": size of the prediction wanted, in inference; the image's own unless given.

        Returns:
            In training a dict of scalar losses; in inference for each image {"sem_seg": (K, height, width) logits}.

        Raises:
            ValueError: in training, a label map is missing or does not have its image's size.
        """
        images, sizes = self._batch_images(batched_inputs)
        padded_size = (images.shape[-2], images.shape[-1])
        if self.training:
            # Before the backbone, whose batch norms learn from what they see: wrong labels leave the model as it was.
            targets = self._batch_targets(batched_inputs, padded_size)
            _, losses = self.sem_seg_head(self.backbone(images), targets)
            return losses
        logits, _ = self.sem_seg_head(self.backbone(images), None, padded_size)
        return [
            {"sem_seg": self._to_output_size(result, size, inputs)}
            for result, size, inputs in zip(logits, sizes, batched_inputs, strict=True)
        ]

    def _batch_images(self, batched_inputs: list[dict]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images (B, 3, H, W), padded right and below with the mean, and their own sizes."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        padded = self._padded_size(sizes)
        # Crops of one size go together, in few calls of the device. (Compared one by one: a set would bind a compiled
        # model to these sizes.)
        alike = all(size == sizes[0] for size in sizes[1:])
        groups = [torch.stack(images)] if alike else [image[None] for image in images]
        batch = torch.cat([_pad((group - self.pixel_mean) / self.pixel_std, padded, 0.0) for group in groups])
        # CPUs, and the matrix units of GPUs, run convolutions faster on channels-last memory, and so does attention.
        if batch.device.type == "cpu" or autocasts(batch):
            batch = batch.contiguous(memory_format=torch.channels_last)
        return batch, sizes

    def _batch_targets(self, batched_inputs: list[dict], size: tuple[int, int]) -> Tensor:
        if not torch.compiler.is_compiling():
            _check_labels(batched_inputs)
        targets = [x["sem_seg"].to(self.device, non_blocking=True) for x in batched_inputs]
        return torch.stack([_pad(target, size, self.ignore_value) for target in targets])

    def _padded_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        divisor = max(self.size_divisibility, self.backbone.size_divisibility, 1)
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor

    def _to_output_size(self, logits: Tensor, size: tuple[int, int], inputs: dict) -> Tensor:
        logits = logits[:, : size[0], : size[1]]
        output_size = (inputs.get("height") or size[0], inputs.get("width") or size[1])
        if output_size == size:
            return logits
        align_corners = getattr(self.sem_seg_head, "align_corners", False)
        return F.interpolate(logits[None], output_size, mode="bilinear", align_corners=align_corners)[0]


def _check_labels(batched_inputs: list[dict]) -> None:
    # Padding takes a label map of any size, and cuts off what is too much.
    for x in batched_inputs:
        name = f" of '{x['file_name']}'" if "file_name" in x else ""
        if "sem_seg" not in x:
            raise ValueError(
                f"an input{name} has no 'sem_seg', but the model is in training mode: call model.eval() to predict; to "
                "train, have the mapper give label maps."
            )
        (height, width), (rows, columns) = x["image"].shape[-2:], x["sem_seg"].shape[-2:]
        if (height, width) != (rows, columns):
            raise ValueError(
                f"'sem_seg'{name} is {columns}x{rows}, but its 'image' is {width}x{height}: the mapper has to give "
                "both the same transforms."
            )


def _pad(x: Tensor, size: tuple[int, int], value: float) -> Tensor:
    height, width = x.shape[-2:]
    if (height, width) == size:
        return x
    return F.pad(x, (0, size[1] - width, 0, size[0] - height), value=value)
