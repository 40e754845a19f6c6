"""The main job of keras_optkit, end to end on real images, in a few minutes on two CPU cores.

Trains a five-layer CNN on scikit-learn's handwritten digits, first plainly, then with one technique of training after
the other; searches its learning rate, batch size and structure; and leaves TensorBoard logs and a picture.

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import keras
from five_layer_cnn import DIGITS, Row, build, compare, digits, draw, positive, steps, table
from rich.console import Console

import keras_optkit as ok


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each technique adds, on handwritten digits.")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=DIGITS.epochs, help="of every run (default: %(default)s)")
    parser.add_argument(
        "--logs", type=Path, default=Path("runs/quickstart"), help="TensorBoard's (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch: shows the course, not the accuracy")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, 1

    start = time.perf_counter()
    console = Console()
    recipe = dataclasses.replace(DIGITS, epochs=arguments.epochs)
    data = digits(seed=0)
    console.print(
        f"1,797 digits: {', '.join(f'{len(part[0]):,} for {name}' for name, part in data._asdict().items())}."
    )

    # 1. What each technique adds. Every seed has a split of its own, the same for all rows.
    results = compare(recipe, digits, range(arguments.seeds), arguments.logs, console)
    console.print(table(results, f"Test accuracy, mean and standard deviation over {arguments.seeds} seeds"))
    picture = arguments.logs / "curves.png"
    draw(results, picture)

    # 2. What a search over learning rate, batch size and network structure finds with all of it switched on.
    recipe = dataclasses.replace(recipe, epochs=-(-arguments.epochs // 4))
    space = ok.tuning.Space(
        learning_rate=ok.tuning.Float(1e-3, 1e-2, log=True),
        batch_size=ok.tuning.Choice([32, 64]),
        width=ok.tuning.Choice([16, 32]),
    )

    def tuned(hp: ok.tuning.Values) -> keras.Model:
        widths = (hp.width, 2 * hp.width, 2 * hp.width)
        trial = dataclasses.replace(recipe, peak_rate=hp.learning_rate, batch_size=hp.batch_size, widths=widths)
        return build(trial, Row.SCHEDULE, steps(trial, data))

    for strategy, trials, points in ("random", 4, None), ("grid", 8, 2):  # the grid has 2 values of each
        console.print(f"\n[bold]A {strategy} search, {recipe.epochs} epochs a trial")
        found = ok.tuning.search(
            tuned,
            space,
            (data.train, data.validation),
            strategy=strategy,
            max_trials=2 if arguments.quick else trials,
            points=points,
            epochs=recipe.epochs,
            seed=0,
            log_dir=arguments.logs / f"search-{strategy}",
            overwrite=True,
        )
        console.print(found)
        accuracy = found.best_model.evaluate(*data.test, verbose=0, return_dict=True)["accuracy"]
        console.print(f"The best of them has {accuracy:.2%} on the test set.")

    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Where to look next:")
    console.print(f"  tensorboard --logdir {arguments.logs}    curves of every run, and the searches under HPARAMS")
    console.print(f"  {picture}    validation accuracy of every row")
    console.print("  docs/guide/worked-example.md    what the table says")
    console.print("  examples/custom_loop.py, examples/fashion_mnist.py")


if __name__ == "__main__":
    main()
