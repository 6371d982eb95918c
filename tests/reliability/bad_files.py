#!/usr/bin/env python
"""Bad input files and bad checkpoints: what train_net.py makes of each.

    python tests/reliability/bad_files.py

Every kind gets a process of its own. The table tells whether it ended, with which sentence, whether code from the file
ran, and whether what an earlier run had written is as it was.
"""

import argparse
import collections
import hashlib
import io
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SMALL_RUN = Path(__file__).with_name("small_run.py")
SECONDS = 60.0
"""After which a run counts as hung; the longest takes a few."""

Maker = Callable[[Path], None]


# Input files: each function damages one file of a data set, an image or a label map of 48x48.


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _huge_png(path: Path) -> None:
    """40000x40000 pixels in less than 1 MB."""
    pixels = zlib.compress(bytes(40000 // 8 + 1) * 40000, 1)
    header = struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0)
    chunks = [_png_chunk(b"IHDR", header), _png_chunk(b"IDAT", pixels), _png_chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _jpeg(size: tuple[int, int] = (48, 48)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        stream, "JPEG"
    )
    return stream.getvalue()


def _lying_jpeg(path: Path) -> None:
    data = bytearray(_jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65535, 65535)
    path.write_bytes(bytes(data))


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def _save(pixels: np.ndarray, file_format: str) -> Maker:
    return lambda path: Image.fromarray(pixels).save(path, file_format)


_FLOATS = np.linspace(0, 1000, 48 * 48, dtype=np.float32).reshape(48, 48)

BAD_IMAGES: dict[str, Maker] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no image\n"),
    "web page saved as an image": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "PNG cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "PNG without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "PNG with a flipped bit": lambda path: _flip(path, path.stat().st_size // 2),
    "JPEG cut in half": lambda path: path.write_bytes(_jpeg()[: len(_jpeg()) // 2]),
    "JPEG that claims 65535x65535": _lying_jpeg,
    "PNG of 40000x40000 in 1 MB": _huge_png,
    "64 GiB, sparse": _sparse,
    "named pipe": lambda path: _instead(path, os.mkfifo),
    "link to itself": lambda path: _instead(path, lambda p: p.symlink_to(p)),
    "endless device": lambda path: _instead(path, lambda p: p.symlink_to("/dev/zero")),
    "32-bit floats": _save(_FLOATS, "TIFF"),
    "other size than its label": _save(np.zeros((40, 48, 3), np.uint8), "PNG"),
}

BAD_LABELS: dict[str, Maker] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "colours": _save(np.zeros((48, 48, 3), np.uint8), "PNG"),
    "JPEG": lambda path: path.write_bytes(_jpeg()),
    "32-bit floats": _save(_FLOATS, "TIFF"),
    "class that is not there": _save(np.full((48, 48), 77, np.uint8), "PNG"),
    "16-bit class that is not there": _save(np.full((48, 48), 300, np.uint16), "PNG"),
    "other size than its image": _save(np.zeros((48, 40), np.uint8), "PNG"),
}


# Checkpoints: each function replaces a good one; code in it would create the file beside it named "executed".


class _Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.path}'",)


def executed(path: Path) -> Path:
    """What exists if code in the checkpoint at `path` ran."""
    return path.with_name("executed")


def _weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def _with(change: Callable[[dict, Path], object], suffix: str = ".pth") -> Maker:
    """Save the weights after a change to them."""

    def make(path: Path) -> None:
        weights = _weights(path)
        changed = change(weights, path)
        torch.save({"model": weights if changed is None else changed}, path)

    return make


def _flip_record(name: str) -> Maker:
    """Flip a bit in the middle of the largest record whose name contains `name`, leaving its checksum."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            record = max((r for r in archive.infolist() if name in r.filename), key=lambda r: r.file_size)
            start = record.header_offset
            name_length, extra_length = struct.unpack_from("<HH", path.read_bytes(), start + 26)
        _flip(path, start + 30 + name_length + extra_length + record.file_size // 2)

    return make


def _repack(change: Callable[[str, bytes], tuple[bytes, int]]) -> Maker:
    """Write the archive again, with right checksums."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                data, method = change(name, data)
                archive.writestr(name, data, compress_type=method)

    return make


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/bomb", "w", force_zip64=True) as record:
            for _ in range(2):
                record.write(bytes(2**24))


def _tar(path: Path) -> None:
    """A tar archive as torch wrote it before 2017, with code in its pickle."""
    members = {"sys_info": {"protocol_version": 1000, "little_endian": True, "type_sizes": {}}, "storages": 0}
    members.update(tensors=0, pickle={"model": _Touch(executed(path))})
    with tarfile.open(path, "w") as archive:
        for name, value in members.items():
            data = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _plain_pickle(make: Callable[[Path], object]) -> Maker:
    return lambda path: path.write_bytes(pickle.dumps(make(path), protocol=2))


def _raw_pickle(program: Callable[[Path], bytes]) -> Maker:
    return lambda path: path.write_bytes(program(path))


def _global_pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument)."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(argument, 2)[2:-1] + b"\x85R."


def _nested(_: Path) -> list:
    """2^60 leaves in a few hundred bytes, for whoever walks it."""
    value: list = ["x"]
    for _level in range(60):
        value = [value, value]
    return value


def _deep(path: Path) -> bytes:
    return b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."


def _claims_memory(path: Path) -> bytes:
    """numpy.ndarray((10**15,))"""
    return b"\x80\x02cnumpy\nndarray\n" + pickle.dumps((10**15,), 2)[2:-1] + b"\x85R."


def _python2_codec(path: Path) -> bytes:
    """_codecs.encode(…, "ccnet_evil"), for which Python would look for a module of that name."""
    return b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x0a\x00\x00\x00ccnet_evil\x86R."


def _object_array(path: Path) -> dict:
    return {"model": {"w": np.array([_Touch(executed(path))], dtype=object)}, "__author__": "x"}


def _huge_claim(weights: dict, _: Path) -> None:
    name = next(iter(weights))
    weights[name] = torch.zeros(1).expand(10**9, 10**3)


def _jit(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(path))


BAD_CHECKPOINTS: dict[str, Maker] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "folder": lambda path: _instead(path, Path.mkdir),
    "named pipe": lambda path: _instead(path, os.mkfifo),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last 100 bytes": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped bit in a weight": _flip_record("/data/"),
    "flipped bit in its pickle": _flip_record("data.pkl"),
    "pickle cut short, checksums right": _repack(
        lambda name, data: (data[: len(data) // 2] if name.endswith("data.pkl") else data, zipfile.ZIP_STORED)
    ),
    "weight cut short, checksums right": _repack(
        lambda name, data: (data[:4] if "/data/" in name else data, zipfile.ZIP_STORED)
    ),
    "zip bomb": _bomb,
    "code among the weights": _with(lambda weights, path: weights.update(evil=_Touch(executed(path)))),
    "code, torch's old format": lambda path: torch.save(
        {"model": _Touch(executed(path))}, path, _use_new_zipfile_serialization=False
    ),
    "code, torch's tar format": _tar,
    "whole module": _with(lambda weights, path: torch.nn.Linear(2, 2)),
    "TorchScript archive": _jit,
    "list of weights": _with(lambda weights, path: list(weights.values())),
    "string among the weights": _with(lambda weights, path: weights.update(extra="rm -rf")),
    "sparse weight": _with(lambda weights, path: weights.update(extra=torch.eye(2).to_sparse())),
    "names that are numbers": _with(lambda weights, path: dict(enumerate(weights.values()))),
    "other shape": _with(lambda weights, path: weights.update({next(iter(weights)): torch.zeros(1)})),
    "terabytes claimed by a view": _with(_huge_claim),
    "weight missing": _with(lambda weights, path: weights.__delitem__(next(iter(weights)))),
    "other network": _with(lambda weights, path: {"fc.weight": torch.zeros(1)}),
}

BAD_PICKLES: dict[str, Maker] = {
    "os.system": _plain_pickle(lambda path: {"model": _Touch(executed(path))}),
    "eval": _raw_pickle(
        lambda path: _global_pickle("builtins", "eval", f"open({str(executed(path))!r}, 'w').close()")
    ),
    "code in an object array": _plain_pickle(_object_array),
    "unknown codec": _raw_pickle(_python2_codec),
    "array of petabytes": _raw_pickle(_claims_memory),
    "2^60 references": _plain_pickle(lambda path: {"model": {"w": _nested(path)}, "__author__": "x"}),
    "100000 levels deep": _raw_pickle(_deep),
    "cut in half": _raw_pickle(lambda path: pickle.dumps({"model": {"w": np.zeros(99)}})[:60]),
    "ordered dict of text": _plain_pickle(lambda path: collections.OrderedDict(model=3)),
}


def all_kinds() -> list[tuple[str, str, Maker]]:
    """(family, kind, maker) of all."""
    families = {"image": BAD_IMAGES, "label": BAD_LABELS, ".pth": BAD_CHECKPOINTS, ".pkl": BAD_PICKLES}
    return [(family, kind, make) for family, kinds in families.items() for kind, make in kinds.items()]


def digest(folder: Path) -> str:
    """Of the names and contents of checkpoints and results, which a failing run must leave alone."""
    found = hashlib.sha256()
    for path in sorted(
        [*folder.glob("model_*"), *folder.glob("last_checkpoint"), *folder.glob("evaluation.json")]
    ):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _run(arguments: list[str], log: Path) -> int | None:
    """The status of train_net.py in a forked process; None if it hung."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            from ccnet_d2.engine.command_line import main

            status = main(["--config-file", str(SMALL_RUN), *arguments])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def try_all(folder: Path, report: Callable[[str], None]) -> dict[str, int]:
    """Try every kind in `folder`, which holds the data set; counts of what went how."""
    log, output = folder / "log.txt", folder / "earlier"
    if _run([f"train.output_dir={output}", "train.max_iter=8"], log) != 0:
        raise RuntimeError(log.read_text()[-2000:])
    before = digest(output)
    counts = dict.fromkeys(("kinds", "clear errors", "executed", "hung", "earlier output changed"), 0)
    for family, kind, make in all_kinds():
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        restore: Path | None = None
        if family in ("image", "label"):
            bad = sorted((folder / "ccnet_synthetic" / f"{family}s" / "train").iterdir())[3]
            restore = shutil.copy(bad, place / "good")
            arguments = ["--resume", "train.max_iter=40", f"train.output_dir={output}"]
        else:
            bad = shutil.copy(output / "model_final.pth", place / f"bad{family}")
            arguments = ["--eval-only", f"train.init_checkpoint={bad}", f"train.output_dir={output}"]
        make(Path(bad))
        start = time.monotonic()
        status = _run(arguments, log)
        seconds = time.monotonic() - start
        if restore is not None:
            shutil.rmtree(bad) if Path(bad).is_dir() and not Path(bad).is_symlink() else Path(bad).unlink(
                True
            )
            shutil.copy(restore, bad)
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        named = bool(errors) and (Path(bad).name in errors[-1] or "does not fit the model" in errors[-1])
        clear = status == 1 and named and len(errors) == 1
        ran = executed(Path(bad)).exists()
        changed = digest(output) != before
        counts["kinds"] += 1
        counts["clear errors"] += clear
        counts["executed"] += ran
        counts["hung"] += status is None
        counts["earlier output changed"] += changed
        verdict = "clear error" if clear else f"status {status}"
        flags = (" EXECUTED" if ran else "") + (" CHANGED" if changed else "")
        sentence = (
            (errors[-1] if errors else "no error: line").removeprefix("error: ").replace(str(folder), "…")
        )
        report(f"{family:6} {kind:36} {seconds:5.1f} s  {verdict}{flags}: {sentence[:150]}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETECTRON2_DATASETS"] = folder
        import ccnet_d2.engine.command_line  # noqa: F401  once, for all that are forked
        from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all

        generate_synthetic_dataset(
            Path(folder) / "ccnet_synthetic", SyntheticConfig(train_images=8, val_images=2)
        )
        register_all(folder)
        counts = try_all(Path(folder), lambda text: print(text, flush=True))
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    fine = counts["clear errors"] == counts["kinds"]
    return 0 if fine and not any(counts[n] for n in ("executed", "hung", "earlier output changed")) else 1


if __name__ == "__main__":
    sys.exit(main())
