"""What layers with a rate that may follow a schedule share: their own step, and a random state that is saved."""

from __future__ import annotations

from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments


class OwnStep:
    """Mixin before a `keras.Layer` that has a `rate`: its step counter, and the random state in files."""

    rate: Any
    step: Any = None
    add_weight: Any

    def build(self, input_shape: Any) -> None:  # noqa: ARG002  (Keras's signature)
        """Makes the step counter of a schedule; with a number the layer has no weights, as Keras's."""
        if isinstance(self.rate, LearningRateSchedule):
            self.step = self.add_weight(
                name="step",
                shape=(),
                dtype="int",  # the backend's own: int64, on JAX int32
                initializer="zeros",
                trainable=False,
                aggregation="only_first_replica",
            )

    @property
    def current_rate(self) -> Any:
        """The rate of the next training call."""
        if not isinstance(self.rate, LearningRateSchedule):
            return self.rate
        return keras.ops.clip(self.rate(0 if self.step is None else self.step), 0.0, 1.0)

    def next_rate(self, dtype: str) -> Any:
        """The rate of this training call, after which the step is the next one."""
        if not isinstance(self.rate, LearningRateSchedule):
            return keras.ops.convert_to_tensor(self.rate, dtype)
        rate = keras.ops.cast(self.current_rate, dtype)
        self.step.assign_add(1)
        return rate

    def save_own_variables(self, store: Any) -> None:
        """Saves the step and, which Keras does not, the state of the random generator."""
        super().save_own_variables(store)  # type: ignore[misc]
        if hasattr(self, "seed_generator"):
            store["seed"] = self.seed_generator.state

    def load_own_variables(self, store: Any) -> None:
        """Loads the step and the state of the random generator, if the file has one (a `Dropout`'s has none)."""
        state = {key: store[key] for key in store.keys()}  # noqa: SIM118  (an HDF5 store is no dict)
        seed = state.pop("seed", None)
        super().load_own_variables(state)  # type: ignore[misc]
        if seed is not None and hasattr(self, "seed_generator"):
            self.seed_generator.state.assign(seed)


def rate_or_schedule(name: str, value: Any) -> Any:
    """Returns `value` if it is a rate in [0, 1] or a schedule."""
    return value if isinstance(value, LearningRateSchedule) else arguments.real(name, value, 0, 1)
