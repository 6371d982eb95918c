"""The demo: the paper's central comparison (Tab. 2), trained and drawn."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig

from ccnet_d2.atomic_file import atomic_write_text
from ccnet_d2.compat import has_fast_bf16
from ccnet_d2.data import (
    SyntheticConfig,
    generate_synthetic_dataset,
    get_sem_seg_dataset_dicts,
    register_all,
)
from ccnet_d2.data.catalog import check_registered
from ccnet_d2.data.image_files import read_image, read_label
from ccnet_d2.inference import (
    AttentionMaps,
    ClassTable,
    Predictor,
    draw_attention,
    save_prediction_grid,
    write_image,
)

from .comparison import Variant, VariantRun, train_variants
from .overrides import apply_overrides, load_run, refuse_overridden
from .settings import make_output_dir

TWO_LOOPS = Variant("rcca_r2", "RCCA, R=2", ("model.sem_seg_head.context=rcca_r2",))
ONE_LOOP = Variant("rcca_r1", "RCCA, R=1", ("model.sem_seg_head.context=rcca_r1",))
NO_ATTENTION = Variant("fcn", "no attention (FCN)", ("model.sem_seg_head.context=none",))
VARIANTS = (TWO_LOOPS, ONE_LOOP, NO_ATTENTION)
"""The longest training comes first, so that the last one to start is the shortest."""

_SETTERS = {"train.seed": "--seed", "train.output_dir": "--output", "model.sem_seg_head.context": "the demo"}
"""What sets a key of each training, whatever its overrides say."""

_PICTURES = 4
_REPORT_FILES = ("report.json", "report.md", "predictions.png", "attention.png")


@dataclass(frozen=True)
class Demo:
    """One data set to show the comparison on."""

    config: str
    about: str


DEMOS = {
    "synthetic": Demo(
        "toy/ccnet_synthetic.py",
        "The synthetic set: objects whose class is given by a cue elsewhere in the image. Without attention a network "
        "can only guess it; one loop carries it along the cue's rows and columns; two loops carry it everywhere.",
    ),
    "camvid": Demo(
        "camvid/ccnet_R_18_D8_half.py",
        "CamVid at 240x180, ResNet-18 from random weights.",
    ),
}


def run_demo(dataset: str, output: Path, *, seed: int = 0, overrides: Sequence[str] = ()) -> dict:
    """Train the three variants, write the report and return what report.json holds.

    Args:
        dataset: a key of `DEMOS`.
        output: folder to write to.
        seed: of data, initial weights and data order.
        overrides: config overrides for all three.

    Raises:
        UserError: a training failed, an override is wrong or has no effect, or the folder cannot be written to.
        DatasetError: the data set is missing.
    """
    start = time.monotonic()
    demo = DEMOS[dataset]
    refuse_overridden(overrides, _SETTERS)
    in_bf16 = ["train.amp.enabled=True"] if dataset != "synthetic" and has_fast_bf16() else []
    overrides = [f"train.seed={seed}", *in_bf16, *overrides]
    # Fail on a wrong override or a missing data set at once, not three times in other processes.
    cfg = load_run(demo.config, overrides)
    make_output_dir(str(output), "output")
    for stale in _REPORT_FILES:  # no old report beside a failed run
        (output / stale).unlink(missing_ok=True)
    environment = {}
    if dataset == "synthetic":
        root = (output / "datasets").resolve()
        generate_synthetic_dataset(root / "ccnet_synthetic", SyntheticConfig(seed=seed))
        # The trainings read it there, whatever the user's own data sets are.
        environment["DETECTRON2_DATASETS"] = str(root)
        register_all(root)
    for split in (cfg.dataloader.train, cfg.dataloader.test):
        get_sem_seg_dataset_dicts(split.dataset.names)
    print(
        f"Training {', '.join(v.name for v in VARIANTS)} for {cfg.train.max_iter} iterations each.",
        flush=True,
    )

    runs = train_variants(demo.config, VARIANTS, output, overrides=overrides, environment=environment)
    runs.reverse()  # the order of the paper's table
    report = {
        "dataset": dataset,
        "seed": seed,
        "miou": {run.variant.name: round(run.miou, 2) for run in runs},
        "pixel_accuracy": {run.variant.name: round(run.metrics["sem_seg"]["pACC"], 2) for run in runs},
        "train_seconds": {run.variant.name: round(run.seconds, 1) for run in runs},
        "iterations": cfg.train.max_iter,
        "total_seconds": round(time.monotonic() - start, 1),
    }
    _draw(cfg, runs, output)
    atomic_write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    table = _table(runs)
    atomic_write_text(output / "report.md", _markdown(demo, cfg, runs, report))
    print(f"\n{table}\nReport and pictures: {output}/report.md", flush=True)
    return report


def _table(runs: Sequence[VariantRun]) -> str:
    lines = ["| model | mIoU | pixel accuracy | training, s |", "| --- | ---: | ---: | ---: |"]
    for run in runs:
        accuracy = run.metrics["sem_seg"]["pACC"]
        lines.append(f"| {run.variant.title} | {run.miou:.1f} | {accuracy:.1f} | {run.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _markdown(demo: Demo, cfg: DictConfig, runs: Sequence[VariantRun], report: dict) -> str:
    commands = "\n".join(run.command for run in runs)
    return f"""# CCNet demo

