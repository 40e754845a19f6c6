"""Batch normalisation that fits averaged weights."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.fit.hooks import around
from keras_optkit.precision import scalar_dtype
from keras_optkit.private import sublayers

__all__ = ["recalibrate_batch_norm"]


def recalibrate_batch_norm(
    model: keras.Model,
    data: Any,
    batch_size: int | None = None,
    steps: int | None = None,
    verbose: str | int = "auto",
) -> int:
    """Sets the moving statistics of all batch normalisations to those of one fresh pass over the data.

    ```text
    moving mean      ← Σ n_b μ_b / Σ n_b
    moving variance  ← Σ n_b σ²_b / Σ n_b
    ```

    over the batches b of the data, with μ_b and σ²_b the mean and the biased variance that the layer normalises batch b
    with in training, and n_b the number of values behind them: examples times positions, without masked ones. A smaller
    last batch thus counts less. The old statistics and `momentum` do not matter.

    This is for weights that were not the ones in training: with an average of weights (`use_ema`, `Lookahead`,
    Schedule-Free) activations differ from those that the moving statistics were collected with.

    The model runs as in training, so that dropout and augmentation inside it act, and layers that are frozen, or called
    with `training=False`, keep their statistics. The variance is the mean of the batches' variances, as it is while
    training; it does not include the variance of the means, so use the batch size of training. Everything else stays as
    it is: weights, optimizer, metrics, states of other layers, seeds. If something fails, the model is as before.

    `torch.optim.swa_utils.update_bn` does the same with two differences: there each batch counts the same whatever its
    size, and the variances are the unbiased ones, larger by n/(n-1). A layer that is called several times in the model
    counts each call.

    When not to use it: for the weights that training ended with; their moving statistics fit them already.

    Args:
        model: A built model.
        data: Inputs as for `model.predict`: arrays, or a `tf.data.Dataset`, `PyDataset` or generator, which may also
            give targets, which are not used. Shuffled and prepared as for training, without an end: give `steps`.
        batch_size: For arrays; 32 if None.
        steps: Batches to take; None for all.
        verbose: As in `model.predict`: 0 is silent, 1 and "auto" show a progress bar, 2 a line.

    Returns:
        How many layers were given new statistics. 0, without reading the data, if the model has no batch normalisation.

    Raises:
        TypeError: If `model` is not a Keras model, or `data` is not what `model.predict` takes.
        ValueError: If it is not built or has no `call`, if there is no batch in the data, or if a statistic is not
            finite.

    Source: Izmailov et al. 2018, arXiv 1803.05407, on batch normalisation; biased variances as in Ioffe and Szegedy
    2015.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), mean=3.0, seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    assert ok.recalibrate_batch_norm(model, x, batch_size=32, verbose=0) == 1
    print(model.layers[0].moving_mean)  # about 3
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    arguments.integer("batch_size", batch_size, 1, optional=True)
    arguments.integer("steps", steps, 1, optional=True)
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which is not. Call it on a batch, or build(shape).")
    layers = batch_norms(model)
    if not layers:
        return 0
    refuse_if_not_callable(model)
    checked_inputs("data", data)
    # all of them: some layers, such as SpectralNormalization, change their weights when they are called in training
    before = [(v, ops.copy(ops.convert_to_tensor(v))) for v in model.variables]
    done = False
    try:
        statistics = _pass_over(model, layers, data, batch_size, steps, verbose)
        done = True
    finally:
        for variable, value in before:
            variable.assign(value)
        if done:
            for layer, (mean, variance) in statistics.items():
                layer.moving_mean.assign(mean)
                layer.moving_variance.assign(variance)
                if layer.renorm:  # training continues from the deviation
                    layer.moving_stddev.assign(np.sqrt(variance + layer.epsilon))
    return len(statistics)


def batch_norms(model: Any) -> list[Any]:
    """The batch normalisations of a model that have statistics, at any depth."""
    found = [layer for layer in sublayers(model) if isinstance(layer, keras.layers.BatchNormalization)]
    return [layer for layer in found if layer.built]


def refuse_if_not_callable(model: Any) -> None:
    """Raises for a model that is nothing but a training step around others."""
    if type(model).call is keras.Model.call:
        raise ValueError(
            f"model {model.name!r} has no call, so that its batch normalisations cannot be recalibrated by a pass over "
            "data. Give recalibrate_batch_norm the models in it that have one."
        )


