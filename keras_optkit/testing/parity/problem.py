"""What the optimizers and their references are run on."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

Arrays = list[np.ndarray]

#: How many of a kernel's first axes are inputs, where it is not all but the last.
_INPUTS = {"query": 1, "merged": 2}


class Parts(keras.Model):
    """A kernel of each kind, with biases, and an embedding; the last kernel is that of `head`."""

    def __init__(self, dtype: str):
        super().__init__(dtype=dtype)
        self.wide = layers.Dense(6, dtype=dtype)
        self.tall = layers.Dense(4, dtype=dtype, use_bias=False)
        self.conv = layers.Conv2D(4, 3, dtype=dtype)
        self.query = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", dtype=dtype)
        self.merged = layers.EinsumDense("abcd,cde->abe", (None, 5), dtype=dtype)
        self.table = layers.Embedding(7, 3, dtype=dtype)
        self.head = layers.Dense(2, dtype=dtype, use_bias=False)
        shapes = {
            "wide": (None, 4),
            "tall": (None, 6),
            "conv": (None, 8, 8, 2),
            "query": (None, 5, 8),
            "merged": (None, 5, 2, 3),
            "table": (None, 2),
            "head": (None, 3),
        }
        for name, shape in shapes.items():
            getattr(self, name).build(shape)
        self.inputs_of = {id(getattr(self, name).kernel): n for name, n in _INPUTS.items()}
        self.built = True

    def start(self, seed: int = 0) -> Arrays:
        """Weights to start from."""
        rng = np.random.default_rng(seed)
        return [np.asarray(rng.normal(size=v.shape)) for v in self.trainable_variables]

    def gradients(self, steps: int, seed: int = 1) -> list[Arrays]:
        """Gradients for each step, whose scale differs between parameters by orders of magnitude."""
        rng = np.random.default_rng(seed)
        scales = 10.0 ** rng.uniform(-2, 1, len(self.trainable_variables))
        return [
            [np.asarray(c * rng.normal(size=v.shape)) for c, v in zip(scales, self.trainable_variables, strict=True)]
            for _ in range(steps)
        ]

    def coefficients(self, steps: int, seed: int = 2) -> list[tuple[Arrays, Arrays]]:
        """For each step a and b of the function `sum(a sin(b θ))`, for optimizers that need its gradient twice."""
        rng = np.random.default_rng(seed)
        shapes = [v.shape for v in self.trainable_variables]
        return [
            ([np.asarray(rng.normal(size=s)) for s in shapes], [0.7 * np.asarray(rng.normal(size=s)) for s in shapes])
            for _ in range(steps)
        ]

    def seen(self, variable: Any, value: np.ndarray, view: str) -> np.ndarray:
        """A value of a variable as a reference is given it."""
        if view == "keras":
            return value
        if len(variable.shape) < 2 or "bias" in variable.name:
            return np.ravel(value)
        if view == "flat vectors":
            return value
        inputs = self.inputs_of.get(id(variable), len(variable.shape) - 1)
        return np.reshape(value, (int(np.prod(variable.shape[:inputs])), -1)).T

    def unseen(self, variable: Any, value: np.ndarray, view: str) -> np.ndarray:
        """The inverse of `seen`."""
        is_matrix = view == "matrices" and len(variable.shape) > 1 and "bias" not in variable.name
        return np.reshape(value.T if is_matrix else value, variable.shape)
