"""A hook that draws predictions while training goes on."""

from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import HookBase
from omegaconf import DictConfig
from torch import nn

from ccnet_d2.autocast import configured_autocast
from ccnet_d2.data.image_files import check_label_size, read_image, read_label
from ccnet_d2.inference.build import configured_mode
from ccnet_d2.inference.classes import ClassTable
from ccnet_d2.inference.mode import InferenceMode, WholeImage
from ccnet_d2.inference.visualize import save_prediction_grid
from ccnet_d2.instantiation import build_object

from .instance_pictures import draw_instances


class PredictionPictures(HookBase):
    """Writes `pictures/iter_<N>.png` into the output directory: image, prediction, ground truth and difference, or a
    detector's instances and the ground truth's."""

    def __init__(self, cfg: DictConfig, model: nn.Module) -> None:
        """
        Args:
            cfg: the run; `train.num_pictures` images of `dataloader.test` are drawn after each evaluation.
            model: the model without its distributed wrapper.
        """
        self._cfg = cfg
        self._model = model

    def after_step(self) -> None:
        period = self._cfg.train.eval_period
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (period > 0 and done % period == 0):
            draw_predictions(
                self._cfg, self._model, Path(self._cfg.train.output_dir) / "pictures" / f"iter_{done:07d}.png"
            )


@torch.no_grad()
def draw_predictions(cfg: DictConfig, model: nn.Module, path: Path) -> None:
    """Write one picture of predictions on `train.num_pictures` images of `dataloader.test`, in the test mode and under
    the autocast setting that the run is evaluated in: label maps, or instances where the test set has no label maps.

    The images are spread evenly over the set, of which neighbours may be frames of one video, and all have label maps
    if any has.
    """
    test = cfg.dataloader.test
    name = test.dataset.names if isinstance(test.dataset.names, str) else test.dataset.names[0]
    found = DatasetCatalog.get(name)
    labelled = [record for record in found if record.get("sem_seg_file_name") is not None]
    records = _spread(labelled or found, cfg.train.num_pictures)
    mapper = build_object(cfg, "dataloader.test.mapper")
    inputs = [mapper(dict(record)) for record in records]
    was_training = model.training
    model.eval()
    with configured_autocast(cfg):
        if labelled:
            mode = (configured_mode(cfg) or WholeImage()).bind(model, test.dataset.names)
            _draw_label_maps(mode, inputs, records, MetadataCatalog.get(name), path)
        else:
            draw_instances(model, inputs, records, MetadataCatalog.get(name), path)
    model.train(was_training)


def _spread(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the records, or all if there are fewer, at even distances; the first is one of them."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _draw_label_maps(
    mode: InferenceMode,
    inputs: list[dict[str, Any]],
    records: list[dict[str, Any]],
    metadata: Metadata,
    path: Path,
) -> None:
    images = [read_image(record["file_name"]) for record in records]
    truths = [read_label(record["sem_seg_file_name"]) for record in records]
    for record, image, truth in zip(records, images, truths, strict=True):
        check_label_size(truth, record["sem_seg_file_name"], image, record["file_name"])
    predictions = [mode.predict_labels([one])[0].numpy() for one in inputs]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_prediction_grid(
        path,
        images,
        predictions,
        ClassTable.from_metadata(metadata),
        truths,
        row_titles=[Path(record["file_name"]).stem for record in records],
    )
