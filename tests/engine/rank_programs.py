"""What the processes of the distributed tests run: module-level functions, which other processes can import."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import nn

from ccnet_d2.engine.distributed import share_model
from ccnet_d2.layers.sync_batch_norm import sync_batch_norm_on_cpu
from ccnet_d2.losses import CategoryConsistentLoss, OHEMCrossEntropy
from ccnet_d2.modeling import CCNet, CCNetHead, PlainConvNet, RANetHead

CLASSES = 4
IMAGES = 8
CASES = (
    "uneven labels",
    "all ignored",
    "one rank all ignored",
    "single-pixel class",
    "one class",
    "OHEM",
    "recompute",
    "RANet",
    "RANet as released",
)


def make_model(dtype: torch.dtype = torch.float64, case: str = "") -> nn.Module:
    """Two convolutions, attention at work (gamma is not 0), auxiliary losses, synchronised batch norm."""
    torch.manual_seed(2)  # no activation so near the kink of a ReLU that fp32 puts it on the other side
    shapes = {"conv": ShapeSpec(channels=16, stride=2)}
    model = CCNet(
        backbone=PlainConvNet(channels=[16, 16], strides=[1, 2], norm="SyncBN"),
        sem_seg_head=_make_ranet_head(shapes, case) if "RANet" in case else _make_head(shapes, case),
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    # Their dropout draws other channels in each process, and no comparison could be exact.
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return sync_batch_norm_on_cpu(model).to(dtype).train()


def _make_head(shapes: dict[str, ShapeSpec], case: str) -> CCNetHead:
    return CCNetHead(
        shapes,
        in_feature="conv",
        num_classes=CLASSES,
        channels=16,
        context="rcca_recompute" if case == "recompute" else "rcca",
        norm="SyncBN",
        dropout=0.0,
        aux_feature="conv",
        aux_channels=16,
        # min_kept small enough that no process has to raise the threshold
        loss=OHEMCrossEntropy(thresh=0.3, min_kept=1, factor=1) if case == "OHEM" else "cross_entropy",
    )


def _make_ranet_head(shapes: dict[str, ShapeSpec], case: str) -> RANetHead:
    return RANetHead(
        shapes,
        in_feature="conv",
        coarse_feature="conv",
        num_classes=CLASSES,
        channels=16,
        variant="code" if case == "RANet as released" else "paper",
        balanced_boundaries=case == "RANet",
        norm="SyncBN",
        dropout=0.0,
    )


def make_batch(case: str) -> list[dict]:
    """Eight images of 24x20; how many of their pixels have labels differs much from image to image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, 24, 20), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (IMAGES, 24, 20), generator=generator)
    for index in range(IMAGES):
        labels[index, : 3 * index] = 255
    if case == "all ignored":
        labels[:] = 255
    elif case == "one rank all ignored":
        labels[: IMAGES // 4] = 255
    elif case == "single-pixel class":
        labels[labels == 3] = 255
        labels[0, 7, 7] = 3
    elif case == "one class":
        labels[:] = 2
    return [{"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)]


def losses_and_gradients(model: nn.Module, batch: list[dict]) -> dict:
    """One backward pass: the summed loss, the gradients and the buffers by name."""
    loss = sum(model(batch).values())
    loss.backward()
    own = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {
        "loss": loss.detach(),
        "gradients": {name: p.grad.clone() for name, p in own.named_parameters()},
        "buffers": {name: b.clone() for name, b in own.named_buffers()},
    }


def relative_errors(ours: dict, single: dict) -> tuple[float, float]:
    """Gradients against those of one process: of all in the L2 norm, and of the worst parameter."""
    pairs = [(ours["gradients"][name], wanted) for name, wanted in single["gradients"].items()]
    scale = sum(wanted.square().sum() for _, wanted in pairs).sqrt()
    if scale == 0:
        worst = max(float(found.abs().max()) for found, _ in pairs)
        return worst, worst
    error = sum((found - wanted).square().sum() for found, wanted in pairs).sqrt() / scale
    # Parameters whose gradient is rounding noise (a bias before batch norm) have no relative error to speak of.
    each = [
        (found - wanted).norm() / wanted.norm() for found, wanted in pairs if wanted.norm() > 1e-5 * scale
    ]
    return float(error), float(max(each))


def gradients(folder: str, dtype_name: str) -> None:
    """For each case, this process's share of the batch; the main process writes what the processes average."""
    dtype = getattr(torch, dtype_name)
    rank, world = comm.get_rank(), comm.get_world_size()
    for case in CASES:
        batch = make_batch(case)
        share = batch[rank * IMAGES // world : (rank + 1) * IMAGES // world]
        result = losses_and_gradients(share_model(make_model(dtype, case), broadcast_buffers=False), share)
        loss = result["loss"].clone()
        dist.all_reduce(loss)
        result["loss"] = loss / world
        if rank == 0:
            torch.save(result, Path(folder) / f"{case}.pt")


def batch_norm(folder: str) -> None:
    """Synchronised batch norm with another number of samples in each process, against torch's on all of them."""
    rank = comm.get_rank()
    for case, (shape, options, dtype) in enumerate(
        [
            ((5, 4, 6, 3), {}, torch.float64),
            ((5, 4, 6, 3), {"affine": False}, torch.float64),
            ((5, 4, 2, 3, 3), {"momentum": None}, torch.float64),
            ((5, 4), {"track_running_stats": False}, torch.float64),
            ((5, 4, 6, 3), {}, torch.bfloat16),
        ]
    ):
        torch.manual_seed(case)
        samples, weights = torch.randn(shape).to(dtype) * 3 + 1, torch.randn(shape).to(dtype)
        synchronised = sync_batch_norm_on_cpu(nn.SyncBatchNorm(shape[1], **options))
        everything = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](
            shape[1], **options
        )
        if dtype == torch.float64:
            synchronised.double(), everything.double()
        if synchronised.weight is not None:
            nn.init.normal_(synchronised.weight)
            everything.load_state_dict(synchronised.state_dict())
        mine = slice(0, 4) if rank == 0 else slice(4, 5)
        part, whole = (x.clone().requires_grad_() for x in (samples[mine], samples.to(torch.float64)))
        found = synchronised(part)
        wanted = everything.double()(whole)
        (found * weights[mine]).sum().backward()
        (wanted * weights).sum().backward()
        exact = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=0.03, atol=0.03)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted[mine], check_dtype=False, **exact)
        torch.testing.assert_close(part.grad, whole.grad[mine], check_dtype=False, **exact)
        for name, parameter in synchronised.named_parameters():
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(
                parameter.grad, everything.get_parameter(name).grad, check_dtype=False, **exact
            )
        for name, buffer in synchronised.named_buffers():
            # Statistics are not rounded to the dtype of the samples.
            near = exact if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(buffer, everything.get_buffer(name), check_dtype=False, **near)
        torch.testing.assert_close(
            synchronised.eval()(samples.to(found.dtype)).double(), everything.eval()(whole), **exact
        )
    if rank == 0:
        (Path(folder) / "right").touch()


def category_consistent(folder: str) -> None:
    """The category consistent loss works on each process's own images: finite for any labels."""
    finite = True
    for case in CASES:
        batch = make_batch(case)[comm.get_rank() :: comm.get_world_size()]
        features = torch.randn(len(batch), 16, 6, 5, requires_grad=True)
        loss = CategoryConsistentLoss()(features, torch.stack([item["sem_seg"] for item in batch]))
        loss.backward()
        finite = finite and bool(loss.isfinite()) and bool(features.grad.isfinite().all())
    if all(comm.all_gather(finite)) and comm.is_main_process():
        (Path(folder) / "finite").touch()


def say_who() -> None:
    """Prints one line of JSON on each process."""
    total = torch.ones(1)
    dist.all_reduce(total)
    line = {
        "rank": comm.get_rank(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "sum": int(total),
        "gathered": comm.all_gather(comm.get_rank()),
        "threads": torch.get_num_threads(),
    }
    # In one piece: print() writes the end of the line apart, and another process's line may come between.
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def wrong_input_on_one() -> None:
    """A user's error on process 1, while the others wait for it."""
    if comm.get_rank() == 1:
        raise ValueError("The image 'a.png' is cut off.")
    dist.barrier()


def wrong_input_on_all() -> None:
    raise ValueError("train.max_itr is not a key.")


def fault_on_one() -> None:
    """A fault of the program on process 1."""
    if comm.get_rank() == 1:
        raise ZeroDivisionError("division by zero")
    dist.barrier()


def killed(folder: str, ignore_sigterm: bool = False) -> None:
    """Process 1 is killed; the others wait for it, in a collective, or deaf to SIGTERM in a long sleep."""
    if ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.barrier()
    if comm.get_rank() == 1:
        (Path(folder) / "killed_at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if ignore_sigterm:
        time.sleep(600)
    dist.barrier()


def stop_on_sigterm(folder: str) -> None:
    """Saves and exits when asked to."""

    def stop(*_: object) -> None:
        (Path(folder) / f"saved_{comm.get_rank()}").touch()
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    dist.barrier()
    (Path(folder) / f"ready_{comm.get_rank()}").touch()
    time.sleep(600)
