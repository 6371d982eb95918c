"""What a conversion did with every weight."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

_CLASSIFIERS = ("sem_seg_head.classifier.", "sem_seg_head.auxiliary.2.")


@dataclass(frozen=True)
class Conversion:
    """Weights under this package's names, and an account of every name on both sides.

    Attributes:
        layout: the source's layout, a key of `LAYOUTS`.
        network: what the weights are, in words.
        weights: tensors by name.
        sources: for each name in `weights` the names it was made of.
        unused: names of the source that were left out, and why.
        missing: names that the model has and the source does not.
        changes: what was computed, beyond renaming.
        hint: what the source's code computes that no weight tells.
    """

    layout: str
    network: str
    weights: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    unused: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    hint: str = ""

    def without_classifier(self) -> "Conversion":
        """The same without the last layer of each head, to train on other classes from."""
        dropped = [name for name in self.weights if name.startswith(_CLASSIFIERS)]
        unused = {source: "left out as asked" for name in dropped for source in self.sources[name]}
        return replace(
            self,
            weights={name: value for name, value in self.weights.items() if name not in dropped},
            sources={name: names for name, names in self.sources.items() if name not in dropped},
            unused=self.unused | unused,
            missing=(*self.missing, *dropped),
        )

    def text(self, *, every_name: bool = False) -> str:
        """The account, a line for each kind; with `every_name` a line for each weight as well."""
        used = {name for names in self.sources.values() for name in names}
        lines = [
            f"{self.network} ({self.layout} layout)",
            f"  mapped   {len(used)} of {len(used) + len(self.unused)} tensors, to {len(self.weights)} here",
        ]
        if every_name:
            lines += [f"           {' + '.join(self.sources[name])} -> {name}" for name in self.weights]
        for reason in dict.fromkeys(self.unused.values()):
            names = [name for name, why in self.unused.items() if why == reason]
            lines.append(f"  unused   {_names(names, every_name)} ({reason})")
        lines.append(f"  missing  {_names(self.missing, every_name) or 'none'}")
        lines += [f"  changed  {change}" for change in self.changes]
        if self.hint:
            lines.append(f"  note     {self.hint}")
        return "\n".join(lines)


def _names(names: Iterable[str], every_name: bool) -> str:
    names = list(names)
    if every_name or len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
