"""A local web page to click pixels and see where models look."""

from .gallery import Gallery, UploadError
from .server import ViewerServer, make_server

__all__ = ["Gallery", "UploadError", "ViewerServer", "make_server"]
