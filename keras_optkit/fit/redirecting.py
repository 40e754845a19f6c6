"""A model's training step with the optimizer's update redirected, for optimizers that need more than the gradient."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_optkit import backend
from keras_optkit.optimizers.of_model import unscaled

Tensor = Any


class Redirecting:
    """A training step around another one, whose update it redirects.

    The replicas of a strategy are traced in turns, each in its own thread. The optimizer's method is replaced while any
    of them is inside, and the replacement looks up in its thread what to do. Meanwhile, a `tf.function` that the step
    calls outside of the model's `call` is traced as part of the step, since an earlier trace would not look it up.
    """

    provides = True
    method = ""
    #: What the optimizer needs, for messages.
    why = ""

    def __init__(self, model: Any, outer: Any, step: Callable[..., Any]):
        self._model, self._outer, self._optimizer, self._step = model, outer, unscaled(outer), step
        self._inside = 0
        self._functions = False
        self._thread = threading.local()

    @contextlib.contextmanager
    def _with_updates(self, update: Callable[..., Any]) -> Iterator[None]:
        """Redirects this thread's updates to `update`, which gets the optimizer's own method and its arguments."""
        own = vars(self._outer)
        if not self._inside:
            self._replaced = own.get(self.method)
            previous = getattr(self._outer, self.method)

            def instead(*args: Any, **kwargs: Any) -> Any:
                mine = getattr(self._thread, "update", None)
                return previous(*args, **kwargs) if mine is None else mine(previous, *args, **kwargs)

            own[self.method] = instead
            self._functions = backend.functions_inlined(True)
            self._keep_functions_of_layers()
        self._inside += 1
        self._thread.update = update
        try:
            yield
        except BaseException:
            self._inside = 1  # the other replicas do not finish
            raise
        finally:
            self._thread.update = None
            self._inside -= 1
            if not self._inside:
                backend.functions_inlined(self._functions)
                if self._call is None:
                    del vars(self._model)["call"]
                else:
                    vars(self._model)["call"] = self._call
                if self._replaced is None:
                    del own[self.method]
                else:
                    own[self.method] = self._replaced

    def _keep_functions_of_layers(self) -> None:
        """Leaves functions in the model's call as they are: Keras compiles grouped convolutions, which fail without."""
        self._call, call = vars(self._model).get("call"), self._model.call

        @functools.wraps(call)
        def kept(*args: Any, **kwargs: Any) -> Any:
            inlined = backend.functions_inlined(self._functions)
            try:
                return call(*args, **kwargs)
            finally:
                backend.functions_inlined(inlined)

        vars(self._model)["call"] = kept

    def _once(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which raises if it is called a second time."""
        called: list[bool] = []

        def once(*args: Any, **kwargs: Any) -> Any:
            if called:
                raise ValueError(
                    f"{self._optimizer.name} {self.why}, so {type(self._model).__name__}.train_step "
                    "must make one update, but it makes several."
                )
            called.append(True)
            return update(*args, **kwargs)

        return once

    def _unscaled(self, values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Gradients, or what is as large, without the factor of dynamic loss scaling."""
        scale = getattr(self._outer, "dynamic_scale", None)
        if scale is None:
            return list(values)
        pairs = zip(values, variables, strict=True)
        return [None if g is None else backend.dense(g, tuple(v.shape)) / backend.tensor(scale) for g, v in pairs]

    def _apply(self, apply: Callable[..., Any], *args: Any) -> None:
        """Calls the optimizer's method, on TensorFlow; the compiled update in it is a separate function."""
        inlined = backend.functions_inlined(backend.is_one_of_several_replicas())
        try:
            apply(*args)
        finally:
            backend.functions_inlined(inlined)

    def _refuse_elsewhere(self, before: Sequence[Tensor]) -> None:
        """Raises if an update is in a conditional part of the step.

        Args:
            before: Tensors from the beginning of the step.
        """
        if before and not backend.is_here(before[0]):
            raise ValueError(
                f"{self._optimizer.name} {self.why}, so {type(self._model).__name__}.train_step must make its update "
                "in every step, but it makes it inside tf.cond or a loop. Call `apply` unconditionally; "
                "`skip_nonfinite` skips updates with non-finite gradients."
            )
