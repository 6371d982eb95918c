"""Fetch one known file from the package index that pip is configured for, without pip.

The set-up needs two files that pip cannot get: pip itself where the system has none, and the source archive
of Detectron2, which pip refuses for a dependency that it declares. Both are known by their sha256, so that it
does not matter which index they come from. Standard library only.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from pip_runner import InstallError

MAX_BYTES = 64 * 2**20
TIMEOUT_S = 60.0


def pip_option(name: str) -> str | None:
    """Return an option of ``pip install`` from the environment or from pip's configuration files.

    Args:
        name: the option as in pip's files, such as "index-url".
    """
    from_environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if from_environment:
        return from_environment
    parser = configparser.RawConfigParser()
    try:
        parser.read(_configuration_files(), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise InstallError(f"pip's configuration cannot be read: {str(error).splitlines()[0]}.") from error
    for section in ("install", "global"):
        if parser.has_option(section, name):
            return parser.get(section, name).strip() or None
    return None


def _configuration_files() -> list[Path]:
    """Return the places of pip's configuration files; later ones win."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    system = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [*(Path(folder, "pip", "pip.conf") for folder in system), Path("/etc/pip.conf")]
    if not (named and os.path.exists(named)):
        home = Path(os.path.expanduser("~"))
        config_home = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        files += [home / ".pip" / "pip.conf", config_home / "pip" / "pip.conf"]
    files.append(Path(sys.prefix, "pip.conf"))
    return [*files, Path(named)] if named else files


def configured_indexes() -> list[str]:
    """Return the package indexes pip asks, the main one first.

    Raises:
        InstallError: none is configured, and there is no pip to know its default.
    """
    indexes = [pip_option("index-url") or _default_index(), *(pip_option("extra-index-url") or "").split()]
    return [index.rstrip("/") for index in indexes]


def _default_index() -> str:
    """Return the index that pip asks unless told otherwise, as pip itself knows it."""
    try:
        return str(importlib.import_module("pip._internal.models.index").PyPI.simple_url)
    except (ImportError, AttributeError):
        raise InstallError(
            "This Python has no pip, and no package index is configured: apt install python3-venv,"
            " or set PIP_INDEX_URL, and run the command again."
        ) from None


def without_credentials(url: str) -> str:
    """Return the URL without user name and password, for messages and for the request line."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def find_link(page: str, page_url: str, filename: str) -> str | None:
    """Return the address of a file on an index page (HTML, PEP 503), None if it is not there."""
    for href in re.findall(r"""<a\b[^>]*?\bhref=["']([^"']+)["']""", page, flags=re.IGNORECASE):
        url = urllib.parse.urljoin(page_url, href.replace("&amp;", "&"))
        path = urllib.parse.urlsplit(url).path
        if urllib.parse.unquote(path.rpartition("/")[2]) == filename:
            return urllib.parse.urldefrag(url).url
    return None


def _ssl_context() -> ssl.SSLContext:
    """Return the certificates to trust: those pip is told to, else the system's and the ones pip brings."""
    certificates = pip_option("cert")
    try:
        context = ssl.create_default_context(cafile=certificates)
    except OSError as error:
        raise InstallError(f"The certificates {certificates} (PIP_CERT) cannot be read: {error}.") from error
    if certificates is None and importlib.util.find_spec("pip") is not None:
        # A bare system may have no certificates at all.
        with contextlib.suppress(ImportError, OSError):
            context.load_verify_locations(importlib.import_module("pip._vendor.certifi").where())
    return context


def _read(url: str, context: ssl.SSLContext, credentials: str) -> tuple[bytes, str]:
    """Read a URL; returns the content and the URL it came from after redirections."""
    request = urllib.request.Request(
        url, headers={"Accept": "text/html, */*;q=0.1", "User-Agent": "ccnet_d2"}
    )
    if credentials:
        token = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as response:
        content: bytes = response.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it sends more than {MAX_BYTES} bytes")
        return content, response.url


def fetch_file(project: str, filename: str, sha256: str, directory: Path) -> Path:
    """Download a file of a project from the package index and check its sha256.

    Args:
        project: normalized name of the project on the index.
        filename: the file wanted.
        sha256: its hash.
        directory: where it goes, under the same name.

    Returns:
        The file, whole and verified.

    Raises:
        InstallError: no index can be reached, none has the file, or it is another one.
    """
    context = _ssl_context()
    failures = []
    for index in configured_indexes():
        host = urllib.parse.urlsplit(index).netloc
        credentials = host.rpartition("@")[0]
        place = without_credentials(index)
        try:
            page, page_url = _read(f"{place}/{project}/", context, credentials)
            link = find_link(page.decode("utf-8", errors="replace"), page_url, filename)
            if link is None:
                failures.append(f"{place} has no {filename}")
                continue
            # The same host without encryption is another place.
            same_origin = urllib.parse.urlsplit(link)[:2] == urllib.parse.urlsplit(place)[:2]
            content, _ = _read(link, context, credentials if same_origin else "")
        except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLCertVerificationError):
                reason = "its certificate cannot be verified: apt install ca-certificates, or set PIP_CERT"
            failures.append(f"{place} cannot be read ({reason})")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            failures.append(f"{filename} of {place} has sha256 {found} instead of {sha256}")
            continue
        path = directory / filename
        path.write_bytes(content)
        return path
    raise InstallError(
        f"{filename} cannot be downloaded ({'; '.join(failures)}): check the network, or the index that pip"
        " is configured for, and run the command again."
    )
