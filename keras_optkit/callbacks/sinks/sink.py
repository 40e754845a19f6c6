"""The protocol of the places that `TrainingMonitor` writes to."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_optkit import arguments


@dataclass(frozen=True)
class Opening:
    """What a sink is told when a `fit` begins, or a report of `inspect` is to be written.

    Attributes:
        log_dir: The directory of the monitor, which exists; None for a report.
        absent: How the tags begin that this `fit` has no values of, such as `"train/loss_scale"`.
        unchanged: Whether nobody has written to `log_dir` since the sink was closed, by the lines of JSON in it.

    Example:
    ```python
    import keras_optkit as ok

    opening = ok.callbacks.sinks.Opening("logs", absent=("train/loss_scale",))
    print(opening.unchanged)
    ```
    """

    log_dir: str | None = None
    absent: tuple[str, ...] = ()
    unchanged: bool = False


class Sink:
    """A place that `TrainingMonitor` writes to besides its lines of JSON. Subclass it; only `write_values` is required.

    The monitor calls `open` when a `fit` begins, `write_hparams` once in it, the other methods that write in any order,
    `flush` at the end of every epoch, and `close` when the `fit` ends, also by an exception. The steps of values of
    updates rise, and so do those of values of epochs; an update and an epoch may have the same step. A sink is opened
    again for the next `fit`, in the same process or, as a new object, in another.

    What a method does not override is not written there. An exception in a sink ends the `fit`; the lines of JSON are
    written first.

    When not to use it: for what changes training, or needs the model; write a `keras.callbacks.Callback`.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok


    class Printer(ok.callbacks.sinks.Sink):
        def write_values(self, values, step, *, of_epoch):
            print(step, values.get("train/loss", values.get("epoch/loss")))


    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    with tempfile.TemporaryDirectory() as logs:
        monitor = ok.callbacks.TrainingMonitor(logs, every=2, sinks=[Printer()])
        model.fit(x, x[:, :1], batch_size=16, callbacks=[monitor], verbose=0)
    ```
    """

    def place(self) -> Hashable:
        """What no two sinks of one monitor may have in common; by default a sink is a place of its own."""
        return id(self)

    def open(self, opening: Opening) -> None:
        """Called when a `fit` begins.

        Args:
            opening: The directory, and what is known of it.
        """

    def last_step(self, *, of_epoch: bool) -> int | None:  # noqa: ARG002
        """The last step that the place has values of; called after `open`.

        Values up to this step are not written, so that a run that is resumed writes none a second time.

        Args:
            of_epoch: Whether of the values of epochs, or of those of updates.

        Returns:
            The step, -1 without values. None where the place cannot be asked: it is then given the values that are new
            to the monitor's lines of JSON.
        """
        return None

    def write_values(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> None:
        """Writes the values of an update or of an epoch.

        Args:
            values: Value by tag; NaN and infinities are among them.
            step: The number of updates until then.
            of_epoch: Whether they are the logs of an epoch, whose tags begin with "epoch/".
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method write_values.")

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters, which `fit` says each time; keep those that the run has.

        Args:
            hparams: Number, string or boolean by name.
        """

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text, such as the findings.

        Args:
            tag: Its tag.
            text: Markdown.
            step: The number of updates until then.
        """

    def write_histograms(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Writes how the elements of each array are distributed.

        Args:
            arrays: Array by tag.
            step: The number of updates until then.
        """

    def write_figure(self, tag: str, png: bytes, step: int) -> None:
        """Writes a picture.

        Args:
            tag: Its tag.
            png: The bytes of a PNG file.
            step: The number of updates until then.
        """

    def flush(self) -> None:
        """Makes what was written readable for others; called at the end of every epoch."""

    def close(self, *, failed: bool) -> None:
        """Called when the `fit` ends, once for each `open`, even if that raised.

        Args:
            failed: Whether an exception has ended it.
        """


def writes(sink: Sink, method: str) -> bool:
    """Whether a sink overrides a method."""
    return getattr(type(sink), method) is not getattr(Sink, method)


def checked_sinks(sinks: Any) -> tuple[Sink, ...]:
    """Returns the argument `sinks` as a tuple if it is a list of different sinks."""
    wanted = "sinks must be None or a list of ok.callbacks.sinks.Sink"
    if not isinstance(sinks, list | tuple):
        raise TypeError(f"{wanted}, got {sinks!r} of type {type(sinks).__name__}.")
    for sink in sinks:
        if not isinstance(sink, Sink):
            raise TypeError(f"{wanted}, got {sink!r} of type {type(sink).__name__} in it.")
        if not writes(sink, "write_values"):
            raise TypeError(f"{wanted} that override write_values, got {sink!r}, which does not.")
    places = [sink.place() for sink in sinks]
    if len(set(places)) < len(places):
        raise ValueError(f"{wanted} that write to different places, got {sinks!r}.")
    return tuple(sinks)


class RunSink(Sink):
    """A sink that writes to a run of another package: one that is given, the active one, or one that it makes itself.

    Args:
        run: The run; None for the active one; or a function without arguments that begins one in each `fit`.
    """

    def __init__(self, run: Any = None):
        self.run = arguments.without_arguments("run", run) if callable(run) else run
        self._now: Any = None  # the run while it is open

    def _active(self) -> Any:
        """The active run of the package, or None."""
        raise NotImplementedError

    def _finish(self, *, failed: bool) -> None:
        """Ends a run that the function has begun."""
        raise NotImplementedError

    def open(self, opening: Opening) -> None:  # noqa: ARG002
        """Looks the run up, or begins it.

        Raises:
            ImportError: Without the package.
            RuntimeError: If there is no run.
        """
        active = self._active()
        self._now = self.run() if callable(self.run) else active if self.run is None else self.run
        if self._now is None:
            raise RuntimeError(
                f"run of sinks.{type(self).__name__} must be a run, a function that returns one, or None while one is "
                f"active; got {self.run!r}, and there is none."
            )

    def close(self, *, failed: bool) -> None:
        """Ends the run if the function has begun it; one that was given is left as it is."""
        if self._now is not None and callable(self.run):
            self._finish(failed=failed)
        self._now = None
