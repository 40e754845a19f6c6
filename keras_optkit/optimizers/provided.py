"""The part of `Optimizer` for rules that need more than the gradient: a second one, or products with the Hessian."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.building import Built
from keras_optkit.optimizers.engine import gradients
from keras_optkit.optimizers.engine.run import perturbed
from keras_optkit.optimizers.groups import keras_path as _path
from keras_optkit.optimizers.rule import Tensor
from keras_optkit.precision import at_least_float32

#: How many `fixed_gradients` there are around what runs at present.
_fixed = 0


@contextlib.contextmanager
def fixed_gradients() -> Iterator[None]:
    """For tests whose gradients g do not depend on the weights.

    A second gradient equals the first there. The product with the Hessian is taken to be `g / v`, so that `v * Hv` is g
    whatever the random vector v is.
    """
    global _fixed
    _fixed += 1
    try:
        yield
    finally:
        _fixed -= 1


class Provided(Built):
    """What `apply` is provided with besides the gradients.

    It is kept from where it is computed until `apply` takes it, in the thread of the replica.
    """

    # -- the second gradient -------------------------------------------------------------------------------------------

    @property
    def needs_second_gradient(self) -> bool:
        """Whether `apply` takes the gradient at weights that a first gradient has moved; see `perturbed`."""
        return any("second_gradient" in rule.needs for rule in self._rules.values())

    @contextlib.contextmanager
    def perturbed(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any]) -> Iterator[None]:
        """A context for computing the second gradient: in it, the variables hold the weights to compute it at.

        For loops of your own with `SAM`; `fit` and `train_on_batch` do it, also with a `train_step` of your own.

        Args:
            grads: The gradient at the weights as they are.
            trainable_variables: The variables, which have their values again at the end.

        Raises:
            TypeError: If a gradient is not made of real numbers.
            ValueError: If the optimizer takes one gradient alone, and as `apply` does.
        """
        variables = list(trainable_variables)
        before = [ops.copy(backend.tensor(v)) for v in variables]
        backend.assign(variables, self.perturbed_values(grads, variables))
        self._held.perturbed = True
        try:
            yield
        finally:
            self._held.perturbed = False
            backend.assign(variables, before)

    @backend.untraced
    def perturbed_values(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any]) -> list[Tensor]:
        """The weights to compute the second gradient at, for each variable; nothing is changed.

        On JAX for use inside of a `keras.StatelessScope` with the state of the optimizer and the weights.

        Args:
            grads: The gradient at the weights as they are, as for `apply`.
            trainable_variables: The variables.
        """
        if not self.needs_second_gradient:
            raise ValueError(f"{self.name} takes one gradient alone: no rule of {type(self).__name__} needs a second.")
        variables = list(trainable_variables)
        given, known = self._checked(grads, variables)
        self._held.has_perturbed = True
        if self._combines():
            self._keep("first", variables, grads)
        plan, state = self._plan(), self._held.state
        found: dict[int, Tensor] = {}
        if known:
            buckets = gradients.of_buckets(plan, state, self._in_order(given, known), dense=True)
            moved = perturbed(plan, state, buckets)
            for bucket, values in zip(plan.buckets, moved, strict=True):
                if values is not None:
                    keys = [backend.key(self._held.variables[i]) for i in bucket.indices]
                    found |= dict(zip(keys, bucket.split(values), strict=True))
        return [found.get(backend.key(v), backend.tensor(v)) for v in variables]

    @contextlib.contextmanager
    def given_second_gradient(self) -> Iterator[None]:
        """Around an update with a second gradient that a training step has computed."""
        try:
            with self._driven():
                yield
        finally:
            self._held.has_perturbed = False

    def _refuse_first_gradient(self) -> None:
        """Raises unless somebody has computed a second gradient since the last update."""
        held = self._held
        if not self.needs_second_gradient or held.driven or _fixed:
            return
        if held.perturbed:
            raise ValueError(
                f"{self.name}: `apply` must be called after the block `with optimizer.perturbed(...)`, not inside: at "
                "its end the variables have their values again."
            )
        if not held.has_perturbed:
            raise ValueError(
                f"{self.name} needs a second gradient, at weights that the first has moved. `fit` and `train_on_batch` "
                "compute it; in a loop of your own, compute it inside of `with optimizer.perturbed(grads, variables):` "
                "and call `apply` with it after that, once."
            )
        if not backend.is_one_of_several_replicas():  # which are traced in turns
            held.has_perturbed = False

    # -- products with the Hessian -------------------------------------------------------------------------------------

    @property
    def needs_hessian_vector(self) -> bool:
        """Whether `apply` takes products of the Hessian with random vectors; see `with_products`."""
        return any("hessian_vector" in rule.needs for rule in self._rules.values())

    @backend.untraced
    def with_products(
        self, gradient: Callable[[], Sequence[Tensor | None]], trainable_variables: Sequence[Any]
    ) -> list[Tensor | None]:
        """Returns what `gradient()` returns, and computes the products with the Hessian for the next `apply`.

        For loops of your own with `SophiaH` or `AdaHessian`, on TensorFlow; `fit` and `train_on_batch` do it. The
        products are computed only in the updates in which they are due. On JAX, compute them with `jax.jvp` from
        `hessian_vectors`, and call `apply` inside `given_products`.

        Args:
            gradient: A function without arguments that computes the loss and returns its gradients, in the order of
                `trainable_variables`. It is called once.
            trainable_variables: The variables.

        Raises:
            ValueError: If the optimizer takes no products, and as `apply` does.
            RuntimeError: If an operation of the model has no second derivative in TensorFlow.
        """
        variables = list(trainable_variables)
        self._refuse_unless_needed()
        with backend.recorded() as recording:
            grads = list(gradient())
            products = self.products_of(recording, grads, variables)
        self._keep("product", variables, products)
        return grads

    def products_of(self, recording: Any, grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor]:
        """The products for gradients that were computed while TensorFlow recorded."""
        return recording.products(grads, variables, self.hessian_vectors(variables), self.product_is_due())

    @backend.untraced
    def hessian_vectors(self, trainable_variables: Sequence[Any]) -> list[Tensor]:
        """The vector v to multiply the Hessian by, in parts for each variable; zeros where no rule needs a product.

        It is a function of the rules' seeds and of `iterations`. On JAX for use inside of a `keras.StatelessScope` with
        the state of the optimizer.

        Raises:
            ValueError: If the optimizer takes no products, and as `apply` does.
        """
        self._refuse_unless_needed()
        variables = list(trainable_variables)
        self._checked([None] * len(variables), variables)
        plan, iterations = self._plan(), backend.tensor(self._updates)
        several = len(plan.vectors()) > 1
        found: dict[int, Tensor] = {}
        for bucket in plan.buckets:
            vector = plan.rule(bucket).random_vector()
            if vector is not None:
                parts = plan.vector(bucket, iterations)
                due = vector.is_due(iterations) if several else True
                if due is not True:
                    parts = [part * ops.cast(due, part.dtype) for part in parts]
                keys = [backend.key(self._held.variables[i]) for i in bucket.indices]
                found |= dict(zip(keys, parts, strict=True))
        return [
            ops.zeros(tuple(v.shape), v.dtype) if part is None else ops.cast(part, v.dtype)
            for v, part in ((v, found.get(backend.key(v))) for v in variables)
        ]

    def product_is_due(self) -> Any:
        """Whether the next update takes products: True if every one does, else a tensor."""
        due = [vector.is_due(backend.tensor(self._updates)) for vector in self._plan().vectors()]
        if True in [each is True for each in due]:
            return True
        return ops.any(ops.stack(due))

    @contextlib.contextmanager
    def given_products(self, products: Sequence[Tensor], trainable_variables: Sequence[Any]) -> Iterator[None]:
        """Around an `apply` that takes these products of the Hessian with `hessian_vectors`.

        Args:
            products: One for each variable; zeros where none is due.
            trainable_variables: The variables.
        """
        self._refuse_unless_needed()
        self._keep("product", trainable_variables, products)
        with self._driven():
            yield

    def _refuse_unless_needed(self) -> None:
        if not self.needs_hessian_vector:
            raise ValueError(f"{self.name} takes gradients alone: no rule of {type(self).__name__} needs the Hessian.")

    # -- for `apply` ---------------------------------------------------------------------------------------------------

    def _keep(self, name: str, variables: Sequence[Any], values: Sequence[Any]) -> None:
        pairs = zip(variables, values, strict=True)
        self._held.extras[threading.get_ident(), name] = {backend.key(v): value for v, value in pairs}

    @contextlib.contextmanager
    def _driven(self) -> Iterator[None]:
        before, self._held.driven = self._held.driven, True
        try:
            yield
        finally:
            self._held.driven = before
            if not before:
                self._forget_extras()

    def _forget_extras(self) -> None:
        mine = threading.get_ident()
        self._held.extras = {key: extra for key, extra in self._held.extras.items() if key[0] != mine}

    def _provided(self) -> dict[str, dict[int, Any]]:
        """What there is for this update besides its gradients, by name; raises if something is missing."""
        self._refuse_first_gradient()
        mine = threading.get_ident()
        found = {name: extra for (thread, name), extra in self._held.extras.items() if thread == mine}
        if self.needs_hessian_vector and "product" not in found and not _fixed:
            raise ValueError(
                f"{self.name} needs products with the Hessian. `fit` and `train_on_batch` compute them; in a loop of "
                "your own, compute the gradients with `grads = optimizer.with_products(gradient, variables)` and call "
                "`apply` with them, once."
            )
        if not self._held.driven:
            self._forget_extras()
        return found

    def _extras_in_order(self, extras: dict[str, dict[int, Any]], grads: list[Any]) -> dict[str, list[Any]]:
        """The same for each variable that the optimizer was built with."""
        plan, held = self._plan(), self._held
        names = ["product"] * self.needs_hessian_vector + ["first"] * self._combines()
        found = {name: [extras.get(name, {}).get(backend.key(v)) for v in held.variables] for name in names}
        if "first" in found and "first" not in extras:
            found["first"] = grads  # of `fixed_gradients`
        if "product" in found and "product" not in extras:
            iterations = backend.tensor(self._updates)
            for bucket in plan.buckets:
                if plan.rule(bucket).random_vector() is None:
                    continue
                for i, v in zip(bucket.indices, plan.vector(bucket, iterations), strict=True):
                    if grads[i] is not None:
                        dense = backend.dense(grads[i], bucket.shapes[bucket.indices.index(i)])
                        found["product"][i] = backend.cast(dense, at_least_float32(bucket.dtype)) / v
        return found

    def _combines(self) -> bool:
        return any(rule.combination() is not None for rule in self._rules.values())

    def _checked(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None
    ) -> tuple[list[Any], list[Any]]:
        """The gradients and variables that a method was given, each variable once; the optimizer is built for them."""
        grads = list(grads)
        if trainable_variables is None:
            if not self.built:
                raise ValueError(f"{self.name} is not built yet; pass the variables, or call build(variables) first.")
            variables = self._in_model_order()
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"grads must match the variables one to one, got {len(grads)} for {len(variables)}.")
        grads = [gradients.checked(i, g, v) for i, (g, v) in enumerate(zip(grads, variables, strict=True))]
        grads, variables = gradients.summed(grads, variables)
        if trainable_variables is not None:
            self.build(variables)
        return grads, variables

    def _in_order(self, grads: list[Tensor | None], variables: Sequence[Any]) -> list[Tensor | None]:
        """One gradient or None for each variable the optimizer was built with."""
        missing = [_path(v) for g, v in zip(grads, variables, strict=True) if g is None]
        if len(missing) == len(grads):
            raise ValueError(f"No gradients provided for any variable; the variables are {missing}.")
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        places = {backend.key(v): i for i, v in enumerate(self._held.variables)}
        ordered: list[Tensor | None] = [None] * len(places)
        for grad, variable in zip(grads, variables, strict=True):
            place = places.get(backend.key(variable))
            if place is None:
                raise ValueError(f"Unknown variable {_path(variable)}: {self.name} was built for others.")
            ordered[place] = grad
        return ordered
