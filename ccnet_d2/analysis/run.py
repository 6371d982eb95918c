"""What a run's model costs: parameters, FLOPs, memory and time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ccnet_d2.data.transforms.resize import height_and_width
from ccnet_d2.engine import build_model
from ccnet_d2.errors import UserError
from ccnet_d2.instantiation import build_object
from ccnet_d2.modeling import CCNet3D

from .flops import CONVENTION, count_flops
from .memory import LiveMemory, kept_for_backward
from .text import columns, notes
from .timing import median_seconds
from .untrained import label_objects, label_pixels, random_images, settle

_REPEATS = 3


def image_size_of(cfg: DictConfig) -> tuple[int, int]:
    """Height and width of the crops that a run trains on.

    Raises:
        UserError: it trains on images of any size.
        ValueError: the crop is of no whole pixels.
    """
    for augmentation in OmegaConf.select(cfg, "dataloader.train.mapper.augmentations") or ():
        if not isinstance(augmentation, DictConfig) or augmentation.get("crop_size") is None:
            continue
        # Detectron2's RandomCrop also takes shares of the image, and ranges.
        if augmentation.get("crop_type", "absolute") == "absolute":
            return height_and_width(augmentation.crop_size, "crop_size")
    raise UserError("The run trains on images of any size: give --image-size HEIGHTxWIDTH.")


def analyze_run(
    cfg: DictConfig,
    image_size: tuple[int, int],
    *,
    batch_size: int = 1,
    time: bool = True,
    training_step: bool = False,
) -> dict[str, Any]:
    """Measure a run's model on random images, or, for a model of clips, on clips as long as the run trains on.

    FLOPs and the memory of inference are traced with fake CPU tensors, which costs neither memory nor time, except for
    models whose shapes depend on what they see (detection): those run for real. Time, and what a training step takes,
    are measured on `train.device`; on a GPU so is the memory, by torch's allocator.

    Args:
        cfg: the run.
        image_size: height and width in pixels.
        batch_size: number of images, or of clips.
        time: whether to run the model to see how long it takes.
        training_step: whether to run a training step (forward, loss, backward, in fp32) to see the memory it takes.

    Returns:
        What `--json` writes; sizes in 10^6 bytes, FLOPs in 10^9.

    Raises:
        UserError: the device is not there, or a training step is asked of a model that is neither a semantic segmentor
            nor a detector with ROI heads.
    """
    if training_step and not {"sem_seg_head", "roi_heads"} & set(cfg.model):
        raise UserError(
            "A training step needs labels, which are made for models with a sem_seg_head or roi_heads."
        )
    inference = _inference_of(cfg, image_size, batch_size)
    model = inference.model
    result: dict[str, Any] = {
        "image_size": list(image_size),
        "batch_size": batch_size,
        **({} if inference.frames is None else {"frames": inference.frames}),
        "modules": _costs_of_parts(model, inference.flops),
        "weights_mb": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6,
        "inference_peak_mb": inference.peak / 1e6,
    }
    images = random_images(image_size, batch_size, inference.frames)
    if time or training_step:
        if not inference.ran_for_real:
            model = settle(build_model(cfg))
        result["device"] = _describe(torch.device(cfg.train.device))
    if training_step:
        kept, peak = _training_cost(model, _labelled(cfg, images))
        result |= {"training_kept_mb": kept / 1e6, "training_peak_mb": peak / 1e6}
    if time:
        device = torch.device(cfg.train.device)
        model.eval()
        if device.type == "cuda":
            result["inference_peak_mb"] = _inference_cost(model, images)[1] / 1e6
        with torch.no_grad():
            result["inference_seconds"] = median_seconds(lambda: model(images), device, _REPEATS)
    return result | {
        "conventions": {key: text for key, text in _CONVENTIONS.items() if key in result or key == "gflops"}
    }


_CONVENTIONS = {
    "gflops": f"10^9 FLOPs of inference on the batch: {CONVENTION}",
    "inference_peak_mb": "10^6 bytes of activations that live at once at most in fp32, beside the weights; every "
    "allocation followed, without workspaces within kernels; where it was run on a GPU, as torch's allocator counts",
    "training_kept_mb": "10^6 bytes that the forward pass and the losses leave for the backward pass in fp32, beside "
    "the weights",
    "training_peak_mb": "10^6 bytes of activations and gradients that live at once at most in a training step in fp32, "
    "beside the weights and the optimizer's state",
}


@dataclass(frozen=True)
class _Inference:
    """What a run's model costs in inference.

    Attributes:
        model: in evaluation mode; of fake tensors unless it ran for real.
        ran_for_real: on `train.device`, as the model cannot be traced.
        frames: see `_clip_length`.
        flops: by module, see `count_flops`.
        peak: bytes of activations.
    """

    model: nn.Module
    ran_for_real: bool
    frames: int | None
    flops: dict[str, int]
    peak: int


def _inference_of(cfg: DictConfig, image_size: tuple[int, int], batch_size: int) -> _Inference:
    def measure(model: nn.Module, ran_for_real: bool) -> _Inference:
        frames = _clip_length(cfg, model)
        flops, peak = _inference_cost(model, random_images(image_size, batch_size, frames))
        return _Inference(model, ran_for_real, frames, flops, peak)

    try:
        with FakeTensorMode():
            return measure(settle(build_object(cfg, "model")).eval(), ran_for_real=False)
    except RuntimeError:  # of many kinds; a fault of the model itself comes up again in the real run
        return measure(settle(build_model(cfg)).eval(), ran_for_real=True)


def _costs_of_parts(model: nn.Module, flops: dict[str, int]) -> dict[str, dict[str, float]]:
    """Parameters and 10^9 FLOPs of the model, "total", and of its parts by their names."""
    root = type(model).__name__
    return {
        name or "total": {
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "gflops": flops.get(f"{root}.{name}" if name else "Global", 0) / 1e9,
        }
        for name, module in _outline(model)
    }


def _labelled(cfg: DictConfig, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images with random labels of all kinds that the run's heads take."""
    if "roi_heads" in cfg.model:
        images = label_objects(images, int(cfg.model.roi_heads.num_classes))
    if "sem_seg_head" in cfg.model:
        images = label_pixels(images, int(cfg.model.sem_seg_head.num_classes))
    return images


