"""Getting a published file: from a local folder, from a mirror or from its own address."""

import hashlib
import logging
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from ccnet_d2.atomic_file import disk_full_reported
from ccnet_d2.errors import UserError

from .published import Published

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_LARGEST = 4 << 30  # far more than any file of weights here
_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip archive of torch, and its older pickles


def local_or_downloaded(entry: Published, folder: Path) -> tuple[Path, bool]:
    """The file of published weights, checked.

    CCNET_D2_ZOO, if set, is the only place asked: a folder, or the address of a mirror (https://…), with the files
    under their own names.

    Args:
        entry: what to get.
        folder: where to put a downloaded file, which exists.

    Returns:
        The file, and whether it was downloaded (and so may be deleted).

    Raises:
        UserError: there is no such file, it cannot be read or downloaded, or it is another one than was published.
    """
    place = os.environ.get("CCNET_D2_ZOO", "")
    if place and "://" not in place:
        path = Path(os.path.expanduser(place)) / entry.file
        try:
            if not path.is_file():
                raise UserError(
                    f"CCNET_D2_ZOO={place} has no {entry.file}: download it there from {entry.address}, or unset "
                    "CCNET_D2_ZOO."
                )
            _check(entry, path, _sha256_of(path), f"delete it and download it again from {entry.address}")
        except OSError as error:
            raise UserError(
                f"{path}, in the folder that CCNET_D2_ZOO names, cannot be read: {error.strerror or error}."
            ) from error
        return path, False
    address = f"{place.rstrip('/')}/{quote(entry.file)}" if place else entry.address
    return _download(entry, address, folder), True


def _download(entry: Published, address: str, folder: Path) -> Path:
    path = folder / entry.file
    part = folder / f".{entry.file}.part"
    logging.getLogger(__name__).info("Downloading %s", address)
    try:
        with disk_full_reported(folder, lambda: "make room, or set CCNET_D2_CACHE to a folder that has it"):
            digest = _read_to(address, part, entry.file)
        _check(entry, part, digest, "it was not kept; try again, or get it elsewhere and see CCNET_D2_ZOO")
        os.replace(part, path)
    except UserError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{entry.file} cannot be downloaded from {address} ({reason}): connect to the network, or put the file "
            "into a folder and set CCNET_D2_ZOO to it."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _read_to(address: str, path: Path, title: str) -> str:
    """Download into a file under a progress bar; returns the SHA-256."""
    request = urllib.request.Request(address, headers={"User-Agent": "ccnet_d2"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, path.open("wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        done = 0
        # No bar where there is no terminal.
        with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None) as bar:
            while chunk := response.read(_CHUNK):
                done += len(chunk)
                if done > _LARGEST:
                    raise OSError(f"it is larger than {_LARGEST >> 30} GiB")
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if total is not None and done != total:
            raise OSError(f"the connection broke after {done} of {total} bytes")
    return digest.hexdigest()


def _check(entry: Published, path: Path, digest: str, what_to_do: str) -> None:
    with path.open("rb") as file:
        head = file.read(8)
    if not head.startswith(_MAGIC):
        raise UserError(
            f"What came as {entry.file} is no checkpoint of torch (it may be a page that asks something): download it "
            f"by hand from {entry.address} into a folder and set CCNET_D2_ZOO to it."
        )
    if not digest.startswith(entry.sha256):
        raise UserError(
            f"{entry.file} is not the file that was published: its SHA-256 begins with "
            f"{digest[: len(entry.sha256)]} instead of {entry.sha256}; {what_to_do}."
        )


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
