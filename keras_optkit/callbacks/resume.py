"""A run that resumes after a crash as if there had been none."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.session import Session, accepted
from keras_optkit.fit.run import Run
from keras_optkit.registry import register


@register(
    "callback",
    paper="Exact continuation: the state of the whole run, not of the weights alone",
    parity="the run that was not interrupted, bitwise",
    tags=("passive", "resumes"),
    cases=({"directory": "bundles"}, {"directory": "others", "every": 2}),
)
class Resume(Callback):
    """Lets a run that was killed resume when the same script is run again, as if nothing had happened.

    From time to time everything that the rest of the run depends on is written to a file, called a bundle: the weights,
    the optimizers, metrics, the random generators, the learning rate, the state of the other callbacks, the history,
    and the place in the data. When the script is run again, `fit` begins from the newest bundle. With op determinism
    (`tf.config.experimental.enable_op_determinism()`), on the same machine, all of them end bitwise equal to those of a
    run without an interruption, however often and wherever it was killed.

    **Models.** Any model that `fit` trains: with a `train_step` of its own, several optimizers, or not built. Where a
    model has variables that only a step makes, a resumed `fit` first trains one step on a batch, which is then undone.

    **Data.** Inside an epoch, data can only be continued if their order is a function of the epoch:
    `keras_optkit.data.Shuffled` for arrays, `keras_optkit.data.PerEpoch` for `tf.data`, or another
    `keras_optkit.data.EpochDataset`. With anything else bundles are written at the end of epochs, and a warning says
    so; the order of the data after an interruption then depends on the data.

    **Callbacks.** Those of this package and Keras's EarlyStopping, ReduceLROnPlateau, ModelCheckpoint, CSVLogger,
    TensorBoard, SwapEMAWeights, LearningRateScheduler and History resume from their state. Your own take part with two
    methods, `state_dict()` and `load_state_dict(state)`; those without are named in a warning. `BackupAndRestore` is
    refused. The place of this callback in the list does not matter.

    **Files.** A bundle is written by another thread, to a temporary name, synced and renamed, so that there is always a
    whole one. A digest reveals a damaged bundle; the one before is then used, with a warning, and if there is none, it
    is an error. A second process that trains in the same directory is refused as well. Bundles can be read with
    `numpy.load`.

    **Another run.** A bundle of another model, other data, another optimizer, other callbacks or other code is refused
    with the differences. Functions and classes are compared by what they do, not by comments or where they stand in a
    file; arrays by all of their rows. Of data that are read as they come, only the kind can be compared. Name an
    intended change in `accept`.

    **Signals.** On SIGTERM, which announces preemption, a bundle is written after the present batch, and the process
    ends with `SystemExit(143)`. Ctrl-C does the same and ends with `KeyboardInterrupt`; a second one ends at once.

    **A finished run** is not repeated: `fit` returns at once, and model, callbacks and history are those of its end.
    With more `epochs` than before it continues from its last epoch, unless another callback had stopped it.

    When not to use it: across machines of different kinds, releases of libraries or numbers of devices; there, save
    weights and accept another run. For layers that draw from TensorFlow's own stateful random operations, whose state
    cannot be read; `keras.random` with a `SeedGenerator` and an attribute that is a `tf.random.Generator` can.

    Args:
        directory: Where bundles are kept, one directory for one `fit`; made if it does not exist.
        every: `"epoch"`, a number of batches, or a `datetime.timedelta`, after which a bundle is written. After the
            last epoch there always is one.
        keep: Bundles to keep, at least 1.
        strict: Whether data that cannot be continued inside an epoch, and callbacks whose state is not known, are
            errors instead of warnings.
        accept: What may differ from the run that the bundle comes from, one or several of `"model"`, `"optimizer"`,
            `"compile"`, `"data"`, `"validation"`, `"fit"`, `"callbacks"` and `"backend"`. The error about a difference
            says which one it needs. The weights must have the same shapes all the same.

    Attributes:
        resumed_from: `(epoch, batch)` that the last `fit` began from, the next to be trained on, or None.
        on_bundle: A function that is called with the name of each bundle once it is written, before training continues;
            not with that of the end of a run. None: nothing is called.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; from `fit`, for a bundle of another run or of another version of this
            package, for data or callbacks as described under `strict`, and for `BackupAndRestore` beside it.
        RuntimeError: From `fit`, if no bundle can be used of those that are there, if something else has the name of
            one, or if another process uses the directory.
        OSError: From `fit`, if a bundle cannot be written; those that are there are kept.

    Example:
    ```python
    import tempfile

    import keras
    import numpy as np

    import keras_optkit as ok


    def train(directory):
        keras.utils.set_random_seed(1)
        x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
        model.compile(optimizer="adam", loss="mse")
        data = ok.data.Shuffled(x, x[:, :1], batch_size=16, seed=1)
        resume = ok.callbacks.Resume(directory, every=2)
        return model.fit(data, epochs=3, callbacks=[resume], verbose=0).history["loss"]


    with tempfile.TemporaryDirectory() as directory:
        assert train(directory) == train(directory)  # the second one returns at once
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: str | int | timedelta = "epoch",
        keep: int = 2,
        strict: bool = False,
        accept: str | Collection[str] = (),
    ):
        super().__init__()
        self.directory = arguments.path("directory", directory)
        self.every = arguments.interval("every", every)
        self.keep = arguments.integer("keep", keep, 1)
        self.strict = arguments.boolean("strict", strict)
        self.accept = accepted(accept)
        self.resumed_from: tuple[int, int] | None = None
        self.on_bundle: Callable[[str], None] | None = None
        self._session: Session | None = None
        self._over = False

    def prepare_fit(self, run: Run) -> None:
        """Called when `fit` begins, before anything else: finds out where to begin, and changes its arguments."""
        if self._session is not None:
            raise RuntimeError(f"{self!r} is part of a fit that is running.")
        if self._over:
            raise ValueError(
                f"directory={self.directory!r} holds the run that this Resume has finished. Give each fit one "
                "with a directory of its own."
            )
        run.callbacks.append(self)  # to be told of a failure from now on
        self._session = Session(self, run)
        self._session.open()

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self._session is None:
            raise RuntimeError(f"{self!r} works in keras.Model.fit only, whose arguments it has to change.")

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self.end(finished=False)

    def end(self, *, finished: bool) -> None:
        """Called when `fit` has ended."""
        session, self._session = self._session, None
        self._over = self._over or finished
        if session is not None:
            session.close()
            if finished:
                session.pass_signal_on()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what this callback knows is the bundle itself."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""
