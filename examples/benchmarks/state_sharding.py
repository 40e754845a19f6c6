"""How many bytes of optimizer state each device holds under `keras.distribution`, with `shard_state` and without.

    KERAS_BACKEND=jax python examples/benchmarks/state_sharding.py

An MLP of about a million parameters is trained for a few steps on virtual devices of the CPU: on one of them, with data
parallelism on all, and with model parallelism on two groups, whose kernels are split. What is counted are the bytes of
the shards that JAX really holds on a device, of the one that has most. The largest difference of a weight is
from the same optimizer on one device. How long a step takes is not shown, since virtual devices share the processor.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import keras
import numpy as np
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel, list_devices, set_distribution
from rich.console import Console
from rich.table import Table

import keras_optkit as ok

DEVICES, INPUTS, CLASSES, BATCH = 8, 256, 10, 64


def network(width: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    sizes = (2 * width, width, width)
    hidden = [keras.layers.Dense(size, "relu", name=f"hidden_{i}") for i, size in enumerate(sizes)]
    return keras.Sequential([keras.Input((INPUTS,)), *hidden, keras.layers.Dense(CLASSES, name="logits")])


def model_parallel() -> ModelParallel:
    """Hidden kernels are split by columns over half as many devices; batches are split in two."""
    layouts = LayoutMap(DeviceMesh((2, DEVICES // 2), ("batch", "model"), list_devices()))
    layouts[".*hidden.*/kernel"] = (None, "model")
    return ModelParallel(layout_map=layouts, batch_dim_name="batch")


#: A distribution, and an optimizer.
ALTERNATIVES: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], keras.optimizers.Optimizer]]] = {
    ("one device", "keras"): (lambda: None, lambda: keras.optimizers.AdamW()),
    ("one device", "ours"): (lambda: None, lambda: ok.optimizers.AdamW()),
    ("DataParallel", "keras"): (DataParallel, lambda: keras.optimizers.AdamW()),
    ("DataParallel", "ours"): (DataParallel, lambda: ok.optimizers.AdamW()),
    ("DataParallel", "ours, shard_state"): (DataParallel, lambda: ok.optimizers.AdamW(shard_state=True)),
    ("ModelParallel", "keras"): (model_parallel, lambda: keras.optimizers.AdamW()),
    ("ModelParallel", "ours"): (model_parallel, lambda: ok.optimizers.AdamW()),
    ("ModelParallel", "ours, shard_state"): (model_parallel, lambda: ok.optimizers.AdamW(shard_state=True)),
}


def on_fullest_device(variables: Sequence[keras.Variable]) -> int:
    """The bytes of variables on the device that holds most of them."""
    held: Counter[Any] = Counter()
    for variable in variables:
        for shard in variable.value.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def trained(
    distribution: Callable[[], Any], optimizer: Callable[[], keras.optimizers.Optimizer], width: int, steps: int
) -> Any:
    """A model after some steps."""
    set_distribution(distribution())
    model = network(width)
    model.compile(optimizer(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * steps, INPUTS)).astype("float32")
    model.fit(x, rng.integers(0, CLASSES, len(x)), batch_size=BATCH, shuffle=False, verbose=0)
    return model


def difference(model: Any, other: Any) -> float:
    """The largest difference between the weights of two models."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes of AdamW's state on each device.")
    parser.add_argument("--width", type=int, default=512, help="of the hidden layers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    models = {name: trained(*given, arguments.width, arguments.steps) for name, given in ALTERNATIVES.items()}
    parameters = models["one device", "ours"].count_params()
    shown = Table(title=f"AdamW, {parameters:,} parameters, {DEVICES} devices: bytes on the fullest device")
    for heading in ("distribution", "optimizer", "weights", "state", "difference"):
        shown.add_column(heading, justify="right")
    for (where, which), model in models.items():
        weights = on_fullest_device(model.trainable_variables)
        state = on_fullest_device(model.optimizer.variables)
        one = models["one device", which.partition(",")[0]]
        shown.add_row(where, which, f"{weights:,}", f"{state:,}", f"{difference(model, one):.1e}")
    Console().print(shown)


if __name__ == "__main__":
    main()
