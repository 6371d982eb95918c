"""The viewer's web server: Python's own, on this machine's loopback interface alone.

A page of another site that is open in the same browser can send requests to it too. It is kept out by the Host and
Origin headers, which such a page cannot forge.
"""

from __future__ import annotations

import json
import logging
import sys
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTP_PORT
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ccnet_d2.data.errors import SampleError
from ccnet_d2.errors import UserError

from .gallery import Gallery

__all__ = ["ViewerServer", "make_server"]

logger = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"
_LARGEST_UPLOAD = 64 * 2**20
_LONGEST_NUMBER = 20  # digits of a length; Python refuses to read thousands
_STATIC = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
_POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:"


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ViewerServer(ThreadingHTTPServer):
    """Serves one gallery; `url` is where."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, port: int) -> None:
        self.gallery = gallery
        super().__init__((_ADDRESS, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, except for a browser that went away, as it does when the page is loaded anew."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{_ADDRESS}:{self.server_port}/"


def make_server(gallery: Gallery, port: int = 0) -> ViewerServer:
    """A server that is bound to 127.0.0.1; call its `serve_forever`.

    Args:
        gallery: models and images.
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken, or not one that may be used.
    """
    try:
        return ViewerServer(gallery, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({getattr(error, 'strerror', None) or error}): choose another, or 0 for "
            "any that is free."
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    server_version = "ccnet_d2"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Callable[[str, dict[str, str]], tuple[bytes, str]]) -> None:
        try:
            self._check_origin()
            address = _parsed(self.path)
            body, kind = method(address.path, dict(urllib.parse.parse_qsl(address.query)))
            status = HTTPStatus.OK
        except _Refused as refusal:
            status, (body, kind) = refusal.status, _json({"error": str(refusal)})
        except (UserError, SampleError) as error:
            status, (body, kind) = HTTPStatus.BAD_REQUEST, _json({"error": str(error)})
        except (ConnectionError, TimeoutError):
            raise  # nobody is there to answer
        except Exception:
            # The thread of one request must not take the page's other requests with it.
            logger.exception("%s %s failed", self.command, self.path)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            body, kind = _json({"error": "the server met an error, which it printed."})
        if status != HTTPStatus.OK:
            self.close_connection = True
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_origin(self) -> None:
        port = self.server.server_port
        names = (_ADDRESS, "localhost")
        hosts = {f"{name}:{port}" for name in names}
        if port == HTTP_PORT:  # which browsers leave out
            hosts.update(names)
        if self.headers.get("Host") not in hosts:
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                f"the viewer answers to 127.0.0.1:{port} and localhost:{port} only; a tunnel needs port {port} at both "
                "ends.",
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "the viewer answers to its own page only.")

    def _get(self, path: str, query: dict[str, str]) -> tuple[bytes, str]:
        gallery = self.server.gallery
        if path in _STATIC:
            name, kind = _STATIC[path]
            return (Path(__file__).parent / name).read_bytes(), kind
        if path == "/api/gallery":
            return _json({**gallery.describe(), "most_bytes": _LARGEST_UPLOAD})
        if path == "/api/image":
            return gallery.picture(_number(query, "image")), "image/png"
        if path == "/api/prediction":
            return gallery.prediction(_number(query, "image"), _number(query, "model")), "image/png"
        if path == "/api/classes":
            return _json(gallery.classes(_number(query, "image"), _number(query, "model")))
        if path == "/api/attention":
            image, model, x, y = (_number(query, name) for name in ("image", "model", "x", "y"))
            loops = _number(query, "recurrence") if "recurrence" in query else None
            return _json(gallery.attention(image, model, x, y, loops))
        raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {path} here.")

    def _post(self, path: str, query: dict[str, str]) -> tuple[bytes, str]:
        if path != "/api/image":
            raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {path} here.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "an upload must say how long it is.")
        if len(length) > _LONGEST_NUMBER:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"no file is as long as a number of {len(length)} digits.")
        if int(length) > _LARGEST_UPLOAD:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the file is larger than {_LARGEST_UPLOAD // 2**20} MiB.",
            )
        return _json(self.server.gallery.upload(query.get("name", "image"), self.rfile.read(int(length))))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _parsed(address: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(address)
    except ValueError as error:  # brackets that hold no address of IPv6
        raise _Refused(HTTPStatus.BAD_REQUEST, f"the address cannot be read: {error}.") from error


def _json(content: Any) -> tuple[bytes, str]:
    return json.dumps(content).encode(), "application/json"


def _number(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UserError(f"{name} must be a number from 0, got '{text[:40]}'.")
    return int(text)
