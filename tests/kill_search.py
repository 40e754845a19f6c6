"""Searches whose processes are killed, run again, killed again, and compared with one that was left alone.

`tests/test_tuning_workers.py` runs one; the long form is

    python tests/kill_search.py --runs 5 --kills 4

What is killed: the search, with SIGKILL or as Ctrl-C does; or a worker, with SIGKILL. At each end of the search it is
seen that no worker is left, and that no trial was started that had ended before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRIALS, WORKERS = 6, 2

SEARCH = """
import json, sys
import keras, numpy as np
import keras_optkit as ok

x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
y = (x[:, 0] > x[:, 1]).astype("float32")

def build(hp):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(ok.optimizers.Adam(hp.rate), "binary_crossentropy")
    return model

result = ok.tuning.search(
    build, {{"rate": ok.tuning.Float(1e-3, 1e-1, log=True)}}, (x, y), objective="val_loss", max_trials={trials},
    epochs=6, seed=0, directory=sys.argv[1], workers={workers}, pruner={pruner!r}, cv={cv},
)
print("result", json.dumps([[t.number, dict(t.values), t.score, t.epochs, t.status] for t in result.trials]))
print("best", result.best_model.get_weights()[0].tolist())
"""


class Search:
    """One process of a search, and what it says."""

    def __init__(self, directory: Path, pruner: str | None, cv: int | None = None) -> None:
        code = SEARCH.format(trials=TRIALS, workers=WORKERS, pruner=pruner, cv=cv)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, str(directory)],
            stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []

    def read(self, count: int | None = None) -> bool:
        """Reads some lines, or all that are left; whether there were so many."""
        assert self.process.stdout is not None
        for number, line in enumerate(self.process.stdout, 1):
            self.lines.append(line.rstrip())
            if number == count:
                return True
        return False

    def workers(self) -> list[int]:
        """The processes of its workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if any(b"keras_optkit.tuning.worker" in word for word in words) and str(self.process.pid).encode() in words:
                found.append(int(path.parent.name))
        return found

    def end(self) -> str:
        """Waits for its end, and for that of its workers; returns what it has said about errors."""
        self.read()
        self.process.wait()
        until = time.monotonic() + 10
        while self.workers():
            assert time.monotonic() < until, "workers are left behind"
            time.sleep(0.05)
        assert self.process.stdout is not None
        self.process.stdout.close()
        with self.errors as file:
            file.seek(0)
            return file.read()


def killed(
    directory: Path, pruner: str | None, kinds: list[str], rng: random.Random, cv: int | None = None
) -> list[str]:
    """Runs a search to its end with kills of these kinds; returns its last lines."""
    ended: set[str] = set()
    search = Search(directory, pruner, cv)
    for kind in kinds:
        if not search.read(rng.randint(1, 2 + WORKERS)) or search.lines[-1].startswith(("result", "best")):
            break  # it has come to its end before
        time.sleep(rng.uniform(0, 4))
        workers = search.workers()
        if kind == "worker" and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        elif kind != "worker":
            search.process.send_signal(signal.SIGKILL if kind == "search" else signal.SIGINT)
            errors = search.end()
            if any(line.startswith("best") for line in search.lines):
                break
            assert kind == "search" or errors.rstrip().endswith("Run the script again to continue it."), errors
            check(search.lines, ended)
            search = Search(directory, pruner, cv)
    errors = search.end()
    assert any(line.startswith("best") for line in search.lines), errors
    check(search.lines, ended)
    return search.lines[-2:]


def check(lines: list[str], ended: set[str]) -> None:
    """Raises if a trial was started that had ended; adds those that have ended now."""
    for line in lines:
        if started := re.match(r"\[\d+/\d+\] trial (\d+)", line):
            assert started[1] not in ended, f"trial {started[1]} was run twice"
        over = re.match(r"    trial (\d+): ", line)
        if over and ", paused after" not in line:
            ended.add(over[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills searches.")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pruner", choices=["hyperband"], default=None)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        whole = killed(Path(directory) / "whole", arguments.pruner, [], rng)
        assert len(json.loads(whole[0].removeprefix("result "))) == TRIALS
        for run in range(arguments.runs):
            kinds = [rng.choice(["worker", "search", "Ctrl-C"]) for _ in range(arguments.kills)]
            lines = killed(Path(directory) / str(run), arguments.pruner, kinds, rng)
            assert lines == whole, (kinds, lines, whole)
            print(f"run {run}: the same table and model after {', '.join(kinds)}", flush=True)


if __name__ == "__main__":
    main()
