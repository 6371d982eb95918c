"""Fetching one known file from a package index, against a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib
import os
import re
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import package_index
from pip_runner import InstallError

CONTENT = b"a wheel" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Index(http.server.ThreadingHTTPServer):
    """Serves ``pages`` (path to content), sends on to ``elsewhere`` and keeps the headers of what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, bytes] = {}
        self.elsewhere: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        content = self.server.pages.get(self.path)
        if self.path in self.server.elsewhere:
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere[self.path])
        else:
            self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    server = Index()
    # As pip's environment decides, nothing of this machine's configuration may come in.
    for name in (
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_CERT",
        "PIP_CONFIG_FILE",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc" / "xdg"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{server.address}/simple/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    server.pages["/simple/thing/"] = (
        b"<!DOCTYPE html><html><body>\n"
        b'<a href="../../files/thing-1.0-py3-none-any.whl#sha256=00" data-requires-python="&gt;=3">thing</a><br/>\n'
        b"<A data-x='1' HREF='../../files/thing-1%2E1.tar.gz'>thing</A>\ncaf\xe9</body></html>"
    )
    server.pages["/files/thing-1.0-py3-none-any.whl"] = CONTENT
    server.pages["/files/thing-1%2E1.tar.gz"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("filename", ["thing-1.0-py3-none-any.whl", "thing-1.1.tar.gz"])
def test_file_is_found_and_verified(index: Index, tmp_path: Path, filename: str) -> None:
    path = package_index.fetch_file("thing", filename, SHA256, tmp_path)
    assert path == tmp_path / filename
    assert path.read_bytes() == CONTENT


def test_other_content_is_refused(index: Index, tmp_path: Path) -> None:
    index.pages["/files/thing-1.0-py3-none-any.whl"] = CONTENT + b"!"
    with pytest.raises(InstallError, match=rf"has sha256 [0-9a-f]{{64}} instead of {SHA256}"):
        package_index.fetch_file("thing", "thing-1.0-py3-none-any.whl", SHA256, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_file_is_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(
        InstallError, match=r"thing-2\.0\.zip cannot be downloaded \([^;]*/simple has no thing-2\.0\.zip\)"
    ):
        package_index.fetch_file("thing", "thing-2.0.zip", SHA256, tmp_path)


def test_unreachable_index(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(InstallError, match=r"127\.0\.0\.1:1/simple cannot be read .*refused") as error:
        package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path)
    assert "\n" not in str(error.value)


def test_second_index(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.address}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://{index.address}/simple")
    assert package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path).is_file()


def test_credentials_go_to_the_index_only_and_into_no_message(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"http://localhost:{index.server_address[1]}/files/thing-1.0-py3-none-any.whl"
    index.pages["/simple/elsewhere/"] = f'<a href="{other}">thing</a>'.encode()
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@{index.address}/simple")
    package_index.fetch_file("elsewhere", "thing-1.0-py3-none-any.whl", SHA256, tmp_path)
    token = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert index.asked == [("/simple/elsewhere/", token), ("/files/thing-1.0-py3-none-any.whl", None)]
    # A file on the index's own host needs them.
    package_index.fetch_file("thing", "thing-1.0-py3-none-any.whl", SHA256, tmp_path)
    assert index.asked[2:] == [("/simple/thing/", token), ("/files/thing-1.0-py3-none-any.whl", token)]
    with pytest.raises(InstallError) as error:
        package_index.fetch_file("thing", "nothing", SHA256, tmp_path)
    assert "p%40ss" not in str(error.value) and "p@ss" not in str(error.value)


def test_credentials_do_not_follow_to_where_the_index_sends(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.elsewhere["/moved/thing/"] = f"http://localhost:{index.server_address[1]}/simple/thing/"
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{index.address}/moved")
    assert package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path).is_file()
    [first, *others] = index.asked
    assert first[1] is not None
    assert others == [("/simple/thing/", None), ("/files/thing-1%2E1.tar.gz", None)]


def test_credentials_are_not_sent_unencrypted_by_an_encrypted_page(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(url: str, _: ssl.SSLContext, credentials: str) -> tuple[bytes, str]:
        asked.append((url, credentials))
        return (CONTENT if url.endswith(".zip") else b'<a href="http://host/thing.zip">thing</a>'), url

    monkeypatch.setattr(package_index, "_read", read)
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@host/simple")
    assert package_index.fetch_file("thing", "thing.zip", SHA256, tmp_path).is_file()
    assert asked == [("https://host/simple/thing/", "me:secret"), ("http://host/thing.zip", "")]


def test_address_with_a_query(index: Index, tmp_path: Path) -> None:
    index.pages["/simple/asked/"] = b'<a href="/get/thing.zip?a=1&amp;b=2#sha256=00">thing</a>'
    index.pages["/get/thing.zip?a=1&b=2"] = CONTENT
    assert package_index.fetch_file("asked", "thing.zip", SHA256, tmp_path).read_bytes() == CONTENT


def test_a_file_without_an_end_is_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_index, "MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(InstallError, match="it sends more than 699 bytes"):
        package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path)


def test_certificates_given_are_the_only_ones(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = "-----END CERTIFICATE-----\n"
    all_of_pip = Path(importlib.import_module("pip._vendor.certifi").where()).read_text()
    (tmp_path / "one.pem").write_text(all_of_pip.partition(end)[0] + end)
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "one.pem"))
    context = package_index._ssl_context()
    assert len(context.get_ca_certs()) == 1 and context.verify_mode == ssl.CERT_REQUIRED
    urlopen, used = urllib.request.urlopen, []

    def note(request: urllib.request.Request, **keywords: Any) -> Any:
        used.append((keywords["context"].get_ca_certs(), keywords["timeout"]))
        return urlopen(request, **keywords)

    monkeypatch.setattr(urllib.request, "urlopen", note)
    package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path)
    assert used == [(context.get_ca_certs(), package_index.TIMEOUT_S)] * 2


