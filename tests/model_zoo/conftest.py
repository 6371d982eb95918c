"""A small published network on a server of one's own."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from ccnet_d2.model_zoo import PUBLISHED, Published
from tests.checkpoint.source_networks import CCHead, FCNHead, randomize

RUN = """
from ccnet_d2.model_zoo import get_config

_run = get_config("camvid/ccnet_R_18_D8_half.py")
model, dataloader, optimizer = _run.model, _run.dataloader, _run.optimizer
lr_multiplier, test, train = _run.lr_multiplier, _run.test, _run.train
model.sem_seg_head.channels = 16
model.sem_seg_head.aux_channels = 8
train.device = "cpu"
"""


class Server:
    """Serves a folder on the loopback interface, and notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args) -> None:
                asked.append(self.path)

            def copyfile(self, source, outputfile) -> None:
                with contextlib.suppress(ConnectionError):  # who asked may have heard enough
                    super().copyfile(source, outputfile)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.stop()


class SmallMMSeg(nn.Module):
    """mmsegmentation's layout on a ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        del self.backbone.fc
        self.decode_head = CCHead(11, 16, in_channels=512)
        self.auxiliary_head = FCNHead(11, 8, in_channels=256)


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> tuple[nn.Module, bytes]:
    """The network, and its published file."""
    net = randomize(SmallMMSeg(), seed=3)
    path = tmp_path_factory.mktemp("network") / "x.pth"
    torch.save({"state_dict": net.state_dict(), "meta": {"CLASSES": ["sky"]}}, path)
    return net, path.read_bytes()


@pytest.fixture
def entry(tmp_path, server, network, monkeypatch) -> Published:
    """A run of one's own with weights on the server; the cache is empty and nothing else is asked."""
    monkeypatch.setenv("CCNET_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CCNET_D2_ZOO", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/small.py").write_text(RUN)
    _, content = network
    (server.folder / "net.pth").write_bytes(content)
    name = "runs/small"
    digits = hashlib.sha256(content).hexdigest()[:8]
    entry = Published(name, f"{server.address}/net.pth", "mmseg", digits, "net.pth", "a test")
    monkeypatch.setitem(PUBLISHED, name, entry)
    return entry