def checked_inputs(name: str, data: Any) -> Any:
    """Returns the argument `data` if `model.predict` may take it: arrays, or something that gives them."""
    leaves = keras.tree.flatten(data)
    arrays = [getattr(leaf, "shape", None) for leaf in leaves]
    gives = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, list | tuple | dict):
        usable = bool(leaves) and all(shape is not None and len(shape) for shape in arrays)
    else:
        usable = bool(arrays[0]) if arrays[0] is not None else gives and not isinstance(data, str | bytes)
    if not usable:
        raise TypeError(
            f"{name} must be an array, a list or dict of arrays, a tf.data.Dataset, PyDataset or generator, got "
            f"{data!r} of type {type(data).__name__}."
        )
    if any(shape is not None and tuple(shape)[:1] == (0,) for shape in arrays):
        raise ValueError(f"{name} must hold at least one batch, got {data!r}.")
    return data


def _pass_over(
    model: Any, layers: list[Any], data: Any, batch_size: int | None, steps: int | None, verbose: Any
) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance for each layer that was called in training mode. Leaves the moving statistics anyhow."""
    sums = _Sums(model, layers)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            if steps is None:  # Keras says so of every generator that comes to its end
                warnings.filterwarnings("ignore", "Your input ran out of data")
            for i, layer in enumerate(layers):
                stack.enter_context(_remembers_nothing(layer))
                stack.callback(around(layer, "call", sums.hook(i, layer)))
            sums.predict(data, batch_size=batch_size, steps=steps, verbose=verbose)
    except UnboundLocalError as error:  # what Keras says to no batches
        raise ValueError(f"data must hold at least one batch, got {data!r}.") from error
    found = {}
    for layer, total in zip(layers, sums.totals, strict=True):
        n, mean, variance = (ops.convert_to_numpy(part) for part in total)
        if n == 0:
            continue
        found[layer] = (mean / n, variance / n)
        if not np.all(np.isfinite(found[layer])):
            raise ValueError(
                f"data gave statistics of {layer.path!r} that are not finite; the model is as before. Is there a NaN "
                "in the data, or are the weights not finite?"
            )
    return found


@contextlib.contextmanager
def _remembers_nothing(layer: Any) -> Iterator[None]:
    """With momentum 0 the moving statistics are those of the last batch, whatever the layer does to get them."""
    momentum, layer.momentum = layer.momentum, 0.0
    for variable in (layer.moving_mean, layer.moving_variance):
        variable.assign(ops.ones(variable.shape, variable.dtype))  # 0 * nan is nan
    try:
        yield
    finally:
        layer.momentum = momentum


class _Sums(keras.Model):
    """Runs a model as in training, and adds up the statistics of each call of its batch normalisations."""

    def __init__(self, model: Any, layers: list[Any]):
        super().__init__(name="recalibration")
        self.model = model
        self.totals = [
            tuple(self._zeros(shape) for shape in ((), layer.moving_mean.shape, layer.moving_mean.shape))
            for layer in layers
        ]
        self.takes_training = "training" in inspect.signature(model.call).parameters
        self.run_eagerly = model.run_eagerly
        self.jit_compile = keras.config.backend() == "jax"  # compiling takes longer than the pass

    def _zeros(self, shape: Any) -> keras.Variable:
        return self.add_weight(shape=shape, initializer="zeros", trainable=False, dtype=scalar_dtype(), autocast=False)

    def call(self, x: Any) -> Any:
        """Nothing to keep: predictions of a whole data set may be large."""
        if self.takes_training:
            self.model(x, training=True)
        else:
            self.model(x)
        return ops.zeros((ops.shape(keras.tree.flatten(x)[0])[0], 1))

    def hook(self, i: int, layer: Any) -> Any:
        """What to run around each call of a layer."""
        signature = inspect.signature(layer.call)

        @contextlib.contextmanager
        def around_call(*args: Any, **kwargs: Any) -> Iterator[None]:
            yield
            given = signature.bind(*args, **kwargs).arguments
            if given.get("training") and layer.trainable:
                self._add(i, layer, next(iter(given.values())), given.get("mask"))

        return around_call

    def _add(self, i: int, layer: Any, inputs: Any, mask: Any) -> None:
        n = ops.cast(ops.size(inputs), scalar_dtype()) / layer.moving_mean.shape[0]
        if mask is not None:
            n = n * ops.sum(ops.cast(mask, scalar_dtype())) / ops.cast(ops.size(mask), scalar_dtype())
        for total, value in zip(self.totals[i], (1.0, layer.moving_mean, layer.moving_variance), strict=True):
            share = n * ops.cast(value, scalar_dtype())
            total.assign_add(ops.where(n > 0, share, ops.zeros_like(share)))
