"""Search a small network for handwritten digits and write the report, that of the guide.

Takes about a minute on two CPU cores.

    python examples/search_report.py --report runs/search_report.html
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from five_layer_cnn import digits, positive

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, Int, Space, Values

SPACE = Space(
    learning_rate=Float(1e-4, 10.0, log=True),
    optimizer=Choice(["SGD", "Adam"]),
    momentum=Float(0.5, 0.99, log="reverse", when={"optimizer": "SGD"}),
    layers=Int(1, 3),
    units=Int(8, 64, log=True, step=2),
)


def build(hp: Values) -> keras.Model:
    """A network of dense layers; one with a rate of more than 3 is refused, so that the report has a failure."""
    if hp.learning_rate > 3:
        raise ValueError("the learning rate is too high")
    hidden = [keras.layers.Dense(hp.units, "relu") for _ in range(hp.layers)]
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])
    if hp.optimizer == "SGD":
        optimizer = ok.optimizers.SGD(hp.learning_rate, momentum=hp.momentum)
    else:
        optimizer = ok.optimizers.Adam(hp.learning_rate)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The report of a search.")
    parser.add_argument("--trials", type=positive, default=24, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=6, help="(default: %(default)s)")
    parser.add_argument("--report", type=Path, default=Path("runs/search_report.html"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)

    data = digits(seed=0)
    result = ok.tuning.search(
        build,
        SPACE,
        (*data.train, *data.validation),
        max_trials=arguments.trials,
        epochs=arguments.epochs,
        batch_size=64,
        seed=0,
    )
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    result.report(arguments.report, title="Digits")
    print(f"Report: {arguments.report}")


if __name__ == "__main__":
    main()
