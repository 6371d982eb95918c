#!/usr/bin/env python
"""Write the API reference, made of the docstrings: a page for each package with what it exports."""

import argparse
import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import ccnet_d2
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.errors import UserError
from ccnet_d2.script_exit import exit_with

_DEFAULT = Path("output/api")


def packages() -> list[str]:
    """The package and the packages below it, without the configs."""
    found = [
        module.name
        for module in walk_packages(ccnet_d2.__path__, "ccnet_d2.")
        if module.ispkg and ".configs" not in module.name
    ]
    return ["ccnet_d2", *found]


def build(output: Path) -> list[Path]:
    """Write the pages into a folder; returns them.

    Raises:
        UserError: pdoc is not installed, or an exported name does not exist.
    """
    try:
        import pdoc
    except ImportError as error:
        raise UserError(
            "The API reference is made by pdoc, which is not installed: pip install pdoc."
        ) from error
    for name in packages():
        package = import_module(name)
        for exported in getattr(package, "__all__", ()):
            # What is imported on first use is not there before.
            setattr(package, exported, getattr(package, exported))
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"ccnet_d2 {ccnet_d2.__version__}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch|detectron2|fvcore|iopath")
        reached = pdoc.extract.walk_specs(["ccnet_d2"])
        rest = [name for name in packages() if name not in reached]
        pdoc.pdoc("ccnet_d2", *rest, output_directory=output)
    pages = sorted(output.rglob("*.html"))
    for page in pages:
        # Detectron2's role for the titles of papers, which pdoc does not know.
        text = re.sub(r":paper:<code>(.*?)</code>", r"<cite>\1</cite>", page.read_text(encoding="utf-8"))
        page.write_text(_without_dead_links(text), encoding="utf-8")
    return pages


def _without_dead_links(page: str) -> str:
    """pdoc links every name of a class, also those that it gives no entry, such as inherited ones without a text."""
    entries = set(re.findall(r' id="([^"]+)"', page))
    return re.sub(
        r'<a href="#([^"]+)">(.*?)</a>', lambda link: link[0] if link[1] in entries else link[2], page
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run build_api_docs.py; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=_DEFAULT,
        metavar="DIR",
        help=f"folder for the pages; default: {_DEFAULT}",
    )
    args = parser.parse_args(argv)
    with one_sentence_errors() as status:
        pages = build(args.output)
        print(f"{len(pages)} pages written to {args.output}: open {args.output / 'index.html'}")
    return status.code


if __name__ == "__main__":
    exit_with(main)
