"""How the workers of loaders are started."""

import multiprocessing
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from ccnet_d2.data.forked_workers import fork_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks workers")


@pytest.fixture
def start_method():
    """Sets the one for all processes, None for that which Python takes by itself."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


class NotPickled(Dataset):
    """A data set that no other process can be sent."""

    def __init__(self):
        self.read = lambda index: index

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.read(index)


@pytest.mark.parametrize("method", [None, "forkserver", "fork"])
def test_workers_share_what_cannot_be_sent(start_method, method):
    start_method(method)
    loader = DataLoader(NotPickled(), num_workers=1, collate_fn=lambda batch: batch)
    assert fork_workers(loader) is loader
    assert list(loader) == [[0], [1]]


def test_what_was_chosen_stays(start_method):
    start_method("forkserver")
    chosen = fork_workers(DataLoader(NotPickled(), num_workers=1, multiprocessing_context="spawn"))
    assert chosen.multiprocessing_context.get_start_method() == "spawn"
    start_method("spawn")
    assert fork_workers(DataLoader(NotPickled(), num_workers=1)).multiprocessing_context is None


def test_loaders_without_workers_and_other_iterables_stay():
    assert fork_workers(DataLoader(NotPickled())).multiprocessing_context is None
    batches = [1, 2]
    assert fork_workers(batches) is batches
