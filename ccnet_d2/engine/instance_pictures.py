"""Pictures of a detector's predictions during training."""

from pathlib import Path
from typing import Any

from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer
from torch import nn

from ccnet_d2.data.image_files import read_image
from ccnet_d2.inference.drawing import panel_grid, readable
from ccnet_d2.inference.images import write_image

_LEAST_SCORE = 0.5  # of what is drawn; evaluation goes down to a twentieth, which covers a picture with boxes


def draw_instances(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    records: list[dict[str, Any]],
    metadata: Metadata,
    path: Path,
) -> None:
    """Write one picture, a row for each image: the instances that are predicted with a score of a half at least, and
    those of the ground truth.

    Args:
        model: in evaluation mode; gives "instances".
        inputs: what the model is given for each image.
        records: the images in Detectron2's data set format.
        metadata: of the data set.
        path: file to write.
    """
    rows = []
    for record, one in zip(records, inputs, strict=True):
        image = read_image(record["file_name"])
        instances = model([one])[0]["instances"].to("cpu")
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
