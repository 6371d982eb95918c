"""What every test gets, and what those get that ask for it."""

import logging
from collections.abc import Iterator

import pytest

# Before any test has a reason to import pip, which takes setuptools' own distutils away: setuptools, which torch's
# cpp_extension and so Detectron2's training import, could not be imported any more after that.
import setuptools  # noqa: F401


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Take back Detectron2's logging, which goes on writing to the streams of the test that set it up."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ccnet_d2")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def catalogs_as_before() -> Iterator[None]:
    """Take back what a test registers in Detectron2's catalogs, and what it points at another folder."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    # These register on import: before the test, which would take their data sets away with its own.
    from ccnet_d2.data.datasets import coco_fixture, folder, lip_fixture  # noqa: F401

    stores = DatasetCatalog.data, MetadataCatalog.data
    before = [dict(store) for store in stores]
    registered = set(folder._REGISTERED_HERE)
    yield
    for store, entries in zip(stores, before, strict=True):
        store.clear()
        store.update(entries)
    folder._REGISTERED_HERE.clear()
    folder._REGISTERED_HERE.update(registered)
