"""Published weights: fetched once, checked, converted, kept; and one clear sentence where that cannot be."""

import errno
import hashlib
import logging
import re
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager
from portalocker.exceptions import LockException

from ccnet_d2 import model_zoo
from ccnet_d2.checkpoint import SafeCheckpointer
from ccnet_d2.checkpoint.convert import LAYOUTS
from ccnet_d2.errors import UserError
from ccnet_d2.inference import Predictor
from ccnet_d2.model_zoo import PUBLISHED, __main__, cache, cache_dir, download, get_config, weights_file
from ccnet_d2.model_zoo.published import published
from tests.checkpoint.source_networks import MMSegCCNet, randomize
from tests.checkpoint.test_convert import Payload, image, logits


def files_in_cache() -> list[str]:
    return sorted(path.name for path in cache_dir().glob("*") if path.suffix != ".lock")


def test_end_to_end(entry, server, network):
    net, _ = network
    model = model_zoo.get(f"{entry.name}.py", trained=True)
    assert not model.training and next(model.parameters()).device.type == "cpu"
    weights = model.state_dict()
    assert torch.equal(weights["backbone.res3.1.conv2.weight"], net.backbone.layer2[1].conv2.weight)
    assert torch.equal(weights["sem_seg_head.classifier.bias"], net.decode_head.conv_seg.bias)
    assert server.asked == ["/net.pth"]
    # The second time nothing is fetched, and nothing but the converted weights was kept.
    model_zoo.get(f"{entry.name}.py", trained=True)
    assert server.asked == ["/net.pth"] and len(files_in_cache()) == 1


def test_a_converted_file_is_a_checkpoint_of_detectron2(entry):
    path = weights_file(entry.name)
    data = torch.load(path, weights_only=True)
    assert set(data) == {"model", "__author__"}
    assert PathManager.get_local_path(f"ccnet://{entry.name}") == str(path)
    assert PathManager.isfile(f"ccnet://{entry.name}")
    with PathManager.open(f"ccnet://{entry.name}", "rb") as file:
        assert file.read(4) == b"PK\x03\x04"


def test_every_place_that_takes_a_checkpoint(entry, tmp_path):
    model = model_zoo.get(f"{entry.name}.py")
    assert model.training
    assert SafeCheckpointer(model, str(tmp_path)).load(f"ccnet://{entry.name}")["__author__"]
    cfg = get_config(entry.name + ".py", trained=True)
    assert cfg.train.init_checkpoint == f"ccnet://{entry.name}"
    prediction = Predictor(cfg)(image(48, 64).permute(1, 2, 0).numpy())
    assert prediction.labels.shape == (48, 64)


@pytest.mark.parametrize("package", ["modeling", "checkpoint", "inference", "model_zoo"])
def test_detectron2_knows_the_names_after_any_import(package):
    """Its own checkpointer, in a program that imports nothing else of this project."""
    program = (
        f"import ccnet_d2.{package}\nfrom detectron2.utils.file_io import PathManager\n"
        "PathManager.get_local_path('ccnet://nothing/of/this/name')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "UserError: There are no published weights for 'nothing/of/this/name'" in done.stderr, done.stderr


def test_weights_to_train_on_other_classes_from(entry, server):
    whole = torch.load(weights_file(entry.name), weights_only=True)["model"]
    cfg = get_config(entry.name + ".py")
    cfg.model.sem_seg_head.num_classes = 3
    model = instantiate(cfg.model)
    with pytest.raises(UserError, match="does not fit"):
        SafeCheckpointer(model).load(f"ccnet://{entry.name}")
    SafeCheckpointer(model).load(f"ccnet://{entry.name}/without-classifier")
    weights = model.state_dict()
    absent = [name for name in whole if not torch.equal(weights[name], whole[name])]
    kinds = ("weight", "bias")
    heads = ("classifier", "auxiliary.2")
    assert sorted(absent) == sorted(f"sem_seg_head.{head}.{kind}" for head in heads for kind in kinds)
    assert len(files_in_cache()) == 2 and len(server.asked) == 2


def test_a_tampered_file_is_refused(entry, server):
    content = bytearray((server.folder / "net.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (server.folder / "net.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"net\.pth is not the file .* instead of {entry.sha256}"):
        model_zoo.get(f"{entry.name}.py", trained=True)
    assert files_in_cache() == []


def test_every_digit_that_is_public_counts(entry, monkeypatch):
    other = entry.sha256[:-1] + ("0" if entry.sha256[-1] != "0" else "1")
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=other))
    with pytest.raises(UserError, match=rf"begins with {entry.sha256} instead of {other};"):
        weights_file(entry.name)


