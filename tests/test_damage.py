"""Damaged directories: a share of what `python tests/damage.py` does."""

import damage
import pytest


@pytest.mark.parametrize("subject", damage.SUBJECTS)
def test_nothing_damaged_is_used_in_silence(tmp_path, subject):
    tally = damage.try_out(damage.SUBJECTS[subject](), {"resume": 16}.get(subject, 40), 10, tmp_path)
    assert not tally.bad, "\n".join(tally.bad)
    assert {"refused", "earlier, with a warning", "nothing lost"} <= set(tally.outcomes)
