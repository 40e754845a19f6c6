"""What the tests cost in processor time, which says more than seconds on a machine that does other things, too.

    PYTHONPATH=tests python -m pytest -n 2 -p costs   # replaces build/costs-*.tsv
    python tests/costs.py [NUMBER]                    # prints the cost of files, and of the costliest functions

The time of processes that a test starts is its own, once they have ended.
"""

import os
import re
import resource
import sys
from collections import Counter
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


def _spent():
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        BUILD.mkdir(exist_ok=True)
        for old in BUILD.glob("costs-*.tsv"):
            old.unlink()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = _spent()
    result = yield
    with (BUILD / f"costs-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.tsv").open("a") as file:
        file.write(f"{_spent() - before:.2f}\t{item.nodeid}\n")
    return result


def function(test):
    """The name of a test without its parameters; of the conformance suite, the check on all cards of a kind."""
    return re.sub(r"\[(\w+)-.*-(\w+)\]$", r" \1 \2", test) if "conformance[" in test else test.split("[")[0]


def main(number=40):
    files, functions, counts = Counter(), Counter(), Counter()
    for path in BUILD.glob("costs-*.tsv"):
        for line in path.read_text().splitlines():
            seconds, test = line.split("\t")
            for counter, key in ((files, test.split("::")[0]), (functions, function(test))):
                counter[key] += float(seconds)
                counts[key] += 1
    print(f"{files.total():8.1f} {sum(counts[key] for key in files):5} tests")
    for key, seconds in [*files.most_common(), *functions.most_common(number)]:
        print(f"{seconds:8.1f} {counts[key]:5} {key}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
