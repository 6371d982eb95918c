"""Finding and loading the configs that come with the project, from a checkout or from an installed wheel."""

from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from ccnet_d2.errors import UserError

from .nearest import nearest
from .published import PUBLISHED, published

_PACKAGED = Path(__file__).parent / "configs"
_CHECKOUT = Path(__file__).parents[2] / "configs"
_RUN_KEYS = ("model", "dataloader", "train")


def config_root() -> Path:
    """The folder that holds the configs.

    Raises:
        UserError: the installation has none.
    """
    for root in (_PACKAGED, _CHECKOUT):
        if (root / "common").is_dir():
            return root
    raise UserError(
        f"No configs at {_PACKAGED} or {_CHECKOUT}: the installation is incomplete, reinstall ccnet_d2."
    )


def config_names() -> list[str]:
    """Names of all runs, such as "camvid/ccnet_R_18_small.py"."""
    root = config_root()
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        file.as_posix() for file in files if file.parts[0] != "common" and file.name != "__init__.py"
    )


def config_path(name: str) -> Path:
    """The file of a config: a path that exists, or a name among `config_names()` with or without ".py".

    Raises:
        UserError: neither, and the message names the nearest configs; or the file may not be read.
    """
    for candidate in (Path(name), config_root() / name, config_root() / f"{name}.py"):
        try:
            if candidate.is_file():
                candidate.open("rb").close()
                return candidate
        except OSError as error:
            raise UserError(f"Config {candidate} cannot be read: {error.strerror or error}.") from error
    hint = nearest(name, config_names(), "ccnet_d2.model_zoo.config_names() lists all.")
    raise UserError(f"There is no config {name!r}: {hint}")


def get_config(name: str, trained: bool = False) -> DictConfig:
    """Load a run.

    Args:
        name: a path, or a name relative to the project's configs, such as "camvid/ccnet_R_18_D8_half.py".
        trained: set `train.init_checkpoint` to the weights that were published for the run.

    Returns:
        A LazyConfig with `model`, `dataloader`, `optimizer`, `lr_multiplier` and `train`.

    Raises:
        UserError: there is no such config, the file may not be read or is not a run, or there are no weights for it.
    """
    path = config_path(name)
    if path.suffix != ".py":
        raise UserError(
            f"{path} is not a LazyConfig (.py) file. yacs (.yaml) configs are for train_net.py, and for Detectron2's "
            "DefaultPredictor."
        )
    try:
        config = LazyConfig.load(str(path))
    except UnicodeDecodeError as error:
        raise UserError(
            f"Config {path}, or one that it imports, is not text in UTF-8: {error.reason}."
        ) from error
    missing = [key for key in _RUN_KEYS if key not in config]
    if missing:
        raise UserError(f"{path} is not a run: it defines no {' and no '.join(missing)}.")
    if trained:
        config.train.init_checkpoint = f"ccnet://{published(_known_name(name, path), is_run=True).name}"
    return config


def _known_name(name: str, path: Path) -> str:
    """The name of a run with published weights whose file is given by its path; any other name as it is."""
    file, root = path.resolve(), config_root().resolve()
    known = file.relative_to(root).with_suffix("").as_posix() if file.is_relative_to(root) else name
    return known if known in PUBLISHED else name
