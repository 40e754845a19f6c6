"""`find_batch_size`: throughput and memory of a training step, and the noise of the gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit import arguments
from keras_optkit.data import Shuffled
from keras_optkit.finding.noise_scale import Timer, noise_scales
from keras_optkit.finding.trial import (
    as_found,
    build,
    checked_arrays,
    checked_model,
    run,
    state_as_found,
    used_optimizers,
)
from keras_optkit.fit.steps import compile_anew
from keras_optkit.tables import table

Tensor = Any

#: A smaller batch is suggested if its throughput is at least this share of the best one's.
NEARLY = 0.9

#: Batches of up to this many times the noise scale may be suggested.
ABOVE_NOISE = 2

#: A noise scale that has grown by more than this in the second half of the warm-up is still rising.
RISING = 1.5

#: Examples of a batch of the warm-up before the noise is measured, or the next size below that.
USUAL = 32


@dataclass(frozen=True)
class Measured:
    """What was measured with one batch size.

    Attributes:
        size: The batch size.
        seconds: Median time of a training step; None if it ran out of memory.
        memory: Peak of the memory in use, in bytes: that of the device, on CPUs that of the whole process. None if it
            ran out of memory or cannot be told.
    """

    size: int
    seconds: float | None = None
    memory: int | None = None

    @property
    def throughput(self) -> float | None:
        """Examples in a second."""
        return None if self.seconds is None else self.size / self.seconds


@dataclass(frozen=True)
class BatchSizes:
    """The result of `find_batch_size`.

    Attributes:
        rows: What was measured, by size.
        noise_scale: B, in examples, after the warm-up; infinite where the gradient is lost in its noise; None if it was
            not measured.
        doubt: What is wrong with the noise scale, or "".
    """

    rows: tuple[Measured, ...]
    noise_scale: float | None
    doubt: str = ""

    @property
    def suggestion(self) -> int | None:
        """The size to use; None if not even the smallest fits into memory. See `find_batch_size` for the rule."""
        return self._suggestion(math.inf if self.noise_scale is None else self.noise_scale)

    def _suggestion(self, noise_scale: float) -> int | None:
        fit = [row for row in self.rows if row.throughput is not None]
        if not fit:
            return None
        highest = ABOVE_NOISE * noise_scale
        useful = [row for row in fit if row.size <= highest] or fit[:1]
        best = max(_throughput(row) for row in useful)
        return next(row.size for row in useful if _throughput(row) >= NEARLY * best)

    def table(self) -> str:
        """The measurements as text; the suggested size is marked."""
        lines = [("batch size", "ms/step", "examples/s", "peak MiB", "")]
        for row in self.rows:
            if row.seconds is None:
                lines.append((str(row.size), "", "", "", "out of memory"))
            else:
                memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
                mark = "*" if row.size == self.suggestion else ""
                lines.append((str(row.size), f"{1e3 * row.seconds:.2f}", f"{_throughput(row):.0f}", memory, mark))
        noise = "not measured" if self.noise_scale is None else f"{self.noise_scale:.3g} examples"
        doubt = [f"{self.doubt[:1].upper()}{self.doubt[1:]}."] * bool(self.doubt)
        return "\n".join([*table(lines, left=[4]), "", f"gradient noise scale: {noise}", *doubt])

    def __str__(self) -> str:
        return self.table()

    def plot(self, ax: Any = None) -> Any:
        """Draws throughput over batch size, with the noise scale and the suggestion. Needs matplotlib.

        Args:
            ax: Matplotlib axes to draw on; new ones when left out.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots()[1]
        fit = [row for row in self.rows if row.throughput is not None]
        ax.plot([row.size for row in fit], [row.throughput for row in fit], "o-", label="throughput")
        for row in self.rows:
            if row.throughput is None:
                ax.axvline(row.size, color="C3", linestyle="--", label="out of memory")
        if self.noise_scale is not None and math.isfinite(self.noise_scale):
            ax.axvline(self.noise_scale, color="C1", linestyle=":", label=f"noise scale: {self.noise_scale:.3g}")
        if self.suggestion is not None:
            ax.axvline(self.suggestion, color="C2", label=f"suggestion: {self.suggestion}")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("batch size")
        ax.set_ylabel("examples/s")
        ax.legend()
        return ax


def _throughput(row: Measured) -> float:
    assert row.throughput is not None
    return row.throughput


