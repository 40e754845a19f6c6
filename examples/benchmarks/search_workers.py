"""How much sooner a random search ends with several workers, and that its trials are the same.

    python examples/benchmarks/search_workers.py

A multilayer perceptron is trained on random data, at the same points with 1 worker, which is the process of the search,
and with 2. The time of a search includes that of starting its workers. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_optkit as ok
from keras_optkit.tuning import Float, Int, Result, Space, Values

SPACE = Space(learning_rate=Float(1e-4, 1e-1, log=True), units=Int(64, 512, log=True, step=2))


def build(hp: Values) -> keras.Model:
    """Three dense layers."""
    layers = [keras.layers.Dense(hp.units, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((32,)), *layers, keras.layers.Dense(1, "sigmoid")])
    model.compile(ok.optimizers.Adam(hp.learning_rate), "binary_crossentropy")
    return model


def searched(workers: int, trials: int, epochs: int, rows: int) -> tuple[Result, float]:
    """The result of a search, and its seconds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 32)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype("float32")
    began = time.perf_counter()
    result = ok.tuning.search(
        build,
        SPACE,
        (x, y),
        objective="val_loss",
        max_trials=trials,
        epochs=epochs,
        seed=0,
        workers=workers,
        verbose=0,
    )
    return result, time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The time of a search with several workers.")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: %(default)s)")
    parser.add_argument("--trials", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=20_000, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    table = Table("workers", "seconds", "of the first", "largest difference of a score")
    results = [searched(each, arguments.trials, arguments.epochs, arguments.rows) for each in arguments.workers]
    first, seconds = results[0]
    for workers, (result, took) in zip(arguments.workers, results, strict=True):
        pairs = list(zip(first.trials, result.trials, strict=True))
        assert all(one.values == other.values for one, other in pairs)
        difference = max(abs((one.score or 0.0) - (other.score or 0.0)) for one, other in pairs)
        table.add_row(str(workers), f"{took:.1f}", f"{took / seconds:.2f}", f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
