"""What `TrainingMonitor` asks the host for: time, memory, and the numbers of the optimizer that are not tensors."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit.callbacks.callback import number
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters, drivable
from keras_optkit.fit.run import running_fit
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import optimizers_of, ours_of, paths_of, unscaled, used_optimizers_of

_MIB = 2.0**20


class Stopwatch:
    """Time spent in training since a mark, without the pauses for validation and between epochs."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._paused: float | None = None
        self._updates = self._batches = 0

    def pause(self) -> None:
        """Stops the watch, if it runs."""
        if self._paused is None:
            self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Goes on after a pause, if there is one."""
        if self._paused is not None and self._begun is not None:
            self._begun += time.perf_counter() - self._paused
        self._paused = None

    def rates(self, updates: int, batches: int, examples: float | None) -> dict[str, float]:
        """Updates and examples a second since it was asked last, given their counts; nothing the first time.

        The first time is left out since the training step is compiled before it.
        """
        now = time.perf_counter() if self._paused is None else self._paused
        begun, self._begun = self._begun, now
        updates, self._updates = updates - self._updates, updates
        batches, self._batches = batches - self._batches, batches
        if begun is None or now <= begun:
            return {}
        rates = {"throughput/updates": updates / (now - begun)}
        if examples is not None:
            rates["throughput/examples"] = batches * examples / (now - begun)
        return rates


def memory() -> dict[str, float]:
    """Memory of this process and, where the backend tells, of its first accelerator, in MiB."""
    return _process_memory() | _accelerator_memory()


def _process_memory() -> dict[str, float]:
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS in bytes
    found = {"memory/process_peak": peak / (_MIB if sys.platform == "darwin" else 1024)}
    pages = Path("/proc/self/statm")  # on Linux
    if pages.exists():
        found["memory/process"] = int(pages.read_text().split()[1]) * resource.getpagesize() / _MIB
    return found


def _accelerator_memory() -> dict[str, float]:
    if keras.config.backend() == "jax":
        import jax

        known = jax.local_devices()[0].memory_stats() or {}  # None on CPUs
        now, peak = known.get("bytes_in_use"), known.get("peak_bytes_in_use")
    else:
        import tensorflow as tf

        known = tf.config.experimental.get_memory_info("GPU:0") if tf.config.list_logical_devices("GPU") else {}
        now, peak = known.get("current"), known.get("peak")
    found = {"memory/accelerator": now, "memory/accelerator_peak": peak}
    return {tag: value / _MIB for tag, value in found.items() if value is not None}


def hyperparameters(model: Any) -> dict[str, float]:
    """The numbers of the optimizers that the last update used, but for the learning rate."""
    run = running_fit(model)
    driven: dict[str, Any] = {}
    for callback in run.callbacks if run else ():
        if isinstance(callback, ScheduleHyperparameters):
            driven |= callback.schedules
    found = {}
    for path, optimizer in paths_of(used_optimizers_of(model)).items():
        for name, value in _of_last_update(optimizer, driven).items():
            found["/".join(["hyperparameters", *([path] if path else []), name])] = value
    return found


def _of_last_update(optimizer: Any, driven: Mapping[str, Any]) -> dict[str, float]:
    before = max(0, number(optimizer.iterations) - 1)  # schedules count the updates that were made before
    found = {}
    for name in _names(optimizer):
        value = driven.get(name, getattr(optimizer, name, None))
        if isinstance(value, LearningRateSchedule):
            value = value(before)
        elif callable(value):
            continue  # a function is the user's, who counts on when it is called
        if isinstance(value, Real | keras.Variable) or keras.ops.is_tensor(value):
            found[name] = float(keras.ops.convert_to_numpy(value))
    return found


def _names(optimizer: Any) -> list[str]:
    """The hyperparameters that may be numbers or schedules of them, without the learning rate."""
    if isinstance(optimizer, Optimizer):
        names = [field.name for field in dataclasses.fields(optimizer.rule) if field.type not in ("bool", bool)]
        return ["weight_decay", *names]
    return [name for name in drivable(optimizer) if name != "learning_rate"]


def skipped(model: Any) -> int | None:
    """How many updates have been left out because of gradients that were not finite; None if nobody counts."""
    counts = [getattr(optimizer, "skipped", None) for optimizer in optimizers_of(model)]
    counts += [inner.nonfinite.skipped for inner in ours_of(model) if inner.skip_nonfinite]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def default_hparams(model: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the optimizers that TensorBoard's table can show, and those of `fit`."""
    run = running_fit(model)
    optimizers = used_optimizers_of(model)
    found: dict[str, Any] = {}
    for of_model, outer in optimizers.items():
        optimizer = unscaled(outer)
        path = f"{of_model}/" if len(optimizers) > 1 else ""
        found[path + "optimizer"] = type(optimizer).__name__
        inside = isinstance(optimizer, keras.optimizers.MultiOptimizer)  # whose config holds functions
        for name, value in () if inside else optimizer.get_config().items():
            if isinstance(value, dict):  # a schedule, say
                value = value.get("class_name")
            if isinstance(value, bool | int | float | str) and name != "name":
                found[path + name] = value
    size = run.arguments.get("batch_size") if run else None
    return found | ({} if size is None else {"batch_size": size}) | {"epochs": params.get("epochs", 1)}
