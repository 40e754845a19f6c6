"""The documentation is right: every example in it runs, and nothing public is left out."""

import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import keras_optkit as ok

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
#: Pages whose examples need an environment that is read when a process starts.
ENVIRONMENTS = {
    "distribution.md": {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
}
FENCE = re.compile(r"^(?P<indent> *)```python\b[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()
SYMBOLS = {hooks.path(module, name): value for module, name, value in hooks.symbols()}
CARDS = [pytest.param(card, id=f"{card.kind}-{card.name}") for card in ok.cards()]
ROOMS = {
    "optimizer": "optimizers",
    "schedule": "schedules",
    "initializer": "initializers",
    "regularizer": "regularizers",
    "layer": "layers",
    "callback": "callbacks",
}


def script(text):
    """The python blocks of a text as one script; every line keeps its number, so that tracebacks point at the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start("code"))
        code = textwrap.dedent(block["code"]).split("\n")
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def run(text, tmp_path, monkeypatch, environment=None):
    """Runs the blocks from top to bottom in one namespace, in an empty directory; where it needs one, in a process."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "blocks.py"  # a file, since AutoGraph reads the source of what it compiles
    file.write_text(script(text), encoding="utf-8")
    if environment:
        paths = {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error::UserWarning", str(file)]
        done = subprocess.run(
            command, env=os.environ | paths | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_examples_of_page_run(page, tmp_path, monkeypatch):
    run(page.read_text(encoding="utf-8"), tmp_path, monkeypatch, ENVIRONMENTS.get(page.name))


@pytest.mark.parametrize("symbol", [s for s, value in SYMBOLS.items() if FENCE.search(inspect.getdoc(value) or "")])
def test_examples_of_docstring_run(symbol, tmp_path, monkeypatch):
    run(inspect.getdoc(SYMBOLS[symbol]), tmp_path, monkeypatch)


def test_blocks_share_one_namespace_and_keep_their_line_numbers(tmp_path, monkeypatch):
    first = "# Page\n\n```python\na = 1\n```\n\n```text\nb = \n```\n\n"
    second = "1. item\n\n    ```python\n    assert a == 1\n    1 / 0\n    ```\n"
    with pytest.raises(ZeroDivisionError) as error:
        run(first + second, tmp_path, monkeypatch)
    assert error.traceback[-1].lineno + 1 == (first + second).splitlines().index("    1 / 0") + 1


def test_examples_leave_nothing_outside_of_pytest_s_directory(temporary_files, tmp_path, monkeypatch):
    """Neither by themselves nor in processes that they start."""
    code = """
import pathlib, subprocess, sys, tempfile
ask = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
pathlib.Path("seen").write_text(tempfile.mkdtemp() + "\\n" + subprocess.check_output(ask, text=True))
"""
    run(f"```python{code}```\n", tmp_path, monkeypatch)
    made, elsewhere = map(Path, (tmp_path / "seen").read_text().splitlines())
    assert made.parent == elsewhere == Path(temporary_files)
    assert tmp_path.parent in elsewhere.parents


@pytest.mark.parametrize("module", hooks.modules())
def test_every_module_says_what_is_public(module):
    names = hooks.modules()[module].__all__
    assert len(set(names)) == len(names)
    assert hooks.summary(hooks.modules()[module]).endswith(".")


@pytest.mark.parametrize("symbol", [s for s, value in SYMBOLS.items() if callable(value)])
def test_public_name_has_a_summary(symbol):
    first = hooks.summary(SYMBOLS[symbol])
    assert re.search(r"\w.*[.:]$", first), f"{symbol} needs a docstring that begins with a sentence, has {first!r}"


@pytest.mark.parametrize("card", CARDS)
def test_card_is_public_and_has_an_example(card):
    assert getattr(getattr(ok, ROOMS[card.kind]), card.name) is card.make
    assert re.search(r"^Example:\n+ *```python", inspect.cleandoc(card.make.__doc__), re.MULTILINE)


@pytest.mark.parametrize("card", CARDS)
def test_card_documents_its_own_arguments(card):
    text = inspect.cleandoc(card.make.__doc__)
    own = [p for p in inspect.signature(card.make.__init__).parameters.values() if p.name != "self"]
    named = [p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in named if not re.search(rf"^ +\*?{name}(,| \(|:)", text, re.MULTILINE)]
    assert not missing, f"{card.name} does not say what {missing} are"


@pytest.mark.parametrize("card", CARDS)
def test_card_is_in_the_guide_and_in_the_catalogue(card):
    guide = (ROOT / "docs" / "guide" / f"{ROOMS[card.kind]}.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{card.name}\b", guide)
    anchor = hooks.path(ROOMS[card.kind], card.name)
    assert f"[{card.name}](reference/{ROOMS[card.kind]}.md#{anchor})" in hooks.catalogue()
    assert f"::: {anchor}\n" in hooks.reference(ROOMS[card.kind])


def test_readme_commands_are_one_line_each():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^<!-- command: (\w+) -->\n+```bash\n([^\n]+)\n```$", text, re.MULTILINE))
    assert list(commands) == ["quickstart", "test"]
    assert commands["quickstart"].endswith("examples/quickstart.py")
    assert commands["test"].endswith("-m pytest -n 2")
    assert all("-c constraints.txt" in command for command in commands.values())
