"""How many epochs a search needs, replayed on recorded learning curves.

    python examples/benchmarks/search.py record --minutes 60    # resumes where it was stopped
    python examples/benchmarks/search.py compare                # replays searches on what is recorded

Method:

- Task. A network of two convolutions for scikit-learn's handwritten digits: 300 images to train with, so that
  hyperparameters matter, and 1,000 others to validate with. See `search_task.py`.
- Recorded. Random points of a space of ten hyperparameters, each trained once for 27 epochs, with the accuracy and the
  loss of validation after every epoch. A point and its random numbers depend on its number alone. Each finished point
  is one line of a JSON Lines file, written at once; `record` ends with the table of all, compressed, which `compare`
  reads.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from search_table import EPOCHS, append, finished, points_of, write

HERE = Path(__file__).parent


def record(given: argparse.Namespace) -> None:
    """Trains the points that are not in the file yet, and writes the table."""
    from search_task import Trainer, one_core

    one_core()
    began, trainer = time.monotonic(), Trainer()
    done = finished(given.lines)
    for number, point in enumerate(points_of(given.points)):
        if number in done:
            continue
        if time.monotonic() - began >= 60 * given.minutes:
            break
        started = time.perf_counter()
        curves = trainer.train(point, number, EPOCHS)
        done[number] = {"number": number, "point": point, **curves}
        append(given.lines, done[number] | {"seconds": round(time.perf_counter() - started, 2)})
        if number % 50 == 0:
            print(f"{len(done)} of {given.points} points are recorded.", file=sys.stderr, flush=True)
    write(given.table, done)
    print(f"{len(done)} of {given.points} points are in {given.table}.", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How many epochs a search needs.")
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("--table", type=Path, default=HERE / "search_curves.npz", metavar="FILE")
    lines = HERE.parents[1] / "build" / "search_curves.jsonl"
    parser.add_argument("--lines", type=Path, default=lines, metavar="FILE", help="where `record` writes each point")
    parser.add_argument("--points", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop recording after so many minutes")
    given = parser.parse_args(argv)
    if given.what == "record":
        record(given)


if __name__ == "__main__":
    main()
