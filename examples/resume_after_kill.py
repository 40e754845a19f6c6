"""A training that is killed, several times, and ends as if nothing had happened.

    python examples/resume_after_kill.py

Trains a small network on scikit-learn's digits in a process of its own, kills that with SIGKILL after some batches,
runs the same command again, and so on; then trains once more without a kill, and compares the two.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_optkit as ok


class Say(keras.callbacks.Callback):
    """Tells the other process of every batch."""

    stateless = True  # no state to keep

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        print("batch", flush=True)


def train(directory: Path, epochs: int) -> None:
    """What would be the script of a user; run again, it continues."""
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    images, labels = load_digits(return_X_y=True)
    x, y = images.reshape(-1, 8, 8, 1).astype("float32") / 16, labels
    layers = [
        keras.layers.RandomTranslation(0.1, 0.1),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=ok.optimizers.AdamW(2e-3, use_ema=True), loss=loss, metrics=["accuracy"])
    callbacks = [
        keras.callbacks.CSVLogger(directory / "log.csv"),
        ok.callbacks.Resume(directory / "resume", every=10),
        Say(),
    ]
    data = ok.data.Shuffled(x[:1500], y[:1500], batch_size=32, seed=7)
    model.fit(data, validation_data=(x[1500:], y[1500:]), epochs=epochs, callbacks=callbacks, verbose=0)
    np.save(directory / "end.npy", np.concatenate([weight.ravel() for weight in model.get_weights()]))


def run(directory: Path, epochs: int, kill_after: int | None) -> int:
    """Runs this file as a script in a process of its own; returns the number of batches that it trained on."""
    command = [sys.executable, __file__, "--directory", str(directory), "--epochs", str(epochs)]
    batches = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            batches += line == "batch\n"
            if batches == kill_after:
                process.send_signal(signal.SIGKILL)
                break
        error = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The training failed:\n{error}")
    return batches


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A run that is killed and resumes.")
    parser.add_argument("--kills", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of 47 batches (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="only train, with the bundles in this directory")
    given = parser.parse_args(argv)
    if given.directory is not None:
        train(given.directory, given.epochs)
        return
    console, draw = Console(), random.Random(1)
    table = Table("process", "batches", "ended by", title="One training")
    with tempfile.TemporaryDirectory() as name, console.status("training"):
        killed, alone = Path(name) / "killed", Path(name) / "alone"
        for directory in (killed, alone):
            directory.mkdir()
        for i in range(given.kills):
            batches = run(killed, given.epochs, draw.randint(5, 40))
            table.add_row(str(i + 1), str(batches), "SIGKILL")
        table.add_row(str(given.kills + 1), str(run(killed, given.epochs, None)), "its end")
        console.print(table)
        console.print(f"Without a kill it is {run(alone, given.epochs, None)} batches.")
        same = {file: (killed / file).read_bytes() == (alone / file).read_bytes() for file in ("end.npy", "log.csv")}
    console.print(f"The weights are the same, bitwise: {same['end.npy']}; the log of the epochs: {same['log.csv']}.")
    if not all(same.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
