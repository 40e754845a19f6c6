"""Evaluating, predicting and saving with averaged weights while training continues with its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit import arguments
from keras_optkit.averaging import batch_norms, recalibrate_batch_norm, refuse_if_not_callable
from keras_optkit.backend import is_lost
from keras_optkit.callbacks import others
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.callbacks.exchange import Exchange, Mean, averages, copies, is_batch_norm, repeatable, same, separate
from keras_optkit.fit.hooks import around
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.fit.run import running_fit
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import innermost, innermost_of, optimizers_of
from keras_optkit.precision import at_least_float32
from keras_optkit.private import known_variables, sublayers
from keras_optkit.registry import register

#: The methods of a model that show its weights, or write them down.
_SHOWING = ("evaluate", "predict", "test_on_batch", "predict_on_batch", "save", "save_weights", "export")


@register(
    "callback",
    paper="Polyak and Juditsky 1992 (averaging); Izmailov et al., arXiv 1803.05407 (SWA windows, batch normalisation)",
    parity="the weights that fit ends with; torch.optim.swa_utils.AveragedModel",
    tags=("passive", "averages"),
    cases=({},),
)
class AveragedWeights(Callback):
    """Shows the averaged weights to everything that evaluates, predicts or saves during `fit`.

    An optimizer that averages (`use_ema=True`, `Lookahead`, Schedule-Free) trains with one set of weights and is meant
    to be evaluated with another. `fit` ends with the latter; until then the model holds the former. With this callback
    the model holds the weights to evaluate at, which are those that `fit` would end with,

    - during validation, and in every `model.evaluate`, `predict`, `test_on_batch`, `predict_on_batch`, `save`,
      `save_weights` and `export` that is called by any callback at any time;
    - in `on_epoch_end` of all callbacks of this `fit`, wherever in the list they stand, so that `ModelCheckpoint`,
      `EarlyStopping` and your own callbacks see the weights that were validated.

    Afterwards the training weights and the optimizer's state are restored bitwise, from copies, also after an exception
    or Ctrl-C. This callback therefore does not change training, and `fit` ends with the weights that it would have
    ended with; after an exception the model has the training weights, on JAX those to evaluate at. Where a callback
    assigns weights during `on_epoch_end`, they stay, as weights to evaluate at. Passed to `evaluate` or `predict`
    directly, it acts for that call.

    `keras.callbacks.BackupAndRestore` is left alone: it saves in order to resume, and sees the training weights.

    It works with our optimizers, with Keras's that have `use_ema=True`, and with both inside `LossScaleOptimizer` and
    `MultiOptimizer`. Of a model that holds several optimizers, as attributes or in lists and dicts, all that average
    take part, and `fit` ends with their averages; weights that others train are shown as they are. An average that has
    not been updated yet is not shown.

    A file that is saved while the averaged weights are in place can be trained further with our optimizers, since it
    holds the other weights as well; with Keras's training then continues from the average.

    With `start`, it averages by itself, and the optimizer must not (stochastic weight averaging):

    ```text
    a ← (n a + θ) / (n + 1),   n ← n + 1      after the epochs (or updates) start, start + every, start + 2 every, ...
    ```

    with n = 0 at the start and θ the weights that are trained. Everything above holds for this equal average a as well,
    once it has begun, with any optimizer; before, the model shows the training weights. `fit` ends with a. The next
    `fit` continues from there and begins a new average; the training weights are lost. The average takes the memory of
    the weights on the host, in at least float32. Weights that are unfrozen within the window are averaged from then on.
    Weights that a callback assigns during `on_epoch_end` are training weights, too. After an exception the model has
    the training weights, on JAX as well.

    With `batch_norm_data` the moving statistics of batch normalisation are those of a pass over these data with the
    averaged weights; see `keras_optkit.recalibrate_batch_norm`. The pass takes place once for each state of training
    that is evaluated, usually once an epoch, and once more at the end of `fit`, after which the statistics stay.

    When not to use it: without `start` with an optimizer that does not average, which raises, or if only the final
    weights matter. With `start` and a small `every` in updates, where each step would wait for a copy of the weights;
    `use_ema=True` averages inside the step.

    Args:
        batch_norm_data: Inputs, as for `model.predict`, to recalibrate batch normalisation with, but not a generator,
            which yields them once only; None: the statistics of training are used. Arrays are taken in batches of the
            size that `fit` was given.
        start: The first epoch, counted from 0, after which the weights are averaged, or the update count, as in
            `optimizer.iterations`, with 0 as 1, the first there is; >= 0. None: the optimizer averages.
        every: Epochs or updates from one to the next, >= 1. With `steps_per_execution`, or where a step makes several
            updates, the weights are seen between executions only, and of several updates that are due then the last
            counts.
        by: Whether `start` and `every` count `"epoch"`s or `"update"`s.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, or `every` or `by` without `start`. When training (or the evaluation)
            begins: without `start` if no optimizer averages, with it if one does, if `fit` has too few epochs or,
            evaluating alone, if there is no average yet. If `batch_norm_data` was given and the model has no batch
            normalisation, or no `call`; of a model that is not built when training begins, after the first epoch.

    Warns:
        UserWarning: When training ends before the window has begun.

    Source: Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.AdamW(1e-2, use_ema=True), loss="mse")
    best = keras.callbacks.ModelCheckpoint("best.weights.h5", save_best_only=True, save_weights_only=True)
    averaged = ok.callbacks.AveragedWeights()
    model.fit(x, x[:, :1], validation_split=0.25, epochs=2, callbacks=[best, averaged], verbose=0)

    model.compile(optimizer="sgd", loss="mse")
    swa = ok.callbacks.AveragedWeights(start=2)  # the mean of the weights after the last two of four epochs
    model.fit(x, x[:, :1], epochs=4, callbacks=[swa], verbose=0)
    ```
    """

    def __init__(self, batch_norm_data: Any = None, start: int | None = None, every: int = 1, by: str = "epoch"):
        super().__init__()
        self.batch_norm_data = None if batch_norm_data is None else repeatable(batch_norm_data)
        self.start = arguments.integer("start", start, 0, optional=True)
        self.every = arguments.integer("every", every, 1)
        self.by = arguments.choice("by", by, ("epoch", "update"))
        if start is None and (every, by) != (1, "epoch"):
            raise ValueError(f"start must be given with every and by, got start=None, every={every!r}, by={by!r}.")
        self._exchange: Exchange | None = None
        self._training_only = 0
        self._detach: list[Callable[[], None]] = []
        self._statistics: tuple[tuple[int, int], list[Any]] | None = None
        self._empty_window()

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()
        self._empty_window()
        self._refuse_what_cannot_be_averaged()
        model = self.model
        if self.by == "update":
            self._passed = self._points(self._updates())
            self._one_a_batch = others.updates_at_most_once_a_batch(model)
        self._detach = [around(model, name, self.shown) for name in _SHOWING if hasattr(model, name)]
        run = running_fit(model)
        listed = (run.arguments.get("callbacks") if run else None) or [self]
        callbacks = listed.callbacks if isinstance(listed, keras.callbacks.CallbackList) else tree.flatten(listed)
        callbacks = [c for c in callbacks if not getattr(c, "sees_training_weights", False)]
        for callback in callbacks:
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                for name in ("on_epoch_end", "on_train_batch_end"):
                    self._detach.append(around(callback, name, self._not_shown, first=True))
        # from the first callback's on_epoch_end to the last one's; what is added first is entered last and left first
        self._detach.append(around(callbacks[0], "on_epoch_end", self._shown_from_here, first=True))
        self._detach.append(around(callbacks[-1], "on_epoch_end", self._shown_up_to_here, first=True))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._epoch = epoch
        self._batch = 0

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Takes the weights that the previous batch has left, if its update was one to average after.

        `on_train_batch_end` would do the same, but a callback that has it makes Keras wait for every step.
        """
        if self.start is not None and self.by == "update":
            self._wait -= batch - self._batch
            self._batch = batch
            if self._wait <= 0 or not self._one_a_batch:
                self._average_if_due()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._exchange = None  # fit has left the model with the weights to evaluate at
        self._end()
        if self.start is None:
            # `fit` has done so for the compiled one, and callbacks before this one may have set its weights since
            self._put_averages_in(besides=innermost(self.model.optimizer))
        elif self._means:
            self._put_means_in()
        else:
            warnings.warn(
                f"AveragedWeights has averaged nothing: training ended before {self.by} start={self.start}.",
                stacklevel=2,
            )
        separate(self.model)
        if self.batch_norm_data is not None:
            self._recalibrate()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        shown = self._exchange is not None
        self._end()
        if shown and keras.config.backend() == "jax":  # where Keras has done so, too
            self._put_averages_in()
        separate(self.model)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._begin_alone()

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end_alone()

    def on_test_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._end_alone()

    def on_predict_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._begin_alone()

    def on_predict_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end_alone()

    def on_predict_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._end_alone()

    def _begin_alone(self) -> None:
        """For an `evaluate` or `predict` that this callback was passed to, and not `fit`, which has it wrapped."""
        if not self._detach:
            self._refuse_what_cannot_be_averaged(alone=True)
            self._enter()

    def _end_alone(self) -> None:
        if not self._detach:
            self._leave()

    def _end(self) -> None:
        self._training_only = 0
        for detach in self._detach:
            detach()
        self._detach = []
        self._leave()
        self._statistics = None

    def _refuse_what_cannot_be_averaged(self, alone: bool = False) -> None:
        chooses = isinstance(self.model.optimizer, keras.optimizers.MultiOptimizer)  # its parts, by the weights
        if self.model.built and (alone or chooses):
            build_optimizer(self.model)
        if self.start is not None:
            self._refuse_window(alone)
        else:
            self._refuse_unless_averaging(alone)
        self._refuse_batch_norm_data()

    def _refuse_unless_averaging(self, alone: bool) -> None:
        found = innermost_of(self.model)
        unknown = any(isinstance(o, keras.optimizers.MultiOptimizer) for o in found)  # as long as it is not built
        if not self._averaging() and (alone or not unknown):
            got = ", ".join(map(repr, optimizers_of(self.model))) or "none"
            raise ValueError(
                f"AveragedWeights needs an optimizer that averages weights, got {got}. Make it with use_ema=True, or "
                "take Lookahead, ScheduleFree, ScheduleFreeSGD or ScheduleFreeAdamW; or give start to average here."
            )
        if alone and not self._averaging(updated=True):
            raise ValueError("AveragedWeights has no average that could be shown: its optimizer has made no update.")

    def _refuse_batch_norm_data(self) -> None:
        """Unless the model has batch normalisation, or may have once it is built."""
        if self.batch_norm_data is None:
            return
        refuse_if_not_callable(self.model)
        if self.model.built and not any(map(is_batch_norm, sublayers(self.model))):
            raise ValueError(
                f"batch_norm_data must be None for model {self.model.name!r}, which has no batch normalisation."
            )

    def _refuse_window(self, alone: bool) -> None:
        averaging = self._averaging()
        if averaging:
            raise ValueError(
                f"start must be None with an optimizer that averages, {averaging[0]!r}, got {self.start!r}."
            )
        epochs = (self.params or {}).get("epochs")
        if alone and not self._means:
            raise ValueError(f"AveragedWeights(start={self.start!r}) has averaged nothing yet that could be shown.")
        if not alone and self.by == "epoch" and epochs is not None and self.start >= epochs:
            raise ValueError(f"start must be less than the {epochs} epochs of fit, got {self.start!r}.")

    # -- the window ---------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        """The first epoch, or update, to average after; no weights are those after update 0."""
        return max(self.start or 0, int(self.by == "update"))

    def _empty_window(self) -> None:
        self._means: dict[int, Mean] = {}  # by the variable's place in the model
        self._passed = 0  # epochs or updates to average after that have been passed
        self._epoch = self._batch = self._wait = 0

    def _points(self, reached: int) -> int:
        """How many of start, start + every, ... are not above `reached`; before the first update there is nothing."""
        return max(0, (reached - self._first) // self.every + 1)

    def _average_if_due(self) -> None:
        """Called where weights are those of training, and with `by="epoch"` at the end of an epoch."""
        if self.start is None:
            return
        reached = self._epoch if self.by == "epoch" else self._updates()
        if self._points(reached) > self._passed:
            self._average()
        self._passed = self._points(reached)
        self._wait = self._first + self._passed * self.every - reached

    def _average(self) -> None:
        trained = {id(v) for v in self.model.trainable_variables}
        for place, variable in enumerate(self.model.variables):
            if id(variable) in trained:
                value = ops.convert_to_numpy(variable)
                wide = np.zeros(value.shape, at_least_float32(keras.backend.standardize_dtype(variable.dtype)))
                self._means.setdefault(place, Mean(0, wide)).take(value)

    def _put_means_in(self) -> None:
        variables = self.model.variables
        for place, mean in self._means.items():
            variables[place].assign(ops.cast(mean.value, variables[place].dtype))

    def state_dict(self) -> dict[str, Any]:
        """The average so far; empty without `start`, where it is the optimizer's."""
        if self.start is None:
            return {}
        means = [{"place": p, "count": m.count, "value": np.copy(m.value)} for p, m in self._means.items()]
        return {"means": means, "passed": self._passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Args:
            state: What `state_dict` has returned.
        """
        if self.start is not None:
            self._means = {m["place"]: Mean(m["count"], np.copy(m["value"])) for m in state["means"]}
            self._passed, self._wait = state["passed"], 0

    # -- the exchange -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def shown(self, *_: Any, callbacks: Any = None, **__: Any) -> Iterator[None]:
        """Has the model hold the averaged weights inside of the block, during `fit`."""
        if isinstance(callbacks, keras.callbacks.CallbackList) and self in callbacks.callbacks:
            self._average_if_due()  # this is the validation, and the epoch is over
        entered = self._enter()
        try:
            yield
        finally:
            if entered:
                self._leave()

    @contextlib.contextmanager
    def _shown_from_here(self, *_: Any, **__: Any) -> Iterator[None]:
        self._refuse_batch_norm_data()  # of a model that was not built when training began
        self._average_if_due()
        self._enter()
        yield

    @contextlib.contextmanager
    def _shown_up_to_here(self, *_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def _not_shown(self, *_: Any, **__: Any) -> Iterator[None]:
        inside = self._exchange is not None
        self._leave()
        self._training_only += 1
        try:
            yield
        finally:
            self._training_only -= 1
            if inside:
                self._enter()

    def _enter(self) -> bool:
        """Puts the weights to evaluate at into the model; False if they are there already, or are not wanted."""
        if self._exchange is not None or self._training_only or (self.start is not None and not self._means):
            return False
        model = self.model  # asked for it, Keras on JAX fills the variables
        if model.built:
            build_optimizer(model)  # it may hold state that was loaded
        if self.start is None and not self._averaging(updated=True):
            return False
        variables = [*model.variables, *(v for optimizer in optimizers_of(model) for v in optimizer.variables)]
        exchange = Exchange(variables, copies(variables))
        try:
            if self.start is None:
                self._put_averages_in()
            else:
                self._put_means_in()
            separate(model)
            if self.batch_norm_data is not None:
                self._recalibrate_once()
            exchange.inside = copies(variables)
        except BaseException:
            for variable, value in zip(variables, exchange.before, strict=True):
                variable.assign(value)
            raise
        self._exchange = exchange
        return True

    def _averaging(self, *, updated: bool = False) -> list[Any]:
        """The optimizers of the model that average; if wanted, only those that have begun to."""
        found = [optimizer for optimizer in innermost_of(self.model) if averages(optimizer)]
        return [o for o in found if is_lost(o.iterations) or number(o.iterations)] if updated else found

    def _put_averages_in(self, *, besides: Sequence[Any] = ()) -> None:
        for optimizer in self._averaging(updated=True):
            if not is_lost(optimizer.iterations) and not any(optimizer is other for other in besides):
                known = None if isinstance(optimizer, Optimizer) else known_variables(optimizer)
                optimizer.finalize_variable_values(self.model.trainable_weights if known is None else known)

    def _leave(self) -> None:
        """Restores the training weights, unless somebody has assigned others meanwhile.

        Only what the exchange has changed is assigned: a learning rate that a callback has set in between stays.
        """
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.plan is None:
            exchange.plan = self._way_back(exchange)
        for variable, value in exchange.plan:
            variable.assign(value)
        self._exchange = None

    def _way_back(self, exchange: Exchange) -> list[tuple[Any, Any]]:
        own = {id(variable) for variable in self.model.variables}
        plan = []
        for variable, before, inside in zip(exchange.variables, exchange.before, exchange.inside, strict=True):
            if same(before, inside):
                continue
            if id(variable) in own and not same(ops.convert_to_tensor(variable), inside):
                self._statistics = None
                if self.start is None:
                    return []
                continue
            plan.append((variable, before))
        return plan

    def _recalibrate_once(self) -> None:
        """The pass over the data, or what it gave before if no update has come between."""
        layers, now = batch_norms(self.model), (self._updates(), self._passed)
        held = [v for layer in layers for v in layer.non_trainable_variables]
        if self._statistics is None or self._statistics[0] != now:
            self._recalibrate()
            self._statistics = now, copies(held)
        else:
            for variable, value in zip(held, self._statistics[1], strict=True):
                variable.assign(ops.copy(value))

    def _recalibrate(self) -> None:
        run = running_fit(self.model)
        size = run.arguments.get("batch_size") if run else None
        recalibrate_batch_norm(self.model, self.batch_norm_data, batch_size=size, verbose=0)
