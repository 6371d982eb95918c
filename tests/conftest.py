"""What every test gets."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Take back Detectron2's logging, which goes on writing to the streams of the test that set it up."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ccnet_d2")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
