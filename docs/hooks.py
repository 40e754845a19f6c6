"""MkDocs hook: the pages that state facts about the code are written from the code, so that they cannot go stale.

`reference/<module>.md` documents every public name of a module; `catalogue.md` has a row for every registered card, and
`optimizers/<name>.md` is the page of an optimizer. The build stops at a public name without a docstring, and at an
optimizer that does not say when to use it. README.md, CONTRIBUTING.md and CHANGELOG.md are pages too.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

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


# -- the page of an optimizer -----------------------------------------------------------------------------------------

#: The parts that every page has; a page without one stops the build.
PARTS = ("When to use it", "When not to use it", "```text", "## Arguments", "## Parity", "## State", "## Example")


def optimizer_page(card: Card) -> str:
    """The page of an optimizer: its docstring and card, what its state takes, and what it was compared with.

    Raises:
        ValueError: If a part is missing.
    """
    text = inspect.cleandoc(card.make.__doc__ or "")
    body, _, rest = text.partition("\nArgs:\n")
    body = re.sub(r"^(When (?:not )?to use it)(?=:)", r"**\1**", body, flags=re.MULTILINE)
    example = rest.partition("\nExample:\n")[2]
    lines = [
        *(f"# {card.name}", "", body, ""),
        f"*Source*: {_cell(card.paper)}. All methods and keywords: [{path('optimizers', card.name)}]"
        f"(../{page('optimizers')}#{path('optimizers', card.name)}). Others: [optimizers](../guide/optimizers.md).",
        *("", "## Arguments", "", *_arguments(card)),
        *("", "## Parity", "", *_parity(card)),
        *("", "## State", "", *_state(card)),
        *("", "## Example", "", example),
    ]
    written = "\n".join(lines)
    missing = [part for part in PARTS if part not in written]
    if missing:
        raise ValueError(f"The page of {card.name} lacks {missing}: write it into the docstring or the card.")
    return written


def _arguments(card: Card) -> list[str]:
    """The arguments of its own, with their defaults and the ranges that a search draws from."""
    own = [p for p in inspect.signature(card.make.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    rows = [f"| `{p.name}` | `{p.default!r}` | {_range(card.space.get(p.name))} |" for p in own if p.name != "self"]
    common = [
        f"| `{name}` | common to all | {_range(card.space[name])} |"
        for name in card.space
        if name not in {p.name for p in own}
    ]
    return ["| argument | default | search space |", "|---|---|---|", *rows, *sorted(common)]


def _range(values: Any) -> str:
    return "-" if values is None else f"`{values}`"


def _parity(card: Card) -> list[str]:
    """The rows of the page of parity; without any, why there are none."""
    table = [line for line in (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [line for line in table if line.startswith(f"| {card.name} |")]
    explained = "Largest relative differences after any of the steps; see [parity](../parity.md)."
    return (
        [*table[:2], *rows, "", explained]
        if rows
        else [f"Not compared step by step: {card.parity.removeprefix('none: ')}."]
    )


@functools.cache
def _example_model() -> keras.Model:
    """A model with one parameter of each kind, which nothing trains."""
    sizes = [keras.layers.Embedding(1000, 64, name="embedding"), keras.layers.Dense(256, name="hidden")]
    return keras.Sequential([keras.Input((8,)), *sizes, keras.layers.Dense(10, name="output")])


def _state(card: Card) -> list[str]:
    """What its state takes for each parameter of a small model, with its defaults."""
    rows = card.make().explain(_example_model()).rows
    sizes = {row.path: 4 * math.prod(row.shape) for row in rows}
    return [
        "Of a small model in float32, with the defaults:",
        *("", "| parameter | shape | rule | bytes of state | times the parameter |", "|---|---|---|---|---|"),
        *(
            f"| {row.path} | {row.shape} | {row.rule} | {row.state_bytes:,} | {row.state_bytes / sizes[row.path]:.3g} |"
            for row in rows
        ),
    ]


def borrowed(name: str) -> str:
    """A page of the repository's top level, its links made relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for uri, source in BORROWED.items():
        text = text.replace(f"]({source}", f"]({uri}")
    return text


def pages() -> dict[str, str]:
    """Path to Markdown of every page that is not a file in docs/."""
    written = {page(module): reference(module) for module in modules()} | {"catalogue.md": catalogue()}
    written |= {f"optimizers/{card.name}.md": optimizer_page(card) for card in ok.cards("optimizer")}
    return written | {uri: borrowed(name) for uri, name in BORROWED.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those found in docs/."""
    from mkdocs.structure.files import File

    for uri, content in pages().items():
        files.append(File.generated(config, uri, content=content))
    return files
