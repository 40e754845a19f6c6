"""Data whose order is a function of a seed and the epoch, so that a run can be continued inside an epoch.

`fit(x, y)` shuffles with TensorFlow's generators, whose position cannot be read or set. The classes here compute each
batch from the number of the epoch and of the batch alone. `keras_optkit.callbacks.Resume` relies on it.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit import arguments
from keras_optkit.fit.run import Run
from keras_optkit.meaning import checksum, meaning

__all__ = ["EpochDataset", "PerEpoch", "Shuffled"]


class EpochDataset(keras.utils.PyDataset, abc.ABC):
    """A `PyDataset` that declares: batch i of epoch e is a function of e and i.

    Subclasses write `batch(index)`, which reads `self.epoch`, and `__len__`, the number of batches of an epoch. This is
    the declaration; `keras_optkit.callbacks.Resume` then continues inside an epoch. Random choices in `batch`, such as
    augmentation, have to come from a generator that is seeded with `(seed, self.epoch, index)`.

    `fit` increments `epoch` at the end of an epoch, so that a second `fit` continues with new orders; set it in your
    own loop. `evaluate` and `predict` do not change it. The `shuffle` of `fit` does not matter: the order is that of
    `batch`.

    When not to use it: for data that arrive as a stream and cannot be read again from a given place.

    Args:
        workers: Threads or processes that compute batches; see `keras.utils.PyDataset`.
        use_multiprocessing: Whether they are processes.
        max_queue_size: Batches that they compute ahead.

    Attributes:
        epoch: The epoch whose batches are given, counted from 0; may be set.

    Raises:
        ValueError: From `fit`, if it is to train for several epochs of another length (`steps_per_epoch`), or with
            several workers on JAX or with a model that is not built, since Keras then loses a batch.

    Example:
    ```python
    import numpy as np

    import keras_optkit as ok


    class Noise(ok.data.EpochDataset):
        def __len__(self):
            return 4

        def batch(self, index):
            x = np.random.default_rng((7, self.epoch, index)).normal(size=(8, 2)).astype("float32")
            return x, x[:, :1]


    print(Noise()[0][0].shape)
    ```
    """

    def __init__(self, workers: int = 1, use_multiprocessing: bool = False, max_queue_size: int = 10):
        super().__init__(
            arguments.integer("workers", workers, 0),
            arguments.boolean("use_multiprocessing", use_multiprocessing),
            arguments.integer("max_queue_size", max_queue_size, 1),
        )
        self.epoch = 0
        self._begun_at = 0

    @abc.abstractmethod
    def batch(self, index: int) -> Any:
        """Batch number `index`, counted from 0, of epoch number `self.epoch`, as `PyDataset.__getitem__` returns it.

        Lists in it become tuples, as `fit` makes them of the lists in its arguments.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of batches of an epoch."""

    @property
    def num_batches(self) -> int:
        """The number of batches that the present epoch will give, less than its length if it begins inside."""
        return len(self) - self._begun_at

    def __getitem__(self, index: int) -> Any:
        return tree.lists_to_tuples(self.batch(index + self._begun_at))  # tf.data would stack the arrays of a list

    def fingerprint(self) -> dict[str, Any]:
        """Identifies these data, as JSON; a continued run must find the same. Extend it if you can.

        The class with its code, the length, and checksums of the arrays of the first batch of epoch 0, which is
        computed for it.
        """
        before = self.epoch, self._begun_at
        self.epoch, self._begun_at = 0, 0
        try:
            first = tree.flatten(self[0])
        finally:
            self.epoch, self._begun_at = before
        return {
            "class": meaning(type(self)),
            "batches": len(self),
            "first batch": [checksum(np.asarray(part)) for part in first if hasattr(part, "__array__")],
        }

    def begin_epoch_at(self, batch: int) -> None:
        """Makes the present epoch begin with batch number `batch`, until `end_epoch`.

        Args:
            batch: From 0 to the length of an epoch, that one not included.
        """
        self._begun_at = arguments.integer("batch", batch, 0, len(self) - 1)

    def end_epoch(self) -> None:
        """Increments the epoch; `fit` calls it."""
        self.epoch += 1
        self._begun_at = 0

    def prepare_fit(self, run: Run) -> None:
        """Called when a `fit` with these data begins."""
        steps, epochs = run.arguments.get("steps_per_epoch"), run.arguments.get("epochs", 1)
        if steps not in (None, len(self)) and epochs - run.arguments.get("initial_epoch", 0) > 1:
            raise ValueError(
                f"steps_per_epoch must be None or {len(self)}, the length of {type(self).__name__}, if there is "
                f"more than one epoch; got {steps!r}."
            )
        looks_ahead = keras.config.backend() != "tensorflow" or not run.model.built
        if looks_ahead and (self.workers > 1 or self.use_multiprocessing):
            raise ValueError(
                f"workers must be 1 on JAX, and with a model that is not built, got {self.workers}. Keras takes a "
                "batch there to find out shapes, and with several workers begins the epoch with the one after it."
            )
        run.arguments["shuffle"] = False  # Keras would shuffle the batches, with Python's generator
        run.add(_EndEpoch(self), first=True)


class _EndEpoch(keras.callbacks.Callback):
    """Tells the data of the end of an epoch, before all other callbacks."""

    stateless = True

    def __init__(self, data: EpochDataset):
        super().__init__()
        self._data = data

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._data.end_epoch()


class Shuffled(EpochDataset):
    """Batches of arrays, in an order that is a function of the seed and the epoch.

    ```text
    order of epoch e = numpy.random.default_rng((seed, e)).permutation(n)
    ```

    Batch i holds the rows `order[i * batch_size : (i + 1) * batch_size]` of every array. As in `fit(x, y)`, arrays
    are NumPy's, tensors, or pandas DataFrames and Series; several inputs or outputs are a list, tuple or dict of them;
    and floating-point values are given in `keras.config.floatx()`, anything else as it is.

    When not to use it: for data that do not fit into memory and are not `numpy.memmap`; see `PerEpoch` for `tf.data`.

    Args:
        x: An array, or arrays in (nested) lists, tuples and dicts; all with the same number n of rows. Strings work on
            TensorFlow only.
        y: Targets, likewise, or None.
        sample_weight: Weights, likewise, or None; only with `y`. None among several of them: each row weighs 1.
        batch_size: Rows of a batch.
        seed: A non-negative integer.
        shuffle: False: rows in order, the same in every epoch.
        drop_remainder: Whether a last batch with fewer rows is left out.
        workers: Threads or processes that compute batches; see `keras.utils.PyDataset`.
        use_multiprocessing: Whether they are processes.
        max_queue_size: Batches that they compute ahead.

    Attributes:
        arrays: `(x,)`, `(x, y)` or `(x, y, sample_weight)` as NumPy arrays.
        rows: n.

    Raises:
        TypeError: For something that is not an array, such as a list of Python numbers.
        ValueError: For arrays of different lengths or without rows, and for values out of range.

    Example:
    ```python
    import keras
    import numpy as np

    import keras_optkit as ok

    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    data = ok.data.Shuffled(x, x[:, :1], batch_size=16, seed=1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    model.fit(data, epochs=2, verbose=0)
    assert data.epoch == 2
    ```
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 32,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = False,
        workers: int = 1,
        use_multiprocessing: bool = False,
        max_queue_size: int = 10,
    ):
        super().__init__(workers, use_multiprocessing, max_queue_size)
        if sample_weight is not None and y is None:
            raise ValueError("sample_weight must be None without y.")
        self.arrays: tuple[Any, ...] = (_arrays("x", x),)
        if y is not None:
            self.arrays += (_arrays("y", y),)
        if sample_weight is not None:
            ones = np.ones(len(tree.flatten(self.arrays)[0]), keras.config.floatx())
            self.arrays += (_arrays("sample_weight", sample_weight, instead_of_none=ones),)
        self.batch_size = arguments.integer("batch_size", batch_size, 1)
        self.seed = arguments.integer("seed", seed, 0)
        self.shuffle = arguments.boolean("shuffle", shuffle)
        self.drop_remainder = arguments.boolean("drop_remainder", drop_remainder)
        lengths = {len(array) for array in tree.flatten(self.arrays)}
        if len(lengths) != 1:
            raise ValueError(f"x, y and sample_weight must have the same number of rows, got {sorted(lengths)}.")
        (self.rows,) = lengths
        if len(self) == 0:
            at_least = f"{self.batch_size} rows, for one batch" if self.drop_remainder else "one row"
            raise ValueError(f"x must have at least {at_least}, got {self.rows}.")
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_remainder)

    def batch(self, index: int) -> Any:
        """Batch number `index` of epoch number `self.epoch`: `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        chosen = self._order_of(self.epoch)[rows] if self.shuffle else rows
        return tree.map_structure(lambda array: _as_fit_gives(array[chosen]), self.arrays)

    def _order_of(self, epoch: int) -> np.ndarray:
        held = self._order  # in one step: several threads may be here
        if held is None or held[0] != epoch:
            held = self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return held[1]

    def fingerprint(self) -> dict[str, Any]:
        """Sizes, seed, and the shape, dtype and a checksum of all rows of each array."""
        return {
            "class": meaning(type(self)),
            "batches": len(self),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "arrays": [checksum(array) for array in tree.flatten(self.arrays)],
        }


class PerEpoch(EpochDataset):
    """A `tf.data.Dataset` for each epoch.

    `make_dataset(epoch)` builds the data of one epoch, batches included, with seeds that follow from the number of the
    epoch: `dataset.shuffle(10_000, seed=epoch)`. A run that is continued inside an epoch builds it again and skips the
    first batches, which `tf.data` computes and drops.

    Batches pass through Python, one after the other, which costs a copy of each.

    When not to use it: for arrays, where `Shuffled` is faster; or with random `tf.data` operations without a seed,
    which are different in every process.

    Args:
        make_dataset: Function that takes the epoch, an int, and returns a `tf.data.Dataset` of batches as `fit` takes
            them.
        steps: The number of batches of an epoch; None: that of `make_dataset(0)`, which must be known then.

    Raises:
        TypeError: If `make_dataset` is not a function, or does not return a `tf.data.Dataset`.
        ValueError: If `steps` is None and the length of the dataset is infinite or not known.

    Example:
    ```python
    import numpy as np
    import tensorflow as tf

    import keras_optkit as ok

    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")


    def make_dataset(epoch):
        return tf.data.Dataset.from_tensor_slices((x, x[:, :1])).shuffle(64, seed=epoch).batch(16)


    data = ok.data.PerEpoch(make_dataset)
    print(len(data), data[0][0].shape)
    ```
    """

    def __init__(self, make_dataset: Callable[[int], Any], steps: int | None = None):
        super().__init__()
        if not callable(make_dataset):
            raise TypeError(f"make_dataset must be a function of the epoch, got {make_dataset!r}.")
        self.make_dataset = make_dataset
        self.steps = arguments.integer("steps", steps, 1, optional=True)
        self._length = self.steps or self._known_length()
        self._reading: tuple[int, int, Any] | None = None

    def _known_length(self) -> int:
        length = int(self._made(0).cardinality())
        if length < 1:  # TensorFlow has negative numbers for infinite and unknown ones
            said = {-1: "infinite", -2: "not known"}.get(length, "zero")
            raise ValueError(f"steps must be given, since the length of make_dataset(0) is {said}.")
        return length

    def _made(self, epoch: int) -> Any:
        dataset = self.make_dataset(epoch)
        if not all(hasattr(dataset, name) for name in ("cardinality", "skip", "element_spec")):
            raise TypeError(f"make_dataset must return a tf.data.Dataset, got {dataset!r} for epoch {epoch}.")
        return dataset

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self._length

    def fingerprint(self) -> dict[str, Any]:
        """The function, the length, and checksums of the first batch of epoch 0."""
        return super().fingerprint() | {"make_dataset": meaning(self.make_dataset)}

    def batch(self, index: int) -> Any:
        """The next batch of an epoch that is read already, or the first one of an epoch that is begun at `index`."""
        if self._reading is None or self._reading[:2] != (self.epoch, index):
            self._reading = self.epoch, index, iter(self._made(self.epoch).skip(index))
        epoch, _, iterator = self._reading
        try:
            batch = next(iterator)
        except StopIteration:
            raise ValueError(f"make_dataset({epoch}) must give {len(self)} batches, got {index}.") from None
        self._reading = epoch, index + 1, iterator
        return tree.map_structure(lambda part: part.numpy(), batch)


def _arrays(name: str, given: Any, instead_of_none: Any = None) -> Any:
    """Every array of a structure as one of NumPy's, without a copy where there can be; lists become tuples."""

    def one(part: Any) -> np.ndarray:
        array = _as_numpy(instead_of_none if part is None else part)
        if array.ndim == 0 or not _can_be_given(array):
            raise TypeError(f"{allowed}; got {part!r} of type {type(part).__name__} among them.")
        return array

    allowed = f"{name} must be an array, or arrays in lists, tuples and dicts (np.array makes one of a list of numbers)"
    arrays = tree.map_structure(one, tree.lists_to_tuples(given))
    if not tree.flatten(arrays):
        raise TypeError(f"{allowed}; got {given!r}, without any.")
    return arrays


def _as_numpy(part: Any) -> np.ndarray:
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(part, pandas.Series):
        part = part.to_numpy()[:, None]  # as `fit` takes it
    array = np.asarray(part if hasattr(part, "__array__") else keras.ops.convert_to_numpy(part))
    for kind in (str, bytes):  # which have a width then, and so a checksum
        if array.dtype == object and all(isinstance(element, kind) for element in array.flat):
            return array.astype(kind)
    return array


def _can_be_given(array: np.ndarray) -> bool:
    if array.dtype.kind in "SU":
        return keras.config.backend() == "tensorflow"  # the others have no tensors of strings
    try:
        return bool(keras.backend.standardize_dtype(array.dtype))
    except ValueError:
        return False


def _as_fit_gives(array: np.ndarray) -> Any:
    if array.dtype.kind in "SU":
        return keras.ops.convert_to_tensor(array.astype(object), dtype="string")
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(array.dtype)):
        return array.astype(keras.config.floatx(), copy=False)
    return array