{demo.about}

{_table(runs)}
{cfg.train.max_iter} iterations each with seed {report["seed"]}; measured on the {len(_test_records(cfg))} images of
`{cfg.dataloader.test.dataset.names}`.

![predictions](predictions.png)

Where a pixel looks after one and after two loops (R=2 model):

![attention](attention.png)

## Commands

```
{commands}
```
"""


def _draw(cfg: DictConfig, runs: Sequence[VariantRun], output: Path) -> None:
    records = _test_records(cfg)
    records = records[:: max(1, len(records) // _PICTURES)][:_PICTURES]
    images = [record["file_name"] for record in records]
    truths = [read_label(record["sem_seg_file_name"]) for record in records]
    name, *_ = check_registered(cfg.dataloader.test.dataset.names)
    classes = ClassTable.from_metadata(MetadataCatalog.get(name))
    predictors = {
        run.variant.name: Predictor(apply_overrides(cfg.copy(), run.variant.overrides), run.checkpoint)
        for run in runs
    }
    predictions = {
        run.variant.title: [predictors[run.variant.name](image).labels for image in images] for run in runs
    }
    save_prediction_grid(
        output / "predictions.png", [read_image(image) for image in images], predictions, classes, truths
    )
    pixels = _pixels_to_explain(truths, *(predictions[v.title] for v in (ONE_LOOP, TWO_LOOPS)))
    looks = [predictors[TWO_LOOPS.name].attention(images[image], *pixel) for image, pixel in pixels]
    write_image(output / "attention.png", draw_attention(_most_telling(looks)))


def _test_records(cfg: DictConfig) -> list[dict]:
    return get_sem_seg_dataset_dicts(cfg.dataloader.test.dataset.names)


def _pixels_to_explain(
    truths: Sequence[np.ndarray], one_loop: Sequence[np.ndarray], two_loops: Sequence[np.ndarray]
) -> list[tuple[int, tuple[int, int]]]:
    """Images, and in each the pixel (x, y) that best shows what the second loop adds.

    It is the one deepest inside what two loops get right and one loop gets wrong; where there is no such pixel in any
    image, inside what two get right, or the image.
    """
    right = [two == truth for truth, two in zip(truths, two_loops, strict=True)]
    gained = [mask & (one != truth) for mask, truth, one in zip(right, truths, one_loop, strict=True)]
    everywhere = [np.ones_like(mask) for mask in right]
    masks = next(masks for masks in (gained, right, everywhere) if any(mask.any() for mask in masks))
    pixels = []
    for image, mask in enumerate(masks):
        if mask.any():
            depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
            row, column = np.unravel_index(depth.argmax(), depth.shape)
            pixels.append((image, (int(column), int(row))))
    return pixels


def _most_telling(looks: Sequence[AttentionMaps]) -> AttentionMaps:
    """The one that ends most at a single place.

    One of the classes may be what a model answers where it finds nothing: its pixels look nowhere in particular.
    """
    return max(looks, key=lambda look: float(look.maps[-1].max()))
