"""Which checks the package's own tests run on which cards, and the command that runs all."""

import pytest

import keras_optkit as ok
from keras_optkit.testing import __main__ as command
from keras_optkit.testing.conformance import Profile, checks_for, one_of_each_profile, profile


def run(*arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["testing", *arguments])
    code = command.main()
    return code, capsys.readouterr()


def pairs(decorated):
    return {(p.values[0].name, p.values[1].name) for p in decorated.args[1]}


def test_checks_of_the_engine_run_on_one_of_each_profile_and_the_others_on_all():
    ours, everything = pairs(ok.testing.conformance()), pairs(ok.testing.conformance(ok.cards()))
    for kind in ("optimizer", "transform"):
        found = ok.cards(kind)
        chosen = one_of_each_profile(found)
        profiles = [profile(card) for card in chosen]
        left_out = [profile(card) for card in found if card not in chosen]
        assert all(own in profiles or any(other.covers(own) for other in profiles) for own in left_out)
        assert len(set(profiles)) == len(profiles) < len(found)
        engine = {(card.name, c.name) for card in found for c in checks_for(card) if c.engine}
        left = {pair for pair in everything - ours if pair[0] in {card.name for card in found}}
        assert left == {pair for pair in engine if pair[0] not in {card.name for card in chosen}}
    assert ours <= everything


def test_the_one_of_a_profile_has_the_least_state():
    sgd, adam, rmsprop = (
        card for name in ("SGD", "Adam", "RMSprop") for card in ok.cards("optimizer") if card.name == name
    )
    assert one_of_each_profile([adam, rmsprop, sgd]) == [rmsprop, sgd]


def test_fewer_kinds_of_state_are_covered_and_none_at_all_is_not():
    sgd, momentum, both = Profile(("a",)), Profile(("a",), frozenset("c")), Profile(("a",), frozenset("cf"))
    assert both.covers(momentum)
    assert not any(one.covers(other) for one, other in ((both, sgd), (momentum, both), (both, both)))
    assert not Profile(("b",), frozenset("cf")).covers(momentum)


def test_the_command_runs_what_is_named(monkeypatch, capsys):
    code, said = run("Linear", "Cosine", "--check", "finite", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "1/2 schedule Cosine finite: passed" in said.out
    assert said.out.endswith("2 passed, 0 failed\n")


def test_the_command_tells_of_a_failure(monkeypatch, capsys):
    def fails(_):
        raise AssertionError("planted")

    (card,) = (card for card in ok.cards("schedule") if card.name == "Linear")
    broken = command.checks_for(card)[0].__class__("broken", "schedule", fails, frozenset(), frozenset())
    monkeypatch.setattr(command, "checks_for", lambda _: (broken,))
    code, said = run("Linear", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "broken: FAILED" in said.out
    assert "planted" in said.err


@pytest.mark.parametrize(("arguments", "message"), [(["Linea"], "unknown names"), (["--check", "x"], "no check")])
def test_the_command_refuses_what_it_does_not_know(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert message in capsys.readouterr().err
