"""One `fit` that is resumed: what is restored when, and what is written when."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks import bundle
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.identity import SECTIONS, differences, identity, variables, versions
from keras_optkit.callbacks.state import Copies, TrainingState
from keras_optkit.callbacks.stock import has_state, is_known, set_state_of, state_of
from keras_optkit.callbacks.store import Store
from keras_optkit.data import EpochDataset
from keras_optkit.fit.run import Run

if TYPE_CHECKING:
    from keras_optkit.callbacks.resume import Resume


class Position(NamedTuple):
    """Where a run stands: the next batch to train on, both counted from 0."""

    epoch: int
    batch: int


def accepted(accept: Any) -> tuple[str, ...]:
    """Returns the argument `accept` if it names changes."""
    given = (accept,) if isinstance(accept, str) else accept
    if not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"accept must be one or several of {', '.join(SECTIONS)}, got {accept!r}.")
    return tuple(arguments.choice("accept", name, SECTIONS) for name in given)


class _Hooks(keras.callbacks.Callback):
    """Stands first or last in the list of callbacks and calls functions.

    It has no `on_train_batch_end`, which would make Keras wait for every step.
    """

    stateless = True
    sees_training_weights = True  # AveragedWeights leaves them in the model for it

    def __init__(self, **hooks: Callable[..., None]):
        super().__init__()
        for name, function in hooks.items():
            setattr(self, name, function)


class Session:
    """One `fit` with a Resume in it: what is restored when, and what is written when."""

    def __init__(self, owner: Resume, run: Run):
        self._owner = owner
        self._run = run
        self._data: Any = run.arguments.get("x")
        self._inside = isinstance(self._data, EpochDataset)
        self._store = Store(Path(owner.directory), owner.keep)
        self._writer = ThreadPoolExecutor(1, "resume", _stand_back)
        self._copies = Copies()
        self._pending: Future[None] | None = None
        self._signal: int | None = None
        self._undo: list[Callable[[], Any]] = [self._writer.shutdown]
        self._passing: _PassOver | None = None
        self._found: dict[str, Any] | None = None
        self._batch_ahead: Any = None
        self._at_end: int | None = None
        self._since = 0  # batches, and since when, that no bundle holds
        self._saved_at = time.monotonic()

    # -- before fit, and after it -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Locks the directory, reads the newest bundle, and sets the arguments of `fit` to begin there."""
        self._callbacks = [c for c in self._run.listed() if c is not self._owner]
        self._refuse_other_backups()
        self._look_at_data()
        self._look_at_callbacks()
        self._undo.append(self._store.lock())
        self._epochs = self._run.arguments.get("epochs", 1)
        self._begin = Position(self._run.arguments.get("initial_epoch", 0), 0)
        self._found = self._store.newest(self._epochs)
        if self._found is not None:
            self._begin = Position(**self._found["position"])
            self._run.arguments["initial_epoch"] = self._begin.epoch if not self._found["finished"] else self._epochs
            self._owner.resumed_from = self._begin
            self._look_ahead()
            TrainingState(**self._found["state"]).adapt(self._run.model)  # `fit` may build it, with what was adapted
        else:
            self._owner.resumed_from = None
        self._end = self._begin
        self._add_hooks()
        self._listen()

    def close(self) -> None:
        """Waits for the bundle that is being written, and leaves everything as it was found."""
        self._stop_passing_over()
        try:
            self._settle()
        finally:
            while self._undo:
                self._undo.pop()()

    def _look_ahead(self) -> None:
        """Has a batch of a generator ready, to build with, without taking it from training."""
        if inspect.isgenerator(self._data):
            self._batch_ahead = next(self._data, None)
            self._run.arguments["x"] = _with_first(self._batch_ahead, self._data)

    def _refuse_other_backups(self) -> None:
        from keras_optkit.callbacks.resume import Resume  # which has sessions

        for callback in self._callbacks:
            if isinstance(callback, keras.callbacks.BackupAndRestore | Resume):
                raise ValueError(f"callbacks must not have a {type(callback).__name__} beside Resume.")

    def _look_at_data(self) -> None:
        if self._inside:
            return
        in_order = self._owner.every == "epoch" and self._run.arguments.get("shuffle", True) is False
        if in_order and all(hasattr(part, "__array__") for part in keras.tree.flatten(self._data)):
            return  # arrays that are not shuffled, to be continued where an epoch ends
        self._complain(
            "x must be a keras_optkit.data.Shuffled, PerEpoch or another EpochDataset for a run to resume inside "
            f"of an epoch with the same data, got {type(self._data).__name__}.",
            "It will resume where an epoch ended, and the order of the data may be another one then.",
        )

    def _look_at_callbacks(self) -> None:
        inside = [inner for c in self._callbacks if isinstance(c, Callback) for inner in c.inside]
        unknown = sorted({type(c).__name__ for c in [*self._callbacks, *inside] if not is_known(c)})
        if unknown:
            self._complain(
                f"callbacks must have state_dict and load_state_dict in order to resume from their state, and "
                f"{', '.join(unknown)} has not.",
                "If there is such state, it will begin afresh after an interruption.",
            )

    def _complain(self, what: str, otherwise: str) -> None:
        if self._owner.strict:
            raise ValueError(what)
        warnings.warn(f"{what} {otherwise}", stacklevel=6)

    def _add_hooks(self) -> None:
        """Keras's own callbacks are added here, so that what stands last comes after them."""
        if not self._has(keras.callbacks.History):
            self._add(keras.callbacks.History())
        if self._run.arguments.get("verbose", "auto") != 0 and not self._has(keras.callbacks.ProgbarLogger):
            bar = keras.callbacks.ProgbarLogger()
            vars(bar)["async_safe"] = True  # as Keras treats the one that it would add
            self._add(bar)
        self._run.add(_Hooks(on_train_begin=self._check, on_train_batch_begin=self._before_batch), first=True)
        self._run.add(
            _Hooks(
                on_train_begin=self._after_begin,
                on_epoch_begin=self._after_epoch_begin,
                on_epoch_end=self._after_epoch_end,
                on_train_end=self._after_end,
            )
        )

    def _has(self, kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in self._callbacks)

    def _add(self, callback: Any) -> None:
        self._callbacks.append(callback)
        self._run.add(callback)

    def _listen(self) -> None:
        """Takes notice of SIGTERM and Ctrl-C, which Python lets only the main thread do.

        A handler of somebody else's for Ctrl-C stays.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            self._handle(signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handle(signal.SIGINT)

    def _handle(self, number: int) -> None:
        before = signal.signal(number, self._on_signal)
        self._undo.append(functools.partial(signal.signal, number, before))

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._signal = number

    def pass_signal_on(self) -> None:
        """Lets a signal that came after the last batch do what it would have done."""
        if self._signal is not None:
            signal.raise_signal(self._signal)

    # -- inside fit ---------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> Any:
        """The model, asked for through a callback, which has Keras on JAX fill its variables."""
        return self._owner.model

    def _check(self, logs: Any = None) -> None:  # noqa: ARG002
        """Before all other callbacks."""
        self._identity = identity(self._model, self._run.arguments, self._callbacks)
        self._forget_when()
        if self._found is None:
            return
        refuse_unless_same(self._found["identity"], self._identity, self._owner.accept)
        self._say_releases(self._found["versions"])
        if self._begin.batch and not self._inside:
            raise ValueError(
                f"The bundle is from the middle of an epoch, where {type(self._data).__name__} cannot be continued; x "
                "must be a keras_optkit.data.Shuffled, PerEpoch or another EpochDataset, as before."
            )
        if self._inside and self._begin.batch >= len(self._data):
            raise ValueError(
                f"The bundle is from batch {self._begin.batch} of an epoch, and x has {len(self._data)} batches now."
            )
        state = TrainingState(**self._found["state"])
        unbuilt = not state.fits(self._model, metrics=self._metrics_count())
        if unbuilt:
            self._train_once()
            state.forget_steps(self._model)
        refuse_unless_same({"variables": self._found["variables"]}, {"variables": variables(self._model)})
        if unbuilt:
            self._restore_model(self._found)  # undoes the step before other callbacks see it

    def _say_releases(self, saved: Mapping[str, str]) -> None:
        other = differences(saved, versions())
        if other:
            warnings.warn(f"Other releases may compute other bits: {'; '.join(other)}.", stacklevel=8)

    def _metrics_count(self) -> bool:
        """Whether those of the bundle are more than what an epoch begins with."""
        finished = self._found is not None and self._found["finished"]
        return self._inside and bool(self._begin.batch or finished or self._begin.epoch >= self._epochs)

    def _train_once(self) -> None:
        """Has everything built that Keras, or a `train_step`, builds in the first step only, metrics included.

        It is a real step, since only that makes the same variables in every model; what it changes is set afterwards.
        """
        given, model = self._run.arguments, self._model
        names = ("x", "y", "sample_weight", "batch_size", "class_weight", "validation_split")
        once = {name: given[name] for name in names if name in given}
        steps = model.steps_per_execution
        if isinstance(self._data, keras.utils.PyDataset):
            once["x"] = _Repeated(self._data[0], steps)
        elif inspect.isgenerator(self._data):
            once["x"] = _Repeated(self._batch_ahead, steps)
        history, stop = getattr(model, "history", None), model.stop_training
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Your input ran out of data")
            keras.Model.fit(model, **once, epochs=1, steps_per_epoch=steps, validation_freq=2, shuffle=False, verbose=0)
        model.history, model.stop_training = history, stop

    def _after_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """After all other callbacks, many of which begin afresh in `on_train_begin`."""
        if self._found is not None and not self._begin.batch:
            self._restore(self._found)

    def _after_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._epoch, self._batch = epoch, 0
        if self._found is not None and self._begin.batch:
            self._restore(self._found)
            self._data.begin_epoch_at(self._begin.batch)
            self._batch = self._begin.batch
            self._passing = _PassOver(self._model, self._callbacks)

    def _before_batch(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Before any callback hears of this batch, and after all have heard of the end of the one before."""
        if self._passing is not None:
            if batch < self._batch:
                return
            self._stop_passing_over()
        self._since += batch - self._batch
        self._batch = batch
        if self._pending is not None and self._pending.done():
            self._settle()  # to hear of a full disk at once
        if self._inside and (self._signal is not None or self._is_due()):
            self._save(Position(self._epoch, batch))
        self._end_if_asked()

    def _stop_passing_over(self) -> None:
        passing, self._passing = self._passing, None
        if passing is not None:
            passing.end()

    def _after_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """After all other callbacks, the history included."""
        steps = (self._owner.params or {}).get("steps") or self._batch + self._model.steps_per_execution
        self._since += steps - self._batch
        self._end = Position(epoch + 1, 0)
        last = epoch + 1 >= self._epochs or self._model.stop_training
        if self._owner.every == "epoch" or last or self._signal is not None or self._is_due():
            self._save(self._end, last=last)
        self._end_if_asked()

    def _after_end(self, logs: Any = None) -> None:  # noqa: ARG002
        if self._found is not None:  # a run that was finished before
            self._restore_model(self._found)  # others may have changed it
        else:
            self._settle()
            finished = {"epochs": self._epochs, "stopped": bool(self._model.stop_training)}
            packed = self._bundle(self._end, finished | {"continuable": False})
            if self._at_end == _checksum(packed):
                packed = self._bundle(self._end, finished | {"continuable": True})
            self._store.write_finished(packed)
        self._owner.end(finished=True)

    # -- bundles ------------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        every = self._owner.every
        if isinstance(every, timedelta):
            return time.monotonic() - self._saved_at >= every.total_seconds()
        return every != "epoch" and self._since >= every

    def _forget_when(self) -> None:
        self._since, self._saved_at = 0, time.monotonic()

    def _save(self, position: Position, *, last: bool = False) -> None:
        """Copies everything and leaves the writing to the other thread, which may have to finish the one before."""
        self._settle()
        packed, name = self._bundle(position, None), self._store.next_name
        self._at_end = _checksum(packed) if last else None
        self._pending = self._writer.submit(self._store.write, packed)
        if self._owner.on_bundle is not None and not last:
            self._settle()
            self._owner.on_bundle(name)
        self._forget_when()

    def _bundle(self, position: Position, finished: Any) -> bundle.Packed:
        self._copies.restart()  # the last one is written
        return bundle.pack(
            self._store.names(finished=finished is not None)
            | {
                "position": position._asdict(),
                "finished": finished,
                "identity": self._identity,
                "variables": variables(self._model),
                "versions": versions(),
                "state": vars(TrainingState.of(self._model, self._copies)),
                "callbacks": {key: state_of(c) for key, c in self._keyed()},
                "data_epoch": self._data.epoch if self._inside else None,
            }
        )

    def _restore(self, found: dict[str, Any]) -> None:
        for key, callback in self._keyed():
            if key in found["callbacks"]:  # or the change was accepted
                set_state_of(callback, found["callbacks"][key])
        self._restore_model(found)
        if self._inside:
            self._data.epoch = found["data_epoch"]
        self._say("is finished, after" if found["finished"] else "resumes after", Position(**found["position"]))
        if not found["finished"]:
            self._found = None  # it may be large

    def _restore_model(self, found: dict[str, Any]) -> None:
        """Metrics only where they count, since they may not be built."""
        TrainingState(**found["state"]).into(self._model, metrics=self._metrics_count())

    def _say(self, what: str, position: Position) -> None:
        """As the progress bar counts."""
        if self._run.arguments.get("verbose", "auto") != 0:
            after = (
                f"{position.batch} batches of epoch {position.epoch + 1}"
                if position.batch
                else f"epoch {position.epoch}"
            )
            print(f"Resume: the run in {self._owner.directory} {what} {after}.")

    def _keyed(self) -> Iterator[tuple[str, Any]]:
        """The callbacks that have state, by class, and by number among those of one class."""
        seen: Counter[str] = Counter()
        for callback in self._callbacks:
            if has_state(callback):
                name = type(callback).__name__
                yield f"{name}.{seen[name]}", callback
                seen[name] += 1

    def _settle(self) -> None:
        """Waits for the bundle that is being written, and raises what its writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _end_if_asked(self) -> None:
        asked, self._signal = self._signal, None
        if asked is not None:
            self._settle()
            print(f"Resume: {signal.Signals(asked).name}; the run in {self._owner.directory} can be resumed.")
            raise KeyboardInterrupt if asked == signal.SIGINT else SystemExit(128 + asked)


class _Repeated(keras.utils.PyDataset):
    """The same batch so many times."""

    def __init__(self, batch: Any, times: int):
        super().__init__()
        self._batch, self._times = batch, times

    def __len__(self) -> int:
        return self._times

    def __getitem__(self, index: int) -> Any:
        return self._batch


def _with_first(batch: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if batch is not None:
        yield batch
    yield from rest


class _PassOver:
    """Lets `fit` count batches without training on them and without telling the callbacks; they had them before."""

    def __init__(self, model: Any, callbacks: Sequence[Any]):
        self._model, self._train = model, model.train_function
        self._own = [(callback, {name: vars(callback).get(name) for name in _BATCH_HOOKS}) for callback in callbacks]
        model.train_function = self._step
        for callback, own in self._own:
            vars(callback).update(dict.fromkeys(own, _nothing))

    def _step(self, *state_and_iterator: Any) -> Any:
        state = state_and_iterator[:-1]  # on JAX
        return ({}, *state) if state else {}

    def end(self) -> None:
        self._model.train_function = self._train
        for callback, own in self._own:
            for name, hook in own.items():
                if hook is None:
                    del vars(callback)[name]
                else:
                    vars(callback)[name] = hook


_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end")


def _nothing(batch: int, logs: Any = None) -> None:
    pass


def refuse_unless_same(saved: Mapping[str, Any], here: Mapping[str, Any], accept: Collection[str] = ()) -> None:
    """Raises with the differences between the run that a bundle comes from and this one."""
    changed = {name: differences(saved.get(name), here.get(name), name) for name in {**saved, **here}}
    changed = {name: lines for name, lines in changed.items() if lines and name not in accept}
    lines = [line for of_one in changed.values() for line in of_one]
    if not lines:
        return
    shown = lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]
    meant = ""
    if changed.keys() <= set(SECTIONS):
        names = [*accept, *changed]
        meant = f"\nIf the change is meant, resume with Resume(..., accept={names!r})."
    raise ValueError(
        "The bundle comes from another run:\n  "
        + "\n  ".join(shown)
        + meant
        + "\nTake another directory, or empty this one, to begin a new run."
    )


def _checksum(packed: bundle.Packed) -> int:
    """Of what a model, its optimizers and callbacks hold."""
    tree = json.loads(packed.text)["tree"]
    held = {name: tree[name] for name in ("state", "callbacks")}
    total = zlib.crc32(json.dumps(held).encode())
    for array in packed.arrays.values():
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, total)
    return total


def _stand_back() -> None:
    """Has the calling thread run where others leave time; known on Linux, where a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
