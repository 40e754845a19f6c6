"""The worked example at full size: what each technique of training adds on Fashion-MNIST's 60,000 images.

The same five-layer CNN and the same rows as in `quickstart.py`. Decisions are made on 5,000 images split off the
training set; the test set is used once for each row, after training. Nothing is downloaded: the four files must be in
DIR. On Debian and Ubuntu, `apt install dataset-fashion-mnist` puts them there:

    python examples/fashion_mnist.py --data /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from five_layer_cnn import Data, Recipe, Row, build, compare, draw, one_hot, positive, split, steps, table
from rich.console import Console

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

FASHION = Recipe(
    image_shape=(28, 28, 1),
    widths=(32, 96, 192),
    windows=(3, 3, 3),
    pools=(True, True, True),  # 28x28 becomes 14x14, 7x7 and 3x3
    pool_padding="valid",
    # a mirrored shirt is a shirt
    augmentation=lambda: [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomTranslation(2 / 28, 2 / 28, fill_mode="constant", interpolation="nearest"),
    ],
    batch_size=128,
    epochs=18,
    l2=5e-5,
    dropout=0.4,
    label_smoothing=0.1,
)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8, rank, the sizes as big-endian int32, the numbers.

    Raises:
        ValueError: If there is no such file, or it is not a whole gzipped IDX file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Debian's package dataset-fashion-mnist has it.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {content[:4]!r}.")
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(f"{path} ends within the sizes of its {rank} axes.")
    shape = struct.unpack(f">{rank}i", content[4:start])
    numbers = np.frombuffer(content[start:], np.uint8)
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{path} should hold an array of shape {shape}, but has {len(numbers)} numbers.")
    return numbers.reshape(shape)


def load(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] of shape (n, 28, 28, 1) and labels of the part "train" or "test".

    Raises:
        ValueError: If a file is missing or is not what it should be.
    """
    images, labels = (read_idx(directory / name) for name in FILES[part])
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise ValueError(
            f"{' and '.join(FILES[part])} in {directory} should be images of 28x28 and as many labels from 0 to 9, "
            f"but have the shapes {images.shape} and {labels.shape}."
        )
    return images[..., np.newaxis].astype("float32") / 255, labels.astype("int32")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each technique adds, on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where the four *-ubyte.gz files are")
    parser.add_argument("--epochs", type=positive, default=FASHION.epochs, help="of every row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training (default: %(default)s)")
    parser.add_argument(
        "--logs", type=Path, default=Path("runs/fashion_mnist"), help="TensorBoard's (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        (x, y), (x_test, y_test) = load(arguments.data, "train"), load(arguments.data, "test")
    except ValueError as error:
        parser.error(str(error))

    console = Console()
    recipe = dataclasses.replace(FASHION, epochs=arguments.epochs)
    data = Data(*split(x, y, 1 / 12, arguments.seed), (x_test, one_hot(y_test)))
    console.print(f"{', '.join(f'{len(part[0]):,} for {name}' for name, part in data._asdict().items())}.")
    parameters = build(recipe, Row.SCHEDULE, steps(recipe, data)).count_params()
    console.print(f"{parameters:,} parameters.")
    assert parameters < 1_000_000

    results = compare(recipe, lambda _: data, [arguments.seed], arguments.logs, console)
    console.print(table(results, f"Fashion-MNIST, test accuracy after {recipe.epochs} epochs, seed {arguments.seed}"))
    draw(results, arguments.logs / "curves.png")
    console.print(f"Curves: {arguments.logs / 'curves.png'}; tensorboard --logdir {arguments.logs}")


if __name__ == "__main__":
    main()
