"""Training steps that provide what an optimizer needs besides the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_optkit.fit.hessian import ProductsOnJAX, ProductsOnTensorFlow
from keras_optkit.fit.run import Run
from keras_optkit.fit.second_gradient import TwoOnJAX, TwoOnTensorFlow
from keras_optkit.optimizers.of_model import innermost, optimizers_of, ours_of


@contextlib.contextmanager
def providing_needs(run: Run) -> Iterator[None]:
    """Makes the training function with a step that provides what the optimizer needs."""
    model = run.model
    given, own = model.train_step, vars(model).get("train_step")
    step = with_needs(model, given)
    if step is given:
        yield
        return
    vars(model)["train_step"] = step
    try:
        yield
    finally:
        if own is None:
            del vars(model)["train_step"]
        else:
            vars(model)["train_step"] = own


def with_needs(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A training step that provides what the model's optimizer needs; `step` itself if that is the gradient alone.

    Raises:
        ValueError: If the model has several optimizers, and one of them needs more.
    """
    on_jax = keras.config.backend() == "jax"
    kinds: list[tuple[str, Any]] = [  # the products are those of the second gradient, if there is one
        ("needs_hessian_vector", ProductsOnJAX if on_jax else ProductsOnTensorFlow),
        ("needs_second_gradient", TwoOnJAX if on_jax else TwoOnTensorFlow),
    ]
    ours = ours_of(model)
    for need, kind in kinds if not getattr(step, "provides", False) else ():
        needing = [optimizer for optimizer in ours if getattr(optimizer, need)]
        if not needing:
            continue
        outer = optimizers_of(model)
        inside = [inner for optimizer in outer for inner in innermost(optimizer)]
        if len(inside) != 1:
            raise ValueError(
                f"{needing[0].name} {kind.why}, so it must be the only optimizer of the model, got "
                f"{', '.join(f'{optimizer.name} ({type(optimizer).__name__})' for optimizer in inside)}."
            )
        step = kind(model, outer[0], step)
    return step
