"""The devices that there are to run on."""

from __future__ import annotations

import torch

from ccnet_d2.errors import UserError

__all__ = ["available_device", "parse_devices"]


def available_device(device: str | torch.device, asked: str = "device '{}' was asked for") -> torch.device:
    """A device, once it is known to be there.

    Args:
        device: a name, such as "cuda:0".
        asked: begins the error; `{}` stands for the device.

    Raises:
        UserError: it is not, or it is none.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:  # the latter for what is no text
        raise UserError(f"'{device}' is no device: take 'cpu', 'cuda' or 'cuda:N'.") from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{asked.format(device)}, but torch sees no GPU: take 'cpu'.")
        count = torch.cuda.device_count()
        if found.index is not None and found.index >= count:
            raise UserError(f"{asked.format(device)}, but torch sees {count} GPUs, counted from 0.")
    elif found.type != "cpu":
        try:
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError, ImportError) as error:  # of a kind that torch was not built for
            raise UserError(
                f"{asked.format(device)}, but torch has none here: take 'cpu' or 'cuda'."
            ) from error
    return found


def parse_devices(text: str) -> list[torch.device]:
    """Devices to share work among.

    Args:
        text: names and commas, such as "cuda:0,cuda:1" or "cpu,cpu" (two processes on the CPU), or "all" for every
            GPU.

    Raises:
        UserError: one of them is not there, or a GPU is named twice.
    """
    if text.strip() == "all":
        count = torch.cuda.device_count()
        if not count:
            raise UserError(
                "'all' means every GPU, but torch sees none: on CPUs give a process each, such as cpu,cpu."
            )
        return [torch.device("cuda", index) for index in range(count)]
    devices = [available_device(name.strip()) for name in text.split(",")]
    gpus = [str(device) for device in devices if device.type != "cpu"]
    for name in gpus:
        if gpus.count(name) > 1:
            raise UserError(f"device '{name}' is named twice in '{text}': one process uses a GPU whole.")
    return devices
