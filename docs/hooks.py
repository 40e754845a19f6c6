"""MkDocs hook: the pages that state facts about the code are written from the code, so that they cannot go stale.

`reference/<module>.md` documents every public name of a module; `catalogue.md` has a row for every registered card.
The build stops at a public name without a docstring. README.md, CONTRIBUTING.md and CHANGELOG.md are pages too.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_optkit as ok
from keras_optkit.registry import KINDS, Card

if TYPE_CHECKING:  # the tests read this file too, and need no MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
BORROWED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def modules() -> dict[str, ModuleType]:
    """The public modules, `ok.optimizers` and those inside them, by name; "" is the package itself."""

    def inside(name: str, module: ModuleType) -> dict[str, ModuleType]:
        values = {f"{name}.{inner}".lstrip("."): getattr(module, inner) for inner in getattr(module, "__all__", ())}
        found = {inner: value for inner, value in values.items() if inspect.ismodule(value)}
        deeper = [inside(inner, value) for inner, value in found.items()]
        return found | {inner: value for each in deeper for inner, value in each.items()}

    return {"": ok} | inside("", ok)


def symbols() -> Iterator[tuple[str, str, Any]]:
    """(module, name, object) for everything public; modules and dunders are not listed."""
    for module_name, module in modules().items():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not inspect.ismodule(value) and not name.startswith("__"):
                yield module_name, name, value


def path(module: str, name: str) -> str:
    """Dotted path of a public name, as users write it."""
    return ".".join(part for part in (ok.__name__, module, name) if part)


def page(module: str) -> str:
    """The reference page of a module."""
    return f"reference/{module or 'package'}.md"


def summary(value: Any) -> str:
    """First paragraph of a docstring on one line, or an empty string. Inherited docstrings do not count."""
    return " ".join((inspect.cleandoc(value.__doc__ or "").split("\n\n")[0]).split())


def _directive(module: str, name: str, value: Any) -> str:
    public = path(module, name)
    if public not in sys.modules:
        return f"::: {public}"
    # a file has the same name: mkdocstrings must be given the place of the definition
    return f"::: {value.__module__}.{name}\n    options:\n      heading: {public}\n      toc_label: {name}"


def reference(module: str) -> str:
    """One mkdocstrings directive for every public name of a module."""
    lines = [f"# {path(module, '').rstrip('.')}", "", summary(modules()[module]), ""]
    for owner, name, value in symbols():
        if owner != module:
            continue
        if callable(value) and not summary(value):
            raise ValueError(f"{path(module, name)} is public and has no docstring.")
        lines += [_directive(module, name, value), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text).replace("|", "\\|") or "-"


def _row(card: Card) -> str:
    homes = [module for module, name, value in symbols() if value is card.make]
    name = f"[{card.name}]({page(homes[0])}#{path(homes[0], card.name)})" if homes else card.name
    space = "; ".join(f"`{key}`: `{value}`" for key, value in card.space.items())
    return f"| {name} | {_cell(summary(card.make))} | {_cell(card.paper)} | {_cell(card.parity)} | {_cell(space)} |"


def catalogue() -> str:
    """A table of every card, by kind."""
    lines = [
        *("---", "hide: [toc]", "---"),
        "# Catalogue",
        "",
        "Everything that is registered, written from the registry when these pages are built; an entry of the registry "
        "is called a card. *Parity* is the independent implementation that the tests compare with; *space* is the "
        "default search space, used by `ok.tuning`. The same facts are in `ok.cards()`.",
    ]
    for kind in KINDS:
        rows = [_row(card) for card in ok.cards(kind)]
        if rows:
            header = ["| name | summary | source | parity | space |", "|---|---|---|---|---|"]
            lines += ["", f"## {kind.capitalize()}s", "", *header, *rows]
    return "\n".join(lines) + "\n"


def borrowed(name: str) -> str:
    """A page of the repository's top level, its links made relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for uri, source in BORROWED.items():
        text = text.replace(f"]({source}", f"]({uri}")
    return text


def pages() -> dict[str, str]:
    """Path to Markdown of every page that is not a file in docs/."""
    written = {page(module): reference(module) for module in modules()} | {"catalogue.md": catalogue()}
    return written | {uri: borrowed(name) for uri, name in BORROWED.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those found in docs/."""
    from mkdocs.structure.files import File

    for uri, content in pages().items():
        files.append(File.generated(config, uri, content=content))
    return files
