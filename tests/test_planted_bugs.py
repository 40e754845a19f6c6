"""Every check is seen to fail on a bug by `python tests/planted_bugs.py`; here, only that its list is complete."""

from pathlib import Path

import planted_bugs
import pytest

import keras_optkit as ok
from keras_optkit.optimizers.rule import Hyper
from keras_optkit.registry import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_bug_is_planted_for_every_check(kind):
    assert planted_bugs.uncovered(kind) == set()


@pytest.mark.parametrize("each", planted_bugs.BUGS, ids=lambda each: f"{each.kind}: {each.what}")
def test_a_bug_is_planted_in_what_is_there_and_taken_out_again(each):
    assert [check.name for _, check in each.found()] == list(each.checks)
    places = [(owner, name) for owner, name, _ in each.patches]
    before = [vars(owner).get(name) for owner, name in places]
    with each.planted():
        assert all(vars(owner)[name] is not was for (owner, name), was in zip(places, before, strict=True))
    assert [vars(owner).get(name) for owner, name in places] == before


def test_the_documentation_shows_all_of_them():
    page = (Path(__file__).parent.parent / "docs" / "evidence" / "planted-bugs.md").read_text(encoding="utf-8")
    missing = [each.what for each in planted_bugs.BUGS if f"| {each.what} | {each.card} |" not in page]
    assert not missing, "write the tables of `python tests/planted_bugs.py` into docs/evidence/planted-bugs.md"


def test_what_is_not_caught_is_reported(capsys, monkeypatch):
    """A check that passes in spite of a bug, and one that fails without any."""
    harmless = planted_bugs.Bug("nothing", "SGD", ("bad_arguments",), ((Hyper, "step", lambda right: right),))
    monkeypatch.setattr(Hyper, "step", None, raising=False)
    monkeypatch.setattr(planted_bugs, "BUGS", [harmless])
    assert planted_bugs.main("nothing") == 1
    assert "! nothing: bad_arguments of SGD passes" in capsys.readouterr().out
    (card,) = [card for card in ok.cards("optimizer") if card.name == "SGD"]
    broken = planted_bugs.Check("broken", "optimizer", lambda _: 1 / 0, frozenset(), frozenset())
    assert planted_bugs.failure(card, broken) == "ZeroDivisionError: division by zero"