def test_servers_are_told_who_asks(entry, server, monkeypatch):
    """Some have no answer for Python's own name."""
    handler = server._server.RequestHandlerClass.func
    get = handler.do_GET

    def choosy(self):
        if self.headers["User-Agent"].startswith("Python-urllib"):
            self.send_error(403)
        else:
            get(self)

    monkeypatch.setattr(handler, "do_GET", choosy)
    assert weights_file(entry.name).is_file()


def test_a_tampered_file_in_a_local_folder_is_refused_and_left_alone(entry, server, tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    content = (server.folder / "net.pth").read_bytes()
    (tmp_path / "zoo/net.pth").write_bytes(content + b"x")
    monkeypatch.setenv("CCNET_D2_ZOO", str(tmp_path / "zoo"))
    with pytest.raises(UserError, match="is not the file that was published"):
        weights_file(entry.name)
    assert (tmp_path / "zoo/net.pth").exists() and files_in_cache() == []


def test_a_local_folder_needs_no_network(entry, server, tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CCNET_D2_ZOO", "~/zoo")
    with pytest.raises(UserError, match=r"has no net\.pth: download it there from http"):
        weights_file(entry.name)
    (tmp_path / "zoo/net.pth").write_bytes((server.folder / "net.pth").read_bytes())
    assert weights_file(entry.name).is_file()
    assert server.asked == [] and (tmp_path / "zoo/net.pth").exists()


def test_places_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value, place in (
        ("CCNET_D2_CACHE", "~/of mine", "of mine"),
        ("CCNET_D2_CACHE", "", ".cache/ccnet_d2"),
        ("XDG_CACHE_HOME", str(tmp_path / "xdg"), "xdg/ccnet_d2"),
    ):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(name, value)
        assert cache_dir() == tmp_path / place


@pytest.mark.parametrize("value", ["~no user of this name/cache", ""])
def test_a_cache_in_a_home_that_is_not_there_is_one_sentence(entry, monkeypatch, value):
    """As in a container that runs as a user without an entry."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CCNET_D2_CACHE", value)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(
        UserError, match=rf"no home directory for the cache {value or '~/.cache/ccnet_d2'}: set CCNET"
    ):
        weights_file(entry.name)


def test_a_folder_of_files_in_a_home_that_is_not_there_has_none(entry, server, monkeypatch):
    monkeypatch.setenv("CCNET_D2_ZOO", "~no user of this name/zoo")
    with pytest.raises(
        UserError, match=r"^CCNET_D2_ZOO=~no user of this name/zoo has no net\.pth: download it"
    ):
        weights_file(entry.name)
    assert server.asked == []


def test_what_was_published_anew_is_fetched_anew(entry, server, network, monkeypatch):
    first = weights_file(entry.name)
    bias = network[0].decode_head.conv_seg.bias
    torch.save(
        {"state_dict": network[0].state_dict() | {"decode_head.conv_seg.bias": bias + 1}, "meta": {}},
        server.folder / "net.pth",
    )
    digits = hashlib.sha256((server.folder / "net.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=digits))
    weights = torch.load(weights_file(entry.name), weights_only=True)["model"]
    assert torch.equal(weights["sem_seg_head.classifier.bias"], bias + 1)
    assert first.is_file() and len(server.asked) == 2
    # So is what converters of another version made.
    monkeypatch.setattr(cache, "_CONVERSION", 99)
    assert weights_file(entry.name).is_file() and len(server.asked) == 3


def test_who_waits_for_another_takes_what_that_one_made(entry, server, monkeypatch):
    path = weights_file(entry.name)
    content = path.read_bytes()
    path.unlink()

    @contextmanager
    def lock_of_another(name):
        path.write_bytes(content)
        yield

    monkeypatch.setattr(cache, "file_lock", lock_of_another)
    assert weights_file(entry.name) == path and len(server.asked) == 1


def test_a_cache_that_cannot_be_locked(entry, monkeypatch):
    @contextmanager
    def no_lock(name):
        raise LockException(OSError(errno.ENOSYS, "Function not implemented"))
        yield

    monkeypatch.setattr(cache, "file_lock", no_lock)
    with pytest.raises(
        UserError, match=r"cache \S+ cannot be locked \(.*not implemented\): set CCNET_D2_CACHE"
    ):
        weights_file(entry.name)


def test_a_mirror_takes_the_place_of_every_address(entry, server, monkeypatch):
    elsewhere = replace(entry, address="http://127.0.0.1:9/net.pth", file="net 1.pth")
    monkeypatch.setitem(PUBLISHED, entry.name, elsewhere)
    (server.folder / "zoo").mkdir()
    (server.folder / "net.pth").rename(server.folder / "zoo" / "net 1.pth")
    monkeypatch.setenv("CCNET_D2_ZOO", server.address + "/zoo/")
    assert weights_file(entry.name).is_file() and server.asked == ["/zoo/net%201.pth"]


def test_a_file_of_an_old_torch(entry, server, network, monkeypatch):
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=""))
    content = {"state_dict": network[0].state_dict(), "meta": {}}
    torch.save(content, server.folder / "net.pth", _use_new_zipfile_serialization=False)
    weights = torch.load(weights_file(entry.name), weights_only=True)["model"]
    assert torch.equal(weights["sem_seg_head.classifier.bias"], network[0].decode_head.conv_seg.bias)


def test_a_file_in_a_local_folder_that_may_not_be_read(entry, tmp_path, monkeypatch):
    """The folder is at fault, not the cache."""
    (tmp_path / "net.pth").write_bytes(b"PK")
    monkeypatch.setenv("CCNET_D2_ZOO", str(tmp_path))

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(download, "_sha256_of", refuse)
    with pytest.raises(
        UserError, match=r"net\.pth, in the .* CCNET_D2_ZOO names, cannot be read: Permission denied\.$"
    ):
        weights_file(entry.name)


def test_a_disk_that_is_full_is_no_trouble_of_the_network(entry, monkeypatch):
    class FullBar(download.tqdm):
        def update(self, n=1):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "tqdm", FullBar)
    with pytest.raises(
        UserError, match=r"^Writing to \S+ failed: No space left .*; make room, or set CCNET_D2_CACHE"
    ):
        weights_file(entry.name)
    assert files_in_cache() == []


def test_no_network_is_one_sentence(entry, server, monkeypatch):
    server.stop()
    monkeypatch.setattr(server, "stop", lambda: None)
    with pytest.raises(UserError) as raised:
        model_zoo.get(f"{entry.name}.py", trained=True)
    sentence = str(raised.value)
    assert "\n" not in sentence and entry.address in sentence and "CCNET_D2_ZOO" in sentence
    assert files_in_cache() == []


def test_a_missing_file_is_one_sentence(entry, server):
    (server.folder / "net.pth").unlink()
    with pytest.raises(UserError, match=r"net\.pth cannot be downloaded .* \(.*File not found.*\)"):
        weights_file(entry.name)


def test_a_page_instead_of_a_file(entry, server, monkeypatch):
    """Google Drive answers with a page where it wants a click."""
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=""))
    (server.folder / "net.pth").write_text("<!DOCTYPE html><title>Virus scan warning</title>")
    with pytest.raises(UserError, match=r"no checkpoint of torch .* by hand"):
        weights_file(entry.name)
    assert files_in_cache() == []


def test_a_connection_that_breaks(entry, server, monkeypatch):
    handler = server._server.RequestHandlerClass.func

    def half(self, source, target):
        target.write(source.read(1000))

    monkeypatch.setattr(handler, "copyfile", half)
    with pytest.raises(UserError, match="broke after 1000 of"):
        weights_file(entry.name)
    assert files_in_cache() == []


def test_a_download_without_an_end_is_refused(entry, monkeypatch):
    monkeypatch.setattr(download, "_LARGEST", 1000)
    with pytest.raises(UserError, match=r"net\.pth cannot be downloaded .*\(it is larger than"):
        weights_file(entry.name)
    assert files_in_cache() == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nPK\x03\x04", "IncompleteRead"),
        (b"no answer of a web server\r\n\r\n", "no answer of a web server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "'many'"),
        (b"", "timed out"),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(entry, monkeypatch, answer, reason):
    given_up = threading.Event()
    if not answer:
        monkeypatch.setattr(download, "_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                if answer:
                    connection.sendall(answer)
                else:
                    given_up.wait(timeout=5)

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("CCNET_D2_ZOO", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(UserError, match=rf"net\.pth cannot be downloaded .*{reason}"):
            weights_file(entry.name)
        given_up.set()
        thread.join()
    assert files_in_cache() == []


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0"])
def test_an_answer_that_does_not_say_its_length(entry, server, network, monkeypatch, protocol):
    """It ends with an empty chunk, or where the connection does."""
    handler = server._server.RequestHandlerClass.func
    content = network[1]

    def answer(self):
        self.protocol_version = protocol
        self.send_response(200)
        if protocol == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        head = b"%x\r\n" % len(content)
        self.wfile.write(head + content + b"\r\n0\r\n\r\n" if protocol == "HTTP/1.1" else content)
        self.close_connection = True

    monkeypatch.setattr(handler, "do_GET", answer)
    assert weights_file(entry.name).is_file()


def test_a_mirror_whose_address_is_none_is_one_sentence(entry, monkeypatch):
    monkeypatch.setenv("CCNET_D2_ZOO", "http://127.0.0.1:9/my folder")
    with pytest.raises(UserError, match=r"my folder/net\.pth \(URL can't contain"):
        weights_file(entry.name)


def test_two_who_want_one_file_in_two_variants_do_not_meet(entry, server, monkeypatch):
    handler = server._server.RequestHandlerClass.func
    one_is_half_done, another_began = threading.Event(), threading.Event()

    def slowly(self, source, target):
        content = source.read()
        target.write(content[:1000])
        if one_is_half_done.is_set():
            another_began.set()
        one_is_half_done.set()
        another_began.wait(timeout=1)  # nothing but the lock keeps the other from it
        target.write(content[1000:])

    monkeypatch.setattr(handler, "copyfile", slowly)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(weights_file, entry.name)
        assert one_is_half_done.wait(timeout=30)
        bare = pool.submit(weights_file, entry.name, classifier=False)
        files = [whole.result(), bare.result()]
    assert sorted(file.name for file in files) == files_in_cache()


def test_code_in_a_published_file_is_not_run(entry, server, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=""))
    torch.save({"state_dict": {"x": Payload(tmp_path / "victim")}}, server.folder / "net.pth")
    with pytest.raises(UserError, match="would run code"):
        model_zoo.get(f"{entry.name}.py", trained=True)
    assert not (tmp_path / "victim").exists() and files_in_cache() == []


def test_an_archive_that_grows_is_refused(entry, server, monkeypatch):
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, sha256=""))
    packed = server.folder / "packed.pth"
    with (
        zipfile.ZipFile(server.folder / "net.pth") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for item in source.infolist():
            target.writestr(item.filename, source.read(item)[:1000])
    packed.replace(server.folder / "net.pth")
    with pytest.raises(UserError, match="compressed record"):
        weights_file(entry.name)


def test_a_cache_that_cannot_be_written(entry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CCNET_D2_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="CCNET_D2_CACHE"):
        weights_file(entry.name)


def test_a_cache_that_cannot_be_looked_into(entry, tmp_path, monkeypatch):
    """Its name is too long for any file system; one in a home that is another user's ends alike."""
    monkeypatch.setenv("CCNET_D2_CACHE", str(tmp_path / ("x" * 300)))
    with pytest.raises(
        UserError, match=r"^The cache \S+ cannot be used \(.*name too long.*\): set CCNET_D2_CACHE"
    ):
        weights_file(entry.name)


def test_weights_of_another_network(entry, monkeypatch):
    """What the converter refuses leaves nothing behind."""
    monkeypatch.setitem(PUBLISHED, entry.name, replace(entry, layout="official"))
    with pytest.raises(UserError, match="mmseg layout, not official"):
        weights_file(entry.name)
    assert files_in_cache() == []


def test_names(entry):
    with pytest.raises(UserError, match=r"no published weights for 'toy/ccnet_synthetic\.py'"):
        model_zoo.get("toy/ccnet_synthetic.py", trained=True)
    # Nor is another data set's model meant.
    with pytest.raises(
        UserError, match=r"weights for 'camvid/ccnet_R_18_D8_half', a run that has to be trained"
    ):
        model_zoo.get("camvid/ccnet_R_18_D8_half", trained=True)
    with pytest.raises(UserError, match=r"did you mean .*imagenet/resnet50_v1c"):
        weights_file("imagenet/resnet50_v1")
    assert published("configs/ade20k/ccnet_R_50_D8_512x512_80k.py").name == "ade20k/ccnet_R_50_D8_512x512_80k"
    trained = model_zoo.list(trained=True)
    assert len(trained) == 19 and set(trained) < set(model_zoo.list())
    model = model_zoo.get("toy/ccnet_synthetic.py", device="meta")
    assert model.training and {value.device.type for value in model.parameters()} == {"meta"}
    with pytest.raises(UserError, match=r"device 'cuda:99' was asked for, but torch sees"):
        model_zoo.get("toy/ccnet_synthetic.py", device="cuda:99")


def test_command_line_tells_what_it_does_and_begins_once_all_names_are_known(
    entry, server, capsys, monkeypatch
):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a program of its own
    level = logging.root.level
    try:
        assert __main__.main([entry.name, "nothing"]) == 1
        assert server.asked == [] and capsys.readouterr().out == ""
        assert __main__.main([f"{entry.name}.py"]) == 0
    finally:
        logging.root.setLevel(level)
    output = capsys.readouterr()
    assert output.out == f"{weights_file(entry.name)}\n"
    told = output.err.splitlines()
    assert told[0] == f"Downloading {entry.address}"
    assert "net.pth: CCNet of 11 classes on ResNet-18, basic stem (mmseg layout)" in told


def test_command_line(entry, capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    assert "cityscapes/ccnet_R_50_D8_512x1024_40k" in out and "(not public)" in out
    assert str(cache_dir()) in out and "https://" not in out
    for listed in PUBLISHED.values():
        digits = listed.sha256 or r"\(not public\)"
        assert re.search(rf"^{re.escape(listed.name)} +{listed.source} +sha256 {digits}$", out, re.MULTILINE)
    assert __main__.main(["--addresses"]) == 0
    out = capsys.readouterr().out
    for listed in PUBLISHED.values():
        assert re.search(
            rf"^{re.escape(listed.name)} .*  {listed.file}  {re.escape(listed.address)}$", out, re.MULTILINE
        )
    assert __main__.main([entry.name]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert __main__.main(["nothing"]) == 1
    assert "no published weights" in capsys.readouterr().err


def test_the_table():
    runs = {name.removesuffix(".py") for name in model_zoo.config_names()}
    files = [entry.file for entry in PUBLISHED.values()]
    assert len(set(files)) == len(files)
    for name, entry in PUBLISHED.items():
        assert name == entry.name and (name in runs) == entry.is_run
        assert entry.layout in LAYOUTS and re.fullmatch(r"([0-9a-f]{8})?", entry.sha256)
        assert entry.address.startswith(("https://", "http://sceneparsing.csail.mit.edu/"))
        if entry.sha256:
            assert entry.address.endswith(f"-{entry.sha256}.pth")
    # Who published a file named its weights.
    layouts = {"_v1c": "mmseg", "_v1s": "timm", "_mit": "official"}
    for entry in PUBLISHED.values():
        if entry.is_run:
            layout = (
                "official" if Path(entry.name).name.startswith(("ccnet_official", "ccnet_ohem")) else "mmseg"
            )
        else:
            layout = layouts.get(entry.name[-4:], "torchvision")
        assert entry.layout == layout, entry.name
    # The sixteen of mmsegmentation: network, crop, schedule and data set in the name of the file are those of the run.
    sixteen = [entry for entry in PUBLISHED.values() if entry.source == "mmsegmentation"]
    assert len(sixteen) == 16
    for entry in sixteen:
        cfg = get_config(entry.name)
        height, width = cfg.dataloader.train.mapper.augmentations[0].crop_size
        data = {19: "cityscapes", 150: "ade20k", 21: "voc12aug"}[cfg.model.sem_seg_head.num_classes]
        depth, steps = cfg.model.backbone.depth, cfg.train.max_iter // 1000
        run = f"ccnet_r{depth}-d8_{height}x{width}_{steps}k_{data}"
        assert f"/{run}/{run}_" in entry.address
        # So are the weights that it starts from.
        assert cfg.train.init_checkpoint.removeprefix("ccnet://") in PUBLISHED


@pytest.mark.slow
@torch.no_grad()
def test_a_published_network_in_its_own_size(entry, server, monkeypatch):
    """mmsegmentation's CCNet-R-50 with random weights: from its file on a server to the same logits."""
    run = "cityscapes/ccnet_R_50_D8_512x1024_40k"
    net = randomize(MMSegCCNet())
    torch.save({"state_dict": net.state_dict(), "meta": {}}, server.folder / "net.pth")
    monkeypatch.setitem(PUBLISHED, run, replace(PUBLISHED[run], address=entry.address, sha256=""))
    model = model_zoo.get(run, trained=True, device="cpu")
    ours, theirs = logits(model, image(128, 256)), net.logits(image(128, 256))
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-4
