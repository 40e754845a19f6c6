"""Training steps that multiply the Hessian by a random vector, for optimizers that need its product.

The product is the derivative of the gradient in that direction, exact up to rounding. On TensorFlow a second tape
records the model's step, which runs once, and the gradient of its gradient is under a condition. On JAX the step is a
function, which `jax.jvp` differentiates under a condition. Everything else is as if nothing had been added.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.fit.hooks import muted
from keras_optkit.fit.redirecting import Redirecting

Tensor = Any


class _Products(Redirecting):
    why = "multiplies the Hessian by a vector"

    def _told(self, grads: Any, products: list[Tensor]) -> list[Any]:
        """Gradients that are not finite if a product is not: dynamic loss scaling looks at nothing else."""
        if getattr(self._outer, "dynamic_scale", None) is None:
            return list(grads)
        finite = ops.all(ops.stack([ops.all(ops.isfinite(product)) for product in products]))
        told = list(grads)
        first = next(i for i, g in enumerate(told) if g is not None)
        dense = backend.dense(told[first], tuple(products[first].shape))
        told[first] = ops.where(finite, dense, ops.full_like(dense, float("nan")))
        return told


class ProductsOnJAX(_Products):
    """For JAX, where the step is a function of the state."""

    method = "stateless_apply"

    def __call__(self, state: Any, data: Any) -> tuple[Any, Any]:
        """One training step."""
        weights, others, optimizer_state, metrics = state
        variables = self._model.trainable_variables
        if not variables:
            return self._step(state, data)
        held = zip([*self._outer.variables, *variables], [*optimizer_state, *weights], strict=True)

        def gradient(values: list[Tensor]) -> list[Tensor]:
            found: list[Tensor] = []

            def probe(_: Any, optimizer_state: Any, grads: Any, weights: Any) -> tuple[Any, Any]:
                found.extend(grads)
                return list(weights), optimizer_state

            with self._with_updates(self._once(probe)), muted():
                self._step((values, others, optimizer_state, metrics), data)
            return found

        with keras.StatelessScope(list(held)):
            vectors, due = self._optimizer.hessian_vectors(variables), self._optimizer.product_is_due()
            products = backend.hessian_products(gradient, weights, vectors, due)
            products = self._unscaled(products, variables)

        def update(stateless_apply: Any, optimizer_state: Any, grads: Any, weights: Any) -> Any:
            with self._optimizer.given_products(products, variables):
                return stateless_apply(optimizer_state, self._told(grads, products), weights)

        with self._with_updates(self._once(update)):
            return self._step(state, data)


class ProductsOnTensorFlow(_Products):
    """For TensorFlow, where the step is recorded."""

    method = "apply"

    def __call__(self, data: Any) -> Any:
        """One training step."""
        begun = [ops.zeros(())]
        with backend.recorded() as recording:

            def update(apply: Any, grads: Any, trainable_variables: Any = None) -> None:
                self._refuse_elsewhere(begun)
                grads, variables = list(grads), list(trainable_variables or self._optimizer._in_model_order())
                if not any(g is not None for g in grads):
                    self._apply(apply, grads, trainable_variables)
                    return
                products = self._optimizer.products_of(recording, grads, variables)
                products = self._unscaled(products, variables)
                with self._optimizer.given_products(products, variables):
                    self._apply(apply, self._told(grads, products), variables)

            with self._with_updates(self._once(update)):
                return self._step(data)
