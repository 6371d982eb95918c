"""The compiled criss-cross op (being written)."""

from torch import Tensor


def is_available() -> bool:
    return False


def unavailable_reason() -> str | None:
    return "the extension is not built."


def supports(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    return unavailable_reason()


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError(unavailable_reason())
