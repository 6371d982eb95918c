"""`ccnet://NAME` wherever Detectron2 takes a checkpoint: `train.init_checkpoint`, `MODEL.WEIGHTS`, --checkpoint.

`ccnet://NAME/without-classifier` leaves out the last layer of each head, to train on other classes. Importing this
makes Detectron2 know such names, so that its own training loop and checkpointer take them too.
"""

from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

PREFIX = "ccnet://"
_WITHOUT_CLASSIFIER = "/without-classifier"


class PublishedWeightsHandler(PathHandler):
    """Published weights, fetched and converted when they are first opened; see `weights_file`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        # Here, as the model zoo is built upon packages that import this module.
        from ccnet_d2.model_zoo import weights_file

        name = path.removeprefix(PREFIX)
        classifier = not name.endswith(_WITHOUT_CLASSIFIER)
        return str(weights_file(name.removesuffix(_WITHOUT_CLASSIFIER), classifier=classifier))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return Path(self._get_local_path(path)).open(mode, buffering)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return Path(self._get_local_path(path)).is_file()


PathManager.register_handler(PublishedWeightsHandler())