def find_batch_size(
    model: keras.Model,
    data: Any,
    sizes: Sequence[int] | None = None,
    *,
    max_size: int = 1024,
    steps: int = 10,
    warm_up: int = 2,
    noise_batches: int = 16,
    noise_warm_up: int = 100,
    seed: int = 0,
    verbose: str | int = "auto",
) -> BatchSizes:
    """Finds a batch size from the time and memory of a training step and the noise of the gradient.

    For each size the model is trained for `warm_up + steps` steps, each size from the same weights: the time of a step
    is the median of the last `steps`, and the peak of the memory is that of all of them. A size that runs out of memory
    ends the measurement, and the table says so.

    The simple noise scale B = tr(Σ) / |G|², with G the true gradient and Σ the covariance of that of one example, is
    the batch size at which noise and signal in a batch's gradient are equal. Batches that are much smaller need hardly
    fewer examples in all, and much larger ones hardly fewer steps. From gradients g_1 ... g_K of batches of b
    examples at the same weights, with ḡ their mean,

    ```text
    |G|²   ≈  (B' |ḡ|² - b mean |g_k|²) / (B' - b)           B' = K b
    tr(Σ)  ≈  (mean |g_k|² - |ḡ|²) / (1/b - 1/B')
    ```

    which are unbiased; their ratio is less so, and uncertain for small K. b is the largest size for which there are K
    batches. An estimate of |G|² that is not positive makes B infinite: the gradient cannot be told from its noise.

    At random weights, where all examples pull in one direction, B is far below its value during nearly all of training:
    it rises steeply in the first updates and slowly after that. So the model is first trained for `noise_warm_up`
    updates, with its own optimizer and batches of 32, and B is measured in the middle and at the end of them. Where it
    rises by more than half in between, it is a lower bound; `doubt` and a warning say so if it limits the suggestion.

    The suggestion is the smallest size with at least 90 % of the best throughput among the sizes up to 2 B (the
    smallest size, if none is).

    Everything is restored as after `find_learning_rate`, also when memory runs out.

    When not to use it: for the time of the input pipeline: the batches here come from memory. Nor for a final value of
    B, which keeps rising as the loss falls: measure it again later in training, with `noise_warm_up=0`. Dropout and
    batch normalization count as noise of the gradient, which for the latter depends on b. B is not measured, and
    `doubt` says so, where a `train_step` may use other optimizers than that of `compile`, each of which has a gradient
    of its own. With several replicas, sizes are those of the global batch, and memory is that of one device.

    Args:
        model: A compiled model.
        data: A tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)` of arrays; or a `tf.data.Dataset`, `PyDataset` or
            generator of batches, of which as many are kept in memory as make up the largest size.
        sizes: The sizes to try, rising. None: the powers of two from 8 to `max_size`.
        max_size: The largest size if `sizes` is None. Sizes above the number of examples are left out.
        steps: Steps that are timed, at least 1. Under gradient accumulation they are micro-batches.
        warm_up: Steps before them, in which the step is compiled, at least 1.
        noise_batches: K, at most; as many as there are examples for. 0: the noise scale is not measured.
        noise_warm_up: Training steps before the noise is measured. 0: it is measured at the weights that the model has.
        seed: Seed of the order of the examples.
        verbose: 0 is silent, 1 and "auto" show a progress bar, 2 a line.

    Returns:
        Measurements, noise scale and suggestion, as a table with `print` and as a plot.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, a model that is not compiled, or data with fewer examples
            than the smallest size.

    Source: McCandlish et al. 2018, arXiv 1812.06162, section 2.2 and appendix A.1.

    Example:
    ```python
    import keras
    import numpy as np

    import keras_optkit as ok

    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 8)).astype("float32")
    y = x[:, :1] + rng.normal(size=(512, 1)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("adam", loss="mse")
    found = ok.find_batch_size(model, (x, y), sizes=[16, 64], verbose=0)
    print(found)
    model.fit(x, y, batch_size=found.suggestion, verbose=0)
    ```
    """
    checked_model(model)
    arguments.integer("max_size", max_size, 1)
    arguments.integer("steps", steps, 1)
    arguments.integer("warm_up", warm_up, 1)
    arguments.integer("noise_batches", noise_batches, 0)
    arguments.integer("noise_warm_up", noise_warm_up, 0)
    arguments.integer("seed", seed, 0)
    arguments.choice("verbose", verbose, ("auto", 0, 1, 2))
    wanted = _checked_sizes(sizes, max_size)
    arrays, examples = _examples(data, max(wanted[-1], wanted[0] * noise_batches))
    tried = [size for size in wanted if size <= examples]
    if not tried:
        raise ValueError(f"data must have at least {wanted[0]} examples, the smallest size, got {examples}.")

    def data_of(size: int) -> Shuffled:
        return Shuffled(*arrays, batch_size=size, seed=seed, drop_remainder=True)

    build(model, data_of(tried[0]))
    bar = keras.utils.Progbar(
        len(tried), verbose=1 if verbose == "auto" else int(verbose), stateful_metrics=("batch_size",), unit_name="size"
    )
    rows: list[Measured] = []
    noise: list[float | None] = []
    doubt = ""
    with as_found(model):
        model.steps_per_execution = 1
        compile_anew(model)
        for size in tried:
            rows.append(_measured(model, data_of(size), warm_up, steps))
            bar.update(len(rows), [("batch_size", size)], finalize=False)
            if rows[-1].seconds is None:
                break
        fit = [row.size for row in rows if row.seconds is not None]
        if fit and min(noise_batches, examples // fit[0]) >= 2:
            if used_optimizers(model) != [model.optimizer]:
                doubt = (
                    "the noise scale was not measured, since the model's train_step may use other optimizers than that "
                    "of compile, each of which has a gradient of its own"
                )
            else:
                size = max([size for size in fit if examples // size >= noise_batches], default=fit[0])
                count = min(noise_batches, examples // size)
                usual = max([size for size in fit if size <= USUAL], default=fit[0])
                noise = noise_scales(model, data_of(size), count, data_of(usual), noise_warm_up)
    bar.update(len(rows), finalize=True)
    found = _with_doubt(BatchSizes(tuple(rows), noise[-1] if noise else None, doubt), noise, noise_warm_up)
    if found.doubt:
        warnings.warn(f"find_batch_size: {found.doubt}.", stacklevel=2)
    if found.suggestion is None:
        warnings.warn(f"find_batch_size: not even batches of {tried[0]} examples fit into memory.", stacklevel=2)
    return found


def _with_doubt(found: BatchSizes, noise: Sequence[float | None], updates: int) -> BatchSizes:
    if not noise:
        return found
    last, before = noise[-1], noise[0]
    if last is None:
        doubt = f"the noise scale was not measured, since the gradient is not finite after {updates} updates"
    elif before is not None and last > RISING * before and found.suggestion != found._suggestion(math.inf):
        doubt = (
            f"the noise scale is a lower bound, and so may be the suggestion: it rose from {before:.3g} to {last:.3g} "
            f"examples between updates {updates // 2} and {updates}; raise noise_warm_up"
        )
    else:
        return found
    return dataclasses.replace(found, doubt=doubt)


def _checked_sizes(sizes: Sequence[int] | None, max_size: int) -> list[int]:
    if sizes is None:
        return [2**k for k in range(min(3, int(math.log2(max_size))), int(math.log2(max_size)) + 1)]
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be integers in a list, or None, got {sizes!r} of type {type(sizes).__name__}.")
    checked = [arguments.integer("each of sizes", size, 1) for size in sizes]
    if not checked or checked != sorted(set(checked)):
        raise ValueError(f"sizes must be at least one integer, and rising, got {sizes!r}.")
    return checked


def _examples(data: Any, count: int) -> tuple[tuple[Any, ...], int]:
    """Arrays of examples, those that were given or those of the first batches, about `count`; and their number."""
    arrays = checked_arrays(data)
    if arrays is None:
        taken: list[tuple[Any, ...]] = []
        rows = 0
        for batch in _given_batches(data):
            given = Shuffled(*(batch if isinstance(batch, tuple | list) else (batch,)))
            taken.append(given.arrays)
            rows += given.rows
            if rows >= count:
                break
        if not taken:
            raise ValueError(f"data must hold at least one batch, got {data!r}.")
        arrays = tree.map_structure(lambda *parts: np.concatenate(parts), *taken)
    held = Shuffled(*arrays)
    return held.arrays, held.rows


def _given_batches(data: Any) -> Iterator[Any]:
    if isinstance(data, keras.utils.PyDataset) and data.num_batches is not None:
        return (data[i] for i in range(data.num_batches))
    return iter(data)


# -- time and memory --------------------------------------------------------------------------------------------------


def _measured(model: Any, data: Shuffled, warm_up: int, steps: int) -> Measured:
    timer = Timer(warm_up + steps)
    try:
        with state_as_found(model):
            peak = _peak_memory()
            run(model, [timer], x=data)
            return Measured(data.batch_size, float(np.median(timer.seconds[warm_up:])), peak())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Measured(data.batch_size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a training step says that there is not enough memory."""
    if isinstance(error, MemoryError):
        return True
    if keras.config.backend() == "jax":
        import jax

        return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    import tensorflow as tf

    return isinstance(error, tf.errors.ResourceExhaustedError)


def _peak_memory() -> Callable[[], int | None]:
    """A function that tells the peak of the memory in use since now, of the first GPU or else of the process."""
    if keras.config.backend() == "jax":
        import jax

        device = jax.local_devices()[0]
        if device.memory_stats() is not None:  # it keeps its peak, but the sizes rise
            return lambda: device.memory_stats()["peak_bytes_in_use"]
        return _peak_of_process()
    import tensorflow as tf

    if tf.config.list_logical_devices("GPU"):
        tf.config.experimental.reset_memory_stats("GPU:0")
        return lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return _peak_of_process()


def _peak_of_process() -> Callable[[], int | None]:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to the present; see proc(5)
    return _high_water


def _high_water() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not on Linux
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)
