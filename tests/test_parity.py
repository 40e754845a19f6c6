"""Each optimizer against its reference: a share here, all of it by `python -m keras_optkit.testing.parity`."""

import sys
from pathlib import Path

import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.testing.parity import compare, process, reference, runs
from keras_optkit.testing.parity.__main__ import main
from keras_optkit.testing.parity.everything import REFERENCES

#: The optimizers that are compared here, which have references of six packages; all of these are needed for the tests.
SHARE = {"AdamW", "Ftrl", "Lion", "Muon", "Prodigy", "SOAP", "ScheduleFreeAdamW"}


def comparisons():
    """All of them, of which the share is the last in float64, with decay, of one reference of each of `SHARE`."""
    known = set()
    for each in REFERENCES:
        found = list(compare.comparisons(each))
        last = ([c for c in found if c.dtype == "float64"] or found)[-1]
        first = each.optimizer in SHARE - known
        known.add(each.optimizer)
        for comparison in found:
            marks = [] if first and comparison is last else [pytest.mark.long]
            yield pytest.param(comparison, marks=marks, id=f"{each.implementation}-{comparison}".replace("::", ":"))


@pytest.mark.parametrize("comparison", list(comparisons()))
def test_equals_its_reference(comparison, request):
    steps = compare.STEPS if request.config.getoption("all") else 30
    assert comparison.error(steps) < comparison.tolerance


def test_a_wrong_optimizer_is_found():
    wrong = reference.Reference("Adam", "torch.optim:Adam", {"lr": "learning_rate", "betas": ("beta_2", "beta_1")})
    assert compare.Comparison(wrong, {"learning_rate": 0.01}, 0.0, "float64").error(3) > 1e-3


def test_every_optimizer_has_a_reference_or_says_why_not():
    named = {each.optimizer for each in REFERENCES}
    missing = {card.name for card in ok.cards("optimizer")} - named
    assert {name for name in missing if not _card(name).parity.startswith("none: ")} == set()


def _card(name):
    return next(card for card in ok.cards("optimizer") if card.name == name)


def test_what_fails_in_the_other_process_is_raised_here():
    with pytest.raises(RuntimeError, match=r"usual failed(.|\n)*No module named 'nowhere'"):
        process.elsewhere(runs.usual, "nowhere:Class", {}, [np.ones(2)], [], "float64")


@pytest.mark.long
def test_a_process_of_the_references_that_ends_is_replaced():
    process._process().kill()
    with pytest.raises(RuntimeError, match="ended with -9"):
        process.elsewhere(runs.usual, "torch.optim:SGD", {"lr": 0.1}, [np.ones(2)], [], "float64")
    assert process.elsewhere(runs.usual, "torch.optim:SGD", {"lr": 0.1}, [np.ones(2)], [], "float64") == ([], None)


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [("Adamm", 2, "unknown names ['Adamm']; allowed: ADOPT, "), ("--help", 0, "--markdown FILE")],
)
def test_the_command_says_what_is_allowed(argument, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity", argument])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert said in "".join(capsys.readouterr())


@pytest.mark.long
def test_the_command_prints_a_table_and_writes_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["parity", "AdaBelief", "--markdown", str(tmp_path / "parity.md")])
    assert main() == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    head, _, line = [line for line in (tmp_path / "parity.md").read_text().splitlines() if line.startswith("|")]
    assert head.startswith("| optimizer | reference | steps |")
    assert line.startswith("| AdaBelief | optax.adabelief 0.")


def test_the_page_has_every_reference():
    page = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ")]
    listed = [
        (name.lstrip("| "), theirs.rpartition(" ")[0]) for name, theirs in rows if theirs not in ("reference", "---")
    ]
    assert listed == [(each.optimizer, each.implementation.replace(":", ".")) for each in REFERENCES]
