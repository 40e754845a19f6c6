"""Writing what happens in training to TensorBoard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.instrument import around, compile_anew, shared
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register

Tensor = Any


@register(
    "callback",
    paper="Goodfellow, Bengio and Courville 2016, Deep Learning, section 11.5 (visualise the training)",
    tags=("passive",),
    cases=({"log_dir": "logs", "every": 3},),
)
class TrainingMonitor(Callback):
    """Writes learning rate, loss, gradient norm and loss scale to TensorBoard while the model trains.

    | tag | value | when |
    |---|---|---|
    | `train/learning_rate` | the rate used in this update | every `every` updates |
    | `train/loss` | the loss of this batch alone, with regularisation, before the update | every `every` updates |
    | `train/gradient_norm` | global norm of this batch's gradient | every `every` updates |
    | `train/loss_scale` | the scale of the loss in this update, with a `LossScaleOptimizer` | every `every` updates |
    | `epoch/loss_scale` | the scale at the end of the epoch, also if all of its updates were skipped | every epoch |
    | `epoch/<name>` | everything in the epoch's logs: `epoch/loss`, `epoch/val_accuracy`, ... | every epoch |

    The gradient norm is `sqrt(sum of g²)` over all numbers of all gradients, before clipping and without loss scaling.
    The loss is the batch's own, whereas Keras's logs hold the mean since the epoch began.

    The values are computed inside the training step, with any optimizer, in graph mode, with XLA and in mixed
    precision, and are read only when they are written: no step waits for the host. Training itself is not changed.

    The step axis counts updates of the weights (`optimizer.iterations`) and always goes on: over several calls of
    `fit`, and in a new process with the same `log_dir`, whether its optimizer was restored or begins at 0. With
    `steps_per_execution=k` there are values for every k-th update at most. Updates that loss scaling skips are not
    written. Under gradient accumulation the gradient is that of the micro-batch. With several replicas the norm is that
    of the summed gradient, which takes a second all-reduce in every step.

    When not to use it: on a backend other than TensorFlow and JAX. A custom `train_step` that does not go through
    `optimizer.scale_loss` (on JAX: does not update Keras's metric "loss") has no `train/loss`, and one that does not go
    through `optimizer.apply` (on JAX: `optimizer.stateless_apply`) has no other value.

    Args:
        log_dir: Directory of the event files, a string or a path; made when it does not exist.
        every: Number of updates between two values, at least 1.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.
        RuntimeError: When training begins, on another backend than TensorFlow and JAX.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    with tempfile.TemporaryDirectory() as logs:
        monitor = ok.callbacks.TrainingMonitor(logs, every=2)
        model.fit(x, x[:, :1], batch_size=16, epochs=2, callbacks=[monitor], verbose=0)
        model.fit(x, x[:, :1], batch_size=16, epochs=2, callbacks=[monitor], verbose=0)  # steps 9 to 16
    ```
    """

    def __init__(self, log_dir: str | os.PathLike[str], every: int = 1):
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self.every = arguments.integer("every", every, 1)
        self._step = -1  # where the axis has got to; -1: not known yet
        self._writer: Any = None
        self._detach: list[Callable[[], None]] = []

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        from tensorboard.summary import Writer

        self._end()
        reached = _last_step(self.log_dir) if self._step < 0 else self._step
        begun_at = self._updates()
        self._offset = max(0, reached - begun_at)  # every step written from now on is a new one
        self._step = self._offset + begun_at
        self._wait, self._batch = self._until_due(), 0
        self._computed: set[str] = set()
        self._optimizer = self.model.optimizer
        aggregations = {
            "learning_rate": "only_first_replica",
            "loss": "sum",  # each replica has its part of the global batch's mean
            "gradient_norm": "only_first_replica",
            "loss_scale": "only_first_replica",
        }
        self._values = shared(self.model, aggregations, "float32")
        self._detach = [self._values.close, *self._hooks()]
        self._writer = Writer(self.log_dir)
        compile_anew(self.model)

    def _hooks(self) -> list[Callable[[], None]]:
        if keras.config.backend() == "tensorflow":
            return [
                around(self._optimizer, "scale_loss", self._see_loss),
                around(self._optimizer, "apply", self._see_gradients),
            ]
        # On JAX `scale_loss` is called inside of what is differentiated and `apply`, with loss scaling, inside of a
        # condition. No value can come out of either; it can from around them.
        losses = [m for m in self.model.metrics if m.name == "loss"]
        return [
            *(around(metric, "update_state", self._see_loss) for metric in losses),
            around(self._optimizer, "stateless_apply", self._see_stateless),
        ]

    # -- inside the training step -------------------------------------------------------------------------------------

    def _hold(self, name: str, value: Tensor) -> None:
        if self._values.in_step:  # and not in the validation, say, which updates the same metric
            self._values[name] = value
            self._computed.add(name)

    @contextlib.contextmanager
    def _see_loss(self, loss: Tensor, *_: Any, **__: Any) -> Iterator[None]:
        self._hold("loss", loss)
        yield

    @contextlib.contextmanager
    def _see_gradients(self, grads: Sequence[Tensor | None], *_: Any, **__: Any) -> Iterator[None]:
        optimizer = self._optimizer
        rate = getattr(optimizer, "learning_rate", None)  # Keras's MultiOptimizer has none
        if rate is not None:
            self._hold("learning_rate", rate)
        scale = type(optimizer).scale_loss(optimizer, ops.ones((), "float32"))  # the class's own, which nobody watches
        self._hold("gradient_norm", _global_norm(_over_replicas(grads)) / scale)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self._hold("loss_scale", scale)
        yield

    @contextlib.contextmanager
    def _see_stateless(
        self, before: Sequence[Tensor], grads: Sequence[Tensor], *_: Any, **__: Any
    ) -> Iterator[Callable[[Any], None]]:
        optimizer = self._optimizer

        def holding(values: Sequence[Tensor]) -> Any:
            return keras.StatelessScope(list(zip(optimizer.variables, values, strict=True)))

        def see_result(result: tuple[Any, Sequence[Tensor]]) -> None:
            with holding(result[1]):
                rate = getattr(optimizer, "learning_rate", None)
                if isinstance(rate, keras.Variable):  # ScheduleHyperparameters sets it in there
                    self._hold("learning_rate", rate)

        with holding(before), self._see_gradients(grads):
            pass
        yield see_result

    # -- outside of it ------------------------------------------------------------------------------------------------

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Writes the values of the previous batch.

        `on_train_batch_end` would do the same, but a callback that has it makes Keras wait for every step.
        """
        self._wait -= batch - self._batch
        self._batch = batch
        if self._wait <= 0:
            self._write_if_due()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._write_if_due()
        self._batch = 0
        values = {f"epoch/{name}": value for name, value in (logs or {}).items()}
        if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
            values["epoch/loss_scale"] = self.model.optimizer.dynamic_scale
        self._write(values, self._step)
        self._writer.flush()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        try:
            if self._writer is not None:
                self._write_if_due()
        finally:
            self._end()

    def _until_due(self) -> int:
        return self.every - self._step % self.every

    def _write_if_due(self) -> None:
        step = self._offset + self._updates()
        if step // self.every > self._step // self.every:
            self._write({f"train/{name}": self._values[name] for name in sorted(self._computed)}, step)
        self._step = step
        self._wait = self._until_due()  # a batch makes at most one update, so it cannot be due before

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, ops.convert_to_numpy(value), step)

    def _end(self) -> None:
        for detach in self._detach:
            detach()
        if self._detach:
            self._detach = []
            compile_anew(self.model)
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _global_norm(grads: Sequence[Tensor]) -> Tensor:
    wide = [ops.cast(g, at_least_float32(g.dtype)) for g in grads]
    return ops.sqrt(sum(ops.cast(ops.sum(ops.square(g)), "float32") for g in wide))


def _over_replicas(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the global batch, dense: rows that occur twice in a sparse one have to be summed first."""
    if keras.config.backend() != "tensorflow":  # on JAX all devices compute one step, on arrays that are sharded
        return [g for g in grads if g is not None]
    import tensorflow as tf

    present = [tf.convert_to_tensor(g) for g in grads if g is not None]  # keras.ops would leave it sparse
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return present
    return context.all_reduce(tf.distribute.ReduceOp.SUM, present)


def _last_step(log_dir: str) -> int:
    """The last step that a TrainingMonitor has written to this directory, or 0."""
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    if not Path(log_dir).is_dir():
        return 0
    events = EventAccumulator(log_dir, size_guidance={TENSORS: 1})  # keeps the last value of each tag
    events.Reload()
    ours = [tag for tag in events.Tags()["tensors"] if tag.startswith(("train/", "epoch/"))]
    return max((events.Tensors(tag)[-1].step for tag in ours), default=0)
