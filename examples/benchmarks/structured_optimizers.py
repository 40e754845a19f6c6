"""One update of each optimizer beside AdamW: time and state, on either backend.

    python examples/benchmarks/structured_optimizers.py --only LAMB Adafactor Prodigy Muon SOAP
    python examples/benchmarks/structured_optimizers.py --model resnet50 --only all
    python examples/benchmarks/structured_optimizers.py --model vector --only elementwise
    python examples/benchmarks/structured_optimizers.py --model bert --layers 2 --only "Keras Muon" Muon
    KERAS_BACKEND=jax python examples/benchmarks/structured_optimizers.py --width 768 --layers 12

What is updated are the weights of a model, float32, with gradients that are normal and stay the same:

- `blocks`: the kernels and vectors of a transformer of `--layers` blocks: per block four matrices of `width x width`,
  one of `width x 4 width` and one back, their biases and four vectors of a normalisation.
- `bert`: those of BERT-base: three embeddings, `--layers` of its 12 blocks, and the pooler. As in its first
  implementation, the kernels of attention are matrices of 768 x 768, so that Keras's Muon takes them, too.
- `resnet50`: those of `keras.applications.ResNet50`; nothing is downloaded.
- `vector`: one vector of four million elements.

Each optimizer has its defaults and a weight decay of 0.01, is compiled (TensorFlow: a graph in which the optimizer
chooses; JAX: `jax.jit` with donated buffers) and called `--warm-up` times before it is timed. Then it and `--yardstick`
are timed in turns, over as many updates as make `--sample-seconds`, but at least ten, so that what is done in every
tenth update (QR, inverse roots) is in the mean. Given are the median of the rounds and that of the ratio to the
yardstick in the same round. One optimizer is in memory at a time, beside the yardstick.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_optkit as ok
from keras_optkit.testing.memory import bytes_of

FREQUENCY = 10


def elementwise() -> list[str]:
    """Those that look at elements, and at sums of them at most, and that a gradient is enough for."""
    traits = {card.name: ok.testing.traits(card) for card in ok.cards("optimizer")}
    return [name for name, has in traits.items() if not has & {"whole", "second_gradient", "hessian_vector"}]


GROUPS = {"all": lambda: [card.name for card in ok.cards("optimizer")], "elementwise": elementwise}


def model_of(name: str, width: int, depth: int) -> keras.Model:
    """Its layers alone; nothing is called."""
    if name == "resnet50":
        return keras.applications.ResNet50(weights=None)
    if name == "vector":
        scale = layers.LayerNormalization(center=False)
        scale.build((None, 4_000_000))
        return keras.Sequential([scale])
    blocks: list[keras.Layer] = []
    if name == "bert":
        width = 768
        for rows in (30522, 512, 2):
            table = layers.Embedding(rows, width)
            table.build()
            blocks.append(table)
    for _ in range(depth):
        for inputs, outputs in ((width, width),) * 4 + ((width, 4 * width), (4 * width, width)):
            layer = layers.Dense(outputs)
            layer.build((None, inputs))
            blocks.append(layer)
        for _ in range(2):
            norm = layers.LayerNormalization()
            norm.build((None, width))
            blocks.append(norm)
    head = layers.Dense(width if name == "bert" else 8)
    head.build((None, width))
    return keras.Sequential([*blocks, head])


def make(name: str) -> Any:
    """An optimizer with weight decay: one of ours, or `"Keras ..."`."""
    owner, _, its = name.rpartition(" ")
    given = {"weight_decay": 0.01}
    if not owner:
        takes = inspect.signature(getattr(ok.optimizers, its)).parameters
        given |= {"precondition_frequency": FREQUENCY} if "precondition_frequency" in takes else {}
        return getattr(ok.optimizers, its)(**given)
    return getattr(keras.optimizers, its)(**given)


def updater(optimizer: Any, model: keras.Model, warm_up: int) -> tuple[Callable[[int], None], float]:
    """A function that makes so many updates and waits for them, and the seconds of the first call."""
    weights = model.trainable_variables
    rng = np.random.default_rng(0)
    grads = [keras.ops.convert_to_tensor(1e-2 * rng.normal(size=v.shape), "float32") for v in weights]
    if isinstance(optimizer, ok.optimizers.Optimizer):
        optimizer.build(model)
    else:
        optimizer.build(weights)
    if keras.config.backend() == "jax":
        run = _on_jax(optimizer, weights, grads)
    else:
        import tensorflow as tf

        step = tf.function(lambda: optimizer.apply(grads, weights), autograph=False)

        def run(count: int) -> None:
            for _ in range(count):
                step()
            weights[0].numpy()

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    run(warm_up)
    return run, first


def _on_jax(optimizer: Any, weights: list[Any], grads: list[Any]) -> Callable[[int], None]:
    import jax

    def pure(values: Any, state: Any) -> Any:
        return optimizer.stateless_apply(state, grads, values)

    compiled = jax.jit(pure, donate_argnums=(0, 1))
    # copies, since the buffers are given away
    held = [jax.numpy.array(w.value) for w in weights], [jax.numpy.array(v.value) for v in optimizer.variables]

    def run(count: int) -> None:
        nonlocal held
        for _ in range(count):
            held = compiled(*held)
        jax.block_until_ready(held)

    return run


def main(arguments: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("blocks", "bert", "resnet50", "vector"), default="blocks")
    parser.add_argument("--width", type=int, default=256, help="of `blocks`")
    parser.add_argument("--layers", type=int, default=4, help="of `blocks` and `bert`")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sample-seconds", type=float, default=0.5)
    parser.add_argument("--least", type=int, default=FREQUENCY, help="updates in a sample")
    parser.add_argument("--warm-up", type=int, default=FREQUENCY, help="updates before")
    parser.add_argument("--yardstick", default="AdamW")
    parser.add_argument(
        "--only", nargs="*", default=["LAMB", "Adafactor", "Prodigy", "Muon", "SOAP"], help="or a group"
    )
    given = parser.parse_args(arguments)
    names = GROUPS[given.only[0]]() if given.only[0] in GROUPS else given.only
    model = model_of(given.model, given.width, given.layers)
    size = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(f"{keras.config.backend()}, {given.model}, {size:,} elements, beside {given.yardstick}", flush=True)
    print("| optimizer | ms an update | ratio | first call, s | state, bytes an element |")
    print("|---|---|---|---|---|")
    yardstick = make(given.yardstick)
    known, first = updater(yardstick, model, given.warm_up)
    show(given.yardstick, [timed(known, given.least)], [1.0], first, yardstick, size)
    for name in names:
        optimizer = make(name)
        of_its_own = model_of(given.model, given.width, given.layers)
        run, first = updater(optimizer, of_its_own, given.warm_up)
        samples = given.sample_seconds / given.least
        counts = {each: given.least * max(1, round(samples / timed(each, given.least))) for each in (known, run)}
        times = [[timed(each, count) for each, count in counts.items()] for _ in range(given.repeats)]
        show(name, [b for _, b in times], [b / a for a, b in times], first, optimizer, size)


def timed(run: Callable[[int], None], count: int) -> float:
    """Seconds for each of so many updates."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def show(name: str, times: list[float], ratios: list[float], first: float, optimizer: Any, size: int) -> None:
    """Prints a row."""
    held = bytes_of(optimizer.variables)
    ms, ratio = 1e3 * statistics.median(times), statistics.median(ratios)
    print(f"| {name} | {ms:.3g} | {ratio:.2f} | {first:.1f} | {held / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
