"""Layers that add noise in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule, PolynomialDecay

from keras_optkit import arguments, backend
from keras_optkit.layers.own_step import OwnStep
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["ScheduledDropout"]


@register(
    "layer",
    paper="1207.0580; schedules as in 1703.06229",
    parity="keras.layers.Dropout",
    tags=("random",),
    cases=(
        {"rate": 0.3, "seed": 7},
        {"rate": PolynomialDecay(0.0, 4, end_learning_rate=0.6), "seed": 7},
        {"rate": PolynomialDecay(0.6, 4, end_learning_rate=0.2), "noise_shape": (None, 1, 4)},
    ),
    space={"rate": Float(0.0, 0.7)},
)
class ScheduledDropout(OwnStep, FromSignature, keras.layers.Dropout):
    """Dropout whose rate may follow a schedule.

    y = x r / (1 - p) with r ~ Bernoulli(1 - p) in training, y = x at inference. A number p is `keras.layers.Dropout`,
    draw for draw. A schedule is evaluated at the layer's own step, which starts at 0 and counts the calls in training;
    rates outside [0, 1] are taken as the nearer end. In half precision a schedule's masks are drawn in float32, so that
    any rate can be met (bfloat16 draws have 128 rates only, as Keras and a number have).

    Shapes: the output has the shape, dtype and mask of the input.

    Every call with `training=True` counts as one in training: Monte-Carlo predictions by `model(x, training=True)`
    advance the step, too. Reset it afterwards: `layer.step.assign(before)`.

    When not to use it: with a constant rate, for which Keras's own layer is enough, or in a layer that is called
    several times in one training step (shared, or recomputed by `keras.remat`), since each call counts as a step.

    Args:
        rate: The fraction p of the units to drop, in [0, 1], or a `LearningRateSchedule` that gives it.
        noise_shape: Shape of the mask r, with 1 where it is to be shared and None for the input's own size.
        seed: An int makes the masks repeatable. The state of the generator is saved with the layer, and continues after
            loading, as does the step.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `rate` is neither a number nor a schedule, or `seed` is not an integer.
        ValueError: `rate` is a number outside [0, 1], or `noise_shape` is not made of positive integers and None.

    Source: Hinton et al. 2012, arXiv 1207.0580, in the inverted form.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    rate = keras.optimizers.schedules.PolynomialDecay(0.0, decay_steps=1000, end_learning_rate=0.5)
    layer = ok.layers.ScheduledDropout(rate, seed=1)
    y = layer(keras.ops.ones((2, 3)), training=True)
    assert int(layer.step) == 1
    ```
    """

    def __init__(
        self,
        rate: float | LearningRateSchedule,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        scheduled = isinstance(rate, LearningRateSchedule)
        if not scheduled:
            rate = arguments.real("rate", rate, 0, 1)
        seed = arguments.seed("seed", seed)
        super().__init__(0.5 if scheduled else rate, noise_shape, seed, **kwargs)  # any rate but 0 makes a generator
        self.rate = rate

    def _inherited_config(self) -> dict[str, Any]:
        config = super()._inherited_config()
        del config["rate"]  # where Keras would put the schedule object itself
        return config

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Drops in training, and advances the step."""
        if not training or not isinstance(self.rate, LearningRateSchedule):
            return super().call(inputs, training=training)
        ops, dtype = keras.ops, at_least_float32(inputs.dtype)
        sizes = ops.shape(inputs)
        shape = [sizes[i] if n is None else n for i, n in enumerate(self.noise_shape or (None,) * len(sizes))]
        with backend.after(inputs):
            rate = self.next_rate(dtype)
            keep = keras.random.uniform(shape, dtype=dtype, seed=self.seed_generator) >= rate
        scale = ops.cast(ops.divide_no_nan(1.0, 1.0 - rate), inputs.dtype)  # at rate 1 nothing is kept
        return ops.where(keep, inputs * scale, ops.zeros_like(inputs))
