"""Validation by the number of updates, and callbacks that go by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks import others
from keras_optkit.callbacks.averaging import AveragedWeights
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.checkpoint import Checkpoint
from keras_optkit.callbacks.listing import Due
from keras_optkit.callbacks.state import assign, values_of
from keras_optkit.callbacks.stock import has_state, set_state_of, state_of
from keras_optkit.fit.hooks import around
from keras_optkit.fit.run import running_fit
from keras_optkit.registry import register

_X, _Y = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3), np.zeros((4, 1), "float32")


@register(
    "callback",
    paper="Validation by updates, as is usual where an epoch is long; Prechelt 1998 stops by such strips of training",
    parity="model.evaluate by hand after every n-th train_on_batch",
    cases=({"every": 3, "data": [_X, _Y]}, {"every": 7, "data": [_X, _Y], "batch_size": 2, "prefix": "other_"}),
    tags={"passive"},
)
class ValidateEvery(Callback):
    """Validates after every so many updates of the weights, and lets other callbacks go by that.

    An epoch may take hours, or there is only one. The model is then evaluated within it, by `model.evaluate`, at the
    first batch after every `every` updates, and at the end of an epoch that ends with one. Gradient accumulation makes
    fewer updates than batches; with `steps_per_execution=k` it is the first execution after which a validation is due.
    The metrics of the epoch are put back afterwards, so that training and its logs are what they would be without.

    `callbacks` are called once for each validation instead of once for each epoch: `on_epoch_end(k, logs)` after
    validation k, counted from 0, with the values of the validation, named `"val_loss"` and so on. `EarlyStopping`
    with `patience=5` then stops after 5 validations without improvement, `ReduceLROnPlateau` counts validations as
    well, and so do Keras's callbacks and your own. What they print or name by epochs is the number of the validation;
    `Checkpoint` names its files by the updates as well. One that stops training does so after the batch that follows.
    Callbacks that look at batches or prepare `fit`, such as
    `TrainingMonitor` and `Resume`, go into the list of `fit`, and are refused here. So is a callback that is in both.

    The values of the last validation of an epoch are added to the logs of the epoch, for `History`, TensorBoard and
    the callbacks that come later in the list, unless `fit` has validated itself. `history` has all of them.

    Validations of updates that `NonFiniteGuard` takes back stay in `history`, and have counted.

    With `keras_optkit.callbacks.AveragedWeights` in the list of `fit`, what is evaluated, and what `callbacks` see, are
    the averaged weights. With `keras_optkit.callbacks.Resume` a run continues after an interruption as if there had
    been none, with the callbacks in here.

    When not to use it: with short epochs, for which `validation_data` of `fit` does the same.

    Args:
        every: Updates between two validations, at least 1.
        data: As `validation_data` of `fit`: `(x, y)` or `(x, y, sample_weight)`, a `tf.data.Dataset` or a `PyDataset`,
            which has to end; or `x` alone, for a model whose loss needs no targets.
        callbacks: Those that go by the validations.
        batch_size: Rows of `x` in a batch; None for that of the validation in `fit`, or of its training, or 32.
        prefix: What the names of the values begin with. A second `ValidateEvery`, with other data, needs another one.
        verbose: 1 prints the values of each validation, 0 is silent.

    Attributes:
        history: The values of all validations of this `fit`, a list for each name, with the updates they came after
            under `"updates"`.

    Raises:
        TypeError: For a value of a wrong type, such as data that can be read once.
        ValueError: For a value out of range; when training begins, for callbacks that cannot be in here.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((256, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.SGD(0.1), loss="mse")
    stopping = ok.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    validate = ok.callbacks.ValidateEvery(4, (x[192:], x[192:, :1]), callbacks=[stopping])
    model.fit(x[:192], x[:192, :1], batch_size=8, epochs=1, callbacks=[validate], verbose=0)
    print(validate.history["updates"], validate.history["val_loss"])  # [4, 8, 12, 16, 20, 24]
    ```
    """

    #: `EarlyStopping` and the like look for names of a validation, which `fit` itself need not have.
    validates = True

    def __init__(
        self,
        every: int,
        data: Any,
        callbacks: Sequence[Any] = (),
        batch_size: int | None = None,
        prefix: str = "val_",
        verbose: int = 0,
    ):
        super().__init__()
        self.every = arguments.integer("every", every, 1)
        self.data = _checked_data(data)
        self.callbacks = _checked_callbacks(callbacks)
        self.batch_size = arguments.integer("batch_size", batch_size, 1, optional=True)
        if batch_size is not None and not isinstance(self.data, tuple | list):
            raise ValueError(f"batch_size must be None for data that come in batches, got {batch_size!r}.")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"prefix must be a string that is not empty, such as 'val_', got {prefix!r}.")
        self.prefix = prefix
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self._reset()

    def _reset(self) -> None:
        self.history: dict[str, list[Any]] = {"updates": []}
        self._latest: dict[str, float] = {}  # of this epoch
        self._stopped = False  # by a callback in here

    @property
    def inside(self) -> Sequence[Any]:
        """The callbacks that go by the validations."""
        return self.callbacks

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        self._refuse_what_fit_has_too()
        self._reset()
        self._due = Due(self.every, self._updates(), others.updates_at_most_once_a_batch(self.model))
        for callback in self.callbacks:
            callback.set_model(self.model)
            callback.set_params(self.params)
            callback.on_train_begin(logs)
        self._begin_strip()

    def _refuse_what_fit_has_too(self) -> None:
        fit = running_fit(self.model)
        listed = [] if fit is None else fit.listed()
        both = [type(c).__name__ for c in self.callbacks if any(c is other for other in listed)]
        if both:
            raise ValueError(f"callbacks must not be in the list of fit as well, got {', '.join(both)} in both.")
        same = [c for c in listed if isinstance(c, ValidateEvery) and c is not self and c.prefix == self.prefix]
        if same:
            raise ValueError(f"prefix must be another one for each ValidateEvery of a fit, got {self.prefix!r} twice.")

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._due.begin_epoch()
        self._latest = {}

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Validates if it is due after the previous batch; `on_train_batch_end` would make Keras wait for every one."""
        if self._due.inside_epoch(batch, self._updates):
            self._validate()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if not self._stopped and self._due.after_epoch(self._updates):
            self._validate()
        if logs is not None:
            logs.update({name: value for name, value in self._latest.items() if name not in logs})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        for callback in self.callbacks:
            callback.on_train_end(logs)

    def on_train_failure(self, error: BaseException) -> None:  # noqa: D102
        for callback in reversed(self.callbacks):
            if isinstance(callback, Callback):
                callback.on_train_failure(error)

    # -- a validation -------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        with contextlib.ExitStack() as stack:
            fit = running_fit(self.model)
            for callback in fit.listed() if fit else ():
                if isinstance(callback, AveragedWeights):
                    stack.enter_context(callback.shown())
            logs = {self.prefix + name: float(value) for name, value in self._evaluate().items()}
            count = len(self.history["updates"])
            self.history["updates"].append(self._updates())
            for name, value in logs.items():
                self.history.setdefault(name, []).append(value)
            self._latest = logs
            if self.verbose:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
                print(f"{type(self).__name__}: update {self.history['updates'][-1]}, {shown}")
            before = self.model.stop_training
            for callback in self.callbacks:
                callback.on_epoch_end(count, logs)
            self._stopped = self.model.stop_training and not before
        if not self._stopped:
            self._begin_strip()

    def _begin_strip(self) -> None:
        """Begins what the callbacks take for an epoch."""
        for callback in self.callbacks:
            callback.on_epoch_begin(len(self.history["updates"]), {})

    def _evaluate(self) -> dict[str, Any]:
        model = self.model
        given: dict[str, Any] = {"x": self.data}
        if isinstance(self.data, tuple | list):
            fit = running_fit(model)
            of_fit = {} if fit is None else fit.arguments
            size = self.batch_size or of_fit.get("validation_batch_size") or of_fit.get("batch_size")
            given = {**dict(zip(("x", "y", "sample_weight"), self.data, strict=False)), "batch_size": size}
        remove = around(model, "evaluate", self._metrics_kept)  # inside of those that look at the metrics
        try:
            return model.evaluate(**given, verbose=0, return_dict=True)
        finally:
            remove()

    @contextlib.contextmanager
    def _metrics_kept(self, *_: Any, **__: Any) -> Iterator[None]:
        """Puts the metrics back that `evaluate` resets, so that the epoch keeps its own."""
        model = self.model
        held = [(variable, values_of(model, variable, np.array)) for variable in model.metrics_variables]
        try:
            yield
        finally:
            for variable, values in held:
                assign(self.model, variable, values)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """When the next validation is due, what there was so far, and the state of the callbacks in here."""
        return {
            "due": self._due.state_dict(),
            "history": self.history,
            "latest": self._latest,
            "callbacks": [state_of(callback) if has_state(callback) else {} for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from there.

        Args:
            state: What `state_dict` returned.
        """
        self._due.load_state_dict(state["due"])
        self.history = {name: list(values) for name, values in state["history"].items()}
        self._latest = dict(state["latest"])
        self._begin_strip()
        for callback, held in zip(self.callbacks, state["callbacks"], strict=True):
            if has_state(callback):
                set_state_of(callback, held)


def _checked_data(data: Any) -> Any:
    wanted = "(x, y), (x, y, sample_weight), x alone, a tf.data.Dataset or a PyDataset"
    if data is None or hasattr(data, "__next__") or isinstance(data, str | bytes | Mapping):
        raise TypeError(f"data must be {wanted}, which can be read again and again, got a {type(data).__name__}.")
    if hasattr(data, "cardinality") and int(data.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise ValueError("data must end, got a dataset without an end (see repeat()).")
    if isinstance(data, tuple | list) and len(data) not in (1, 2, 3):
        raise ValueError(f"data must have 1 to 3 parts, x, y and sample_weight, got {len(data)}.")
    return data


def _checked_callbacks(callbacks: Any) -> list[Any]:
    if isinstance(callbacks, keras.callbacks.Callback) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a list of callbacks, got {callbacks!r}.")
    for callback in callbacks:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"callbacks must be a list of callbacks, got {callback!r} in it.")
        by_epoch = getattr(callback, "save_freq", None) == "epoch"  # of Keras's ModelCheckpoint
        of_batches = others.hooks_of_batches(callback) and not (by_epoch or isinstance(callback, Checkpoint))
        prepares = isinstance(callback, Callback) and type(callback).prepare_fit is not Callback.prepare_fit
        if of_batches or prepares or isinstance(callback, AveragedWeights | ValidateEvery):
            raise ValueError(
                f"callbacks must go by the ends of epochs alone, got {type(callback).__name__}: put it into the list "
                "of fit."
            )
    return list(callbacks)