def test_certificates_that_do_not_do_are_one_sentence(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> tuple[bytes, str]:
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]"))

    monkeypatch.setattr(package_index, "_read", read)
    with pytest.raises(
        InstallError, match="cannot be verified: apt install ca-certificates, or set PIP_CERT"
    ):
        package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path)
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "none.pem"))
    with pytest.raises(
        InstallError, match=r"^The certificates .*none\.pem \(PIP_CERT\) cannot be read: .*No such file"
    ):
        package_index.fetch_file("thing", "thing-1.1.tar.gz", SHA256, tmp_path)


def test_index_from_the_configuration_file(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "")  # which pip takes for unset
    file = tmp_path / "home" / "config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text(
        "[global]\nindex-url = https://global.example/simple\n[install]\nindex-url = https://mine.example/\n"
    )
    assert package_index.configured_indexes()[0] == "https://mine.example"
    last = tmp_path / "last.conf"
    last.write_text("[install]\nindex-url = https://last.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(last))
    assert package_index.configured_indexes()[0] == "https://last.example/simple"


@pytest.mark.parametrize("named", [None, "named.conf", "missing.conf", os.devnull])
def test_configuration_files_are_those_that_pip_reads(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """Every file names an index, and an option of its own, which tells that it is read."""
    own = {
        "etc/xdg/pip/pip.conf": "proxy",
        "home/.pip/pip.conf": "timeout",
        "home/config/pip/pip.conf": "retries",
        "named.conf": "cert",
    }
    for number, (name, option) in enumerate(own.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            f"[global]\nindex-url = https://{number}.example/simple\n{option} = {number}\n"
        )
    options = ("index-url", *own.values())
    for option in options:
        monkeypatch.delenv("PIP_" + option.upper().replace("-", "_"), raising=False)
    if named is not None:
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / named))
    # Of pip itself, in this environment.
    monkeypatch.setattr(sys, "prefix", sys.exec_prefix)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    wanted = dict(re.findall(r"^global\.(\S+)='(.*)'$", listed, flags=re.MULTILINE))
    assert ("proxy" in wanted) == (named != os.devnull)
    assert {option: package_index.pip_option(option) for option in options} == {
        option: wanted.get(option) for option in options
    }


def test_broken_configuration_file(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    broken = tmp_path / "broken.conf"
    broken.write_text("index-url = nowhere\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(broken))
    with pytest.raises(InstallError, match="pip's configuration cannot be read"):
        package_index.configured_indexes()


def test_unconfigured_index_is_the_one_pip_names(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    help_text = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert f"(default {package_index.configured_indexes()[0]})" in " ".join(help_text.split())


def test_without_pip_and_configuration(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    with pytest.raises(InstallError, match=r"no pip.*apt install python3-venv"):
        package_index.configured_indexes()
