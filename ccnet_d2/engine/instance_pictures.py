"""Pictures of a detector's predictions during training."""

from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from omegaconf import DictConfig
from torch import nn

from ccnet_d2.data.image_files import read_image
from ccnet_d2.inference.drawing import panel_grid, readable
from ccnet_d2.inference.images import write_image

_LEAST_SCORE = 0.5  # of what is drawn; evaluation goes down to a twentieth, which covers a picture with boxes


def draw_instances(cfg: DictConfig, model: nn.Module, records: list[dict[str, Any]], path: Path) -> None:
    """Write one picture, a row for each image: the instances that are predicted with a score of a half at least, and
    those of the ground truth.

    Args:
        cfg: the run; its test mapper prepares the images.
        model: in evaluation mode; gives "instances".
        records: of the test set, in Detectron2's format.
        path: file to write.
    """
    test = cfg.dataloader.test
    name = test.dataset.names if isinstance(test.dataset.names, str) else test.dataset.names[0]
    metadata, mapper = MetadataCatalog.get(name), instantiate(test.mapper)
    rows = []
    for record in records:
        image = read_image(record["file_name"])
        instances = model([mapper(dict(record))])[0]["instances"].to("cpu")
        likely = instances[instances.scores >= _LEAST_SCORE]
        found, truth = (Visualizer(image, metadata, scale=readable(image.shape)) for _ in range(2))
        rows.append(
            [
                found.draw_instance_predictions(likely).get_image(),
                truth.draw_dataset_dict(record).get_image(),
            ]
        )
    titles = [Path(record["file_name"]).stem for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, panel_grid(rows, ["prediction", "ground truth"], row_titles=titles))
