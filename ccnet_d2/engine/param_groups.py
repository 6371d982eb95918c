"""Parameter groups of an optimizer."""

from torch.optim import Optimizer


def merge_param_groups(optimizer: Optimizer) -> None:
    """Put parameters of the same learning rate, weight decay and so on into one group, in their order.

    Detectron2 0.5 makes a group for each parameter. An optimizer updates a group in a few calls of the GPU, so that a
    ResNet of hundreds of groups keeps the processor busy for milliseconds each step.

    Args:
        optimizer: one that has made no step yet.

    Raises:
        ValueError: it has state, which belongs to its groups as they are.
    """
    if optimizer.state:
        raise ValueError("the groups of an optimizer that has made steps cannot be merged.")
    merged: list[dict] = []
    for group in optimizer.param_groups:
        settings = _settings(group)
        same = next((other for other in merged if _settings(other) == settings), None)
        if same is None:
            merged.append({**group, "params": list(group["params"])})
        else:
            same["params"] += group["params"]
    optimizer.param_groups[:] = merged


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}
