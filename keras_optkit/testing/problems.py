"""Small problems that the checks run optimizers on, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.testing.tools import numbers

Arrays = list[np.ndarray]

#: Ranks 0 to 5, one of them empty, and one twice, since parameters of one shape may be stacked.
SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (), (2, 3, 4), (0, 3), (2, 1, 3, 2), (2, 1, 2, 1, 3), (3, 4))


def prepare() -> None:
    """Splits TensorFlow's CPU into two logical devices, which the replica check needs.

    Call it at the top of `conftest.py`, before TensorFlow has computed anything. Does nothing on other backends.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or ()) < 2:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def two_replicas() -> Any:
    """A MirroredStrategy over the two logical devices that `prepare` made."""
    import tensorflow as tf

    if len(tf.config.list_logical_devices("CPU")) < 2:
        raise RuntimeError("two logical devices are needed: call keras_optkit.testing.prepare() in conftest.py")
    # CPU collectives number their calls by process, and mix up two strategies that reduce different dtypes
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())


def start(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> Arrays:
    """Weights to start from, in float64."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape)) for shape in shapes]


def gradients(steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 1) -> list[Arrays]:
    """Gradients for each step, in float64; their scale differs between parameters by orders of magnitude."""
    rng = np.random.default_rng(seed)
    scales = [10.0 ** (i % 4 - 2) for i in range(len(shapes))]
    return [[np.asarray(c * rng.normal(size=s)) for c, s in zip(scales, shapes, strict=True)] for _ in range(steps)]


def variables(values: Arrays, dtype: str = "float64") -> list[keras.Variable]:
    """Keras variables that hold `values`."""
    return [keras.Variable(value, dtype=dtype, name=f"weight_{i}") for i, value in enumerate(values)]


def stepper(optimizer: Any, weights: list[Any], mode: str) -> Callable[[Sequence[Any]], None]:
    """A function of the gradients that applies them: "eager", "graph" or "xla". A second trace is an error."""
    if mode == "eager":
        return lambda grads: optimizer.apply(grads, weights)
    optimizer.build(weights)
    traces = []

    def traced(grads: Sequence[Any]) -> None:
        traces.append(mode)
        assert len(traces) == 1, f"the {mode} step was traced a second time"
        optimizer.apply(grads, weights)

    if keras.config.backend() == "jax":
        import jax

        def pure(state: Any, values: Any, grads: Any) -> Any:
            traces.append(mode)
            assert len(traces) == 1, f"the {mode} step was traced a second time"
            return optimizer.stateless_apply(state, grads, values)

        compiled = jax.jit(pure)

        def run(grads: Sequence[Any]) -> None:
            values, state = compiled([v.value for v in optimizer.variables], [w.value for w in weights], list(grads))
            for variable, value in zip([*weights, *optimizer.variables], [*values, *state], strict=True):
                variable.assign(value)

        return run
    import tensorflow as tf

    return tf.function(traced, jit_compile=mode == "xla")


def train(
    optimizer: Any,
    grads: list[Any],
    *,
    values: Arrays | None = None,
    dtype: str = "float64",
    mode: str = "eager",
) -> list[Arrays]:
    """Applies the gradients step by step and returns the weights after each step, in float64."""
    weights = variables(start() if values is None else values, dtype)
    step = stepper(optimizer, weights, mode)
    trajectory = []
    for arrays in grads:
        step([None if g is None else ops.convert_to_tensor(g, dtype=dtype) for g in arrays])
        trajectory.append([numbers(w) for w in weights])
    return trajectory


def state_of(optimizer: Any) -> dict[str, np.ndarray]:
    """The saved state of an optimizer, by name."""
    store: dict[str, np.ndarray] = {}
    optimizer.save_own_variables(store)
    return store


def regression(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A regression problem of 64 rows that a small network can learn."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 4)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True)).astype("float32")


def begun(model: Any) -> Any:
    """Has the optimizer and the metrics of a compiled model make their variables, and returns the model.

    TensorFlow traces a training step that makes any a second time, which takes long.
    """
    model.optimizer.build(model.trainable_variables)
    if keras.config.backend() == "tensorflow":
        outputs = [ops.zeros((1, *output.shape[1:])) for output in model.outputs]
        model.compute_metrics(None, *[outputs[0] if len(outputs) == 1 else outputs] * 2)
        model.reset_metrics()
    return model


def network(seed: int = 0) -> keras.Model:
    """A small network for `regression`, with biases, a normalisation and a constraint in it."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(2.0)),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )


def loss_and_gradients(model: Any, x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The mean squared error of a batch and its gradients, the model having the state that a training step leaves."""
    weights, others = model.trainable_variables, model.non_trainable_variables
    if keras.config.backend() == "jax":
        import jax

        def error(values: Any, state: Any) -> Any:
            out, state = model.stateless_call(values, state, x, training=True)
            return ops.mean(ops.square(out - y)), state

        differentiated = jax.value_and_grad(error, has_aux=True)
        (loss, state), grads = differentiated([w.value for w in weights], [v.value for v in others])
        for variable, value in zip(others, state, strict=True):
            variable.assign(value)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        grads = tape.gradient(loss, weights)
    return float(loss), [ops.convert_to_numpy(g) for g in grads]
