"""One update of the optimizers that look at whole parameters, beside AdamW: time and state, on either backend.

    python examples/benchmarks/structured_optimizers.py
    KERAS_BACKEND=jax python examples/benchmarks/structured_optimizers.py --width 768 --depth 12

What is updated are the kernels and vectors of a transformer of `--depth` blocks: per block four matrices of
`width x width`, one of `width x 4 width` and one back, their biases and four vectors of a normalisation; float32, with
gradients that are normal and stay the same. Each alternative is compiled (TensorFlow: a graph in which the optimizer
chooses; JAX: `jax.jit` with donated buffers) and called once before it is timed. In every round each is timed once, in
turn, over as many updates as make `--sample-seconds`; given are the median over the rounds and that of the ratio to
Keras's own AdamW in the same round. SOAP's time is the mean over its cycles, QR included.
"""

from __future__ import annotations

import argparse
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

FREQUENCY = 10


def model_of(width: int, depth: int) -> keras.Model:
    """Its layers alone; nothing is called."""
    blocks = []
    for _ in range(depth):
        for inputs, outputs in ((width, width),) * 4 + ((width, 4 * width), (4 * width, width)):
            layer = layers.Dense(outputs)
            layer.build((None, inputs))
            blocks.append(layer)
        for _ in range(2):
            norm = layers.LayerNormalization()
            norm.build((None, width))
            blocks.append(norm)
    head = layers.Dense(8)
    head.build((None, width))
    return keras.Sequential([*blocks, head])


def alternatives() -> dict[str, Callable[[], Any]]:
    """Each with weight decay."""
    return {
        "Keras AdamW": lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.01),
        "AdamW": lambda: ok.optimizers.AdamW(1e-3, weight_decay=0.01),
        "LAMB": lambda: ok.optimizers.LAMB(1e-3, weight_decay=0.01),
        "Adafactor": lambda: ok.optimizers.Adafactor(1e-3, weight_decay=0.01),
        "Prodigy": lambda: ok.optimizers.Prodigy(weight_decay=0.01),
        "Muon": lambda: ok.optimizers.Muon(1e-3),
        "SOAP": lambda: ok.optimizers.SOAP(1e-3, precondition_frequency=FREQUENCY),
    }


def updater(make: Callable[[], Any], width: int, depth: int) -> tuple[Callable[[int], None], Any, float]:
    """A function that makes so many updates and waits for them, the optimizer, and the seconds of the first call."""
    model = model_of(width, depth)
    optimizer, weights = make(), model.trainable_variables
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
    run(FREQUENCY)
    return run, optimizer, first


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
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sample-seconds", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", help="names of the alternatives besides Keras's")
    given = parser.parse_args(arguments)
    chosen = {
        name: make for name, make in alternatives().items() if not given.only or name in ("Keras AdamW", *given.only)
    }
    made = {name: updater(make, given.width, given.depth) for name, make in chosen.items()}
    size = sum(int(np.prod(v.shape)) for v in model_of(given.width, given.depth).trainable_variables)
    print(f"{keras.config.backend()}, {size:,} elements, {given.depth} blocks of width {given.width}", flush=True)
    counts = {}
    for name, (run, _, _) in made.items():
        start = time.perf_counter()
        run(FREQUENCY)
        each = (time.perf_counter() - start) / FREQUENCY
        counts[name] = FREQUENCY * max(1, round(given.sample_seconds / each / FREQUENCY))
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(given.repeats):
        for name, (run, _, _) in made.items():
            start = time.perf_counter()
            run(counts[name])
            times[name].append(1e3 * (time.perf_counter() - start) / counts[name])
    print("| optimizer | ms an update | ratio | first call, s | state, bytes an element |")
    print("|---|---|---|---|---|")
    for name, (_, optimizer, first) in made.items():
        ratios = [a / b for a, b in zip(times[name], times["Keras AdamW"], strict=True)]
        held = sum(4 * int(np.prod(v.shape)) for v in optimizer.variables) / size
        print(
            f"| {name} | {statistics.median(times[name]):.3g} | {statistics.median(ratios):.2f} | {first:.1f} | "
            f"{held:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
