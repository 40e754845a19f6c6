"""The documentation is right: every example in it runs, and nothing public is left out."""

import importlib.util
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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
#: Of what is public in several places the first name.
ONCE = {id(value): name for name, value in reversed(SYMBOLS.items())}.values()
CARDS = [pytest.param(card, id=f"{card.kind}-{card.name}") for card in ok.cards()]
ROOMS = {
    "optimizer": "optimizers",
    "transform": "optimizers.transforms",
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


@pytest.fixture(autouse=True)
def few_checks(request, monkeypatch):
    """Has pages that run all checks on a card run those of the rule alone, unless `--all` is given."""
    if not request.config.getoption("all"):
        every = ok.testing.checks_for
        suite = sys.modules[every.__module__]
        monkeypatch.setattr(suite, "checks_for", lambda card: [c for c in every(card) if not c.engine])


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_examples_of_page_run(page, tmp_path, monkeypatch):
    run(page.read_text(encoding="utf-8"), tmp_path, monkeypatch, ENVIRONMENTS.get(page.name))


@pytest.mark.parametrize("symbol", [s for s in ONCE if FENCE.search(inspect.getdoc(SYMBOLS[s]) or "")])
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
    assert getattr(hooks.modules()[ROOMS[card.kind]], card.name) is card.make
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
    guide = (ROOT / "docs" / "guide" / f"{ROOMS[card.kind].split('.')[-1]}.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{card.name}\b", guide)
    anchor = hooks.path(ROOMS[card.kind], card.name)
    assert f"[{card.name}](reference/{ROOMS[card.kind]}.md#{anchor})" in hooks.catalogue()
    assert f"::: {anchor}\n" in hooks.reference(ROOMS[card.kind])


@pytest.mark.parametrize("card", [pytest.param(card, id=card.name) for card in ok.cards("optimizer")])
def test_optimizer_has_a_page_with_all_parts_that_the_guide_links_to(card):
    page = hooks.optimizer_page(card)  # raises if a part is missing
    assert "\n**When to use it**: " in page
    assert "\n**When not to use it**: " in page
    assert FENCE.search(page)
    assert f"| `{next(iter(card.space))}` |" in page
    assert f"| {card.name} |" in page or "Not compared step by step: " in page
    assert re.search(r"^\| hidden/kernel \| \(64, 256\) \| \w+.* \| [\d,]+ \|", page, re.MULTILINE)
    guide = (ROOT / "docs" / "guide" / "optimizers.md").read_text(encoding="utf-8")
    assert f"[`{card.name}`](../optimizers/{card.name}.md)" in guide


def test_an_optimizer_that_does_not_say_when_to_use_it_has_no_page():
    class Silent(ok.optimizers.Adam):
        """Adam, without a word."""

    with pytest.raises(
        ValueError, match=r"The page of Silent lacks .*'When to use it', 'When not to use it', '```text'"
    ):
        hooks.optimizer_page(ok.Card(name="Silent", kind="optimizer", make=Silent))


def test_every_how_to_page_is_in_the_list_of_needs_and_has_an_example():
    pages = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "howto").glob("*.md")}
    index = pages.pop("index.md")
    assert set(pages) <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert [name for name, text in pages.items() if not FENCE.search(text)] == []


def test_readme_commands_are_one_line_each():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^<!-- command: (\w+) -->\n+```bash\n([^\n]+)\n```$", text, re.MULTILINE))
    assert list(commands) == ["quickstart", "test"]
    assert commands["quickstart"].endswith("examples/quickstart.py")
    assert commands["test"].endswith("-m pytest -n 2")
    assert all("-c constraints.txt" in command for command in commands.values())


def releases(name):
    """What a file of constraints pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_compatibility_page_says_which_versions_are_declared_and_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["jax"]]]
    declared = {w.name: w.specifier for w in wanted} | {"python": SpecifierSet(project["requires-python"])}
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for name in ("Python", "Keras", "TensorFlow", "JAX"):
        row = re.search(rf"^\| {name}\b.*$", page, re.MULTILINE).group()
        said = set(re.findall(r"\d+(?:\.\d+)*", row))
        assert {bound.version for bound in declared[name.lower()]} <= said
        for file in ("constraints.txt", "constraints-lowest.txt"):
            tested = releases(file).get(name.lower())
            assert tested is None or said & {tested, tested.rsplit(".", 1)[0]}, (name, file, row)


def test_private_modules_of_others_are_imported_in_one_file():
    """As the compatibility page says; `tests/test_private.py` is the canary."""
    private = re.compile(r"^ *(?:from|import) (?:keras\.src|keras_tuner\.src|tensorflow\.python|jax\._src)\b", re.M)
    files = {path.name for path in ROOT.glob("keras_optkit/**/*.py") if private.search(path.read_text("utf-8"))}
    assert files == {"private.py"}


def test_state_in_another_format_is_refused_with_both_formats():
    """As the compatibility page says."""
    optimizer, weight = ok.optimizers.Adam(0.1), keras.Variable(np.ones(3), name="w")
    optimizer.apply([keras.ops.ones(3)], [weight])
    state = {}
    optimizer.save_own_variables(state)
    schema = json.loads(state["schema"].tobytes())
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert f"| optimizer state | has a format number, now {schema['format']};" in page
    state["schema"] = np.frombuffer(json.dumps(schema | {"format": 1}).encode(), np.uint8)
    with pytest.raises(ValueError, match=f"has format 1; this version reads {schema['format']}"):
        optimizer.load_own_variables(state)