def _clip_length(cfg: DictConfig, model: nn.Module) -> int | None:
    """T of the clips that a run of a model of clips trains on; None for a model of images."""
    return (
        OmegaConf.select(cfg, "dataloader.train.dataset.length", default=1)
        if isinstance(model, CCNet3D)
        else None
    )


@torch.no_grad()
def _inference_cost(model: nn.Module, images: list[dict[str, Any]]) -> tuple[dict[str, int], int]:
    """FLOPs by module, and bytes of activations."""
    flops = count_flops(model, images)
    with _PeakMemory(model) as memory:
        model(images)
    return flops, memory.peak


def _training_cost(model: nn.Module, images: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes kept for the backward pass, and of activations and gradients."""
    model.train()
    with EventStorage(), _PeakMemory(model) as memory:  # the former is what detectors write to
        kept, losses = kept_for_backward(lambda: model(images), [*model.parameters(), *model.buffers()])
        sum(losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return kept, memory.peak


class _PeakMemory:
    """Bytes that new tensors take at most: followed one by one on the CPU, told by torch's allocator on a GPU."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._live = LiveMemory()
        self.peak = 0

    def __enter__(self) -> "_PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._live.__exit__(*exception)
            self.peak = self._live.peak


def _outline(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, its parts, and the parts of all but the backbone."""
    for name, part in model.named_children():
        yield name, part
        if name != "backbone":
            for inner, module in part.named_children():
                if any(True for _ in module.parameters()):
                    yield f"{name}.{inner}", module
    yield "", model


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def format_run(name: str, result: dict[str, Any]) -> str:
    """`analyze_run`'s result as text."""
    rows = [("", "parameters (M)", "GFLOPs")]
    for module, cost in result["modules"].items():
        rows.append((module, f"{cost['parameters'] / 1e6:.2f}", f"{cost['gflops']:.2f}"))
    clip = [result["frames"]] if "frames" in result else []
    shape = " x ".join(map(str, (result["batch_size"], *clip, 3, *result["image_size"])))
    lines = [f"{name}: {shape}", "", columns(rows), ""]
    memory = f"memory (MB): weights {result['weights_mb']:.0f}, inference {result['inference_peak_mb']:.0f}"
    if "training_peak_mb" in result:
        memory += (
            f", training step {result['training_peak_mb']:.0f} "
            f"(of it kept for the backward pass {result['training_kept_mb']:.0f})"
        )
    lines.append(memory)
    if "inference_seconds" in result:
        lines.append(f"time: {result['inference_seconds']:.3f} s ({result['device']})")
    return "\n".join([*lines, "", notes(result["conventions"])])
