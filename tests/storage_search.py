"""Processes that share a search, for `tests/test_tuning_storage.py`: started, killed, stopped, and looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np

import keras_optkit as ok

TRIALS, EPOCHS, LEASE = 4, 24, 4.0
PATIENCE = 400.0  # seconds


class Told(keras.callbacks.Callback):
    """Writes each epoch into a file, and takes its time."""

    stateless = True

    def __init__(self, path: str, rate: float) -> None:
        super().__init__()
        self.path, self.rate = path, rate

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{self.rate} {epoch}\n")
        time.sleep(0.5)


def build(hp):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(ok.optimizers.Adam(hp.rate), "binary_crossentropy")
    return model


def main(url: str, told: str) -> None:
    x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
    result = ok.tuning.search(
        build,
        {"rate": ok.tuning.Float(1e-3, 1e-1, log=True)},
        (x, (x[:, 0] > x[:, 1]).astype("float32")),
        objective="val_loss",
        max_trials=TRIALS,
        epochs=EPOCHS,
        callbacks=lambda values: [Told(told, values.rate)],
        seed=0,
        storage=url,
        lease=LEASE,
    )
    print("result", json.dumps([[t.number, dict(t.values), t.score, t.epochs, t.status] for t in result.trials]))
    print("best", result.best_model.get_weights()[0].tolist(), flush=True)


class Process:
    """One of them.

    Args:
        url: The storage.
        told: Where the epochs go.
    """

    def __init__(self, url: str | Path, told: Path) -> None:
        self._path = told.with_suffix(".out")
        command = [sys.executable, "-u", __file__, str(url), str(told)]
        with self._path.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        return self._path.read_text()

    def end(self) -> list[str]:
        """Waits for its end; returns the result."""
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said()
        return [line for line in self.said().splitlines() if line.startswith(("result", "best"))]


def wait_for(told: Path, epochs: int) -> None:
    """Waits until so many epochs are trained."""
    until = time.monotonic() + PATIENCE
    while not told.exists() or len(told.read_text().splitlines()) < epochs:
        assert time.monotonic() < until, f"{told} has less than {epochs} epochs"
        time.sleep(0.1)


def check_epochs(*told: Path) -> None:
    """No epoch is missing, and one trial only was trained by two processes, which had not to begin it again."""
    each = [path.read_text().split("\n")[:-1] if path.exists() else [] for path in told]
    assert set().union(*each) == {f"{rate} {epoch}" for rate in rates(each) for epoch in range(EPOCHS)}
    assert len(rates(each)) == TRIALS
    assert all(count == 1 for lines in each for count in Counter(lines).values())
    common = [rate for rate in rates(each) if all(any(line.startswith(rate) for line in lines) for lines in each)]
    assert len(common) == 1, common
    begun, continued = (sum(line.startswith(common[0]) for line in lines) for lines in each)
    assert begun + continued < 2 * EPOCHS
    assert continued < EPOCHS, "it was begun again"


def rates(each: list[list[str]]) -> list[str]:
    return sorted({line.split()[0] for lines in each for line in lines})


def kill(process: Process) -> None:
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
