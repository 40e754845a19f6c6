"""The callback that watches training."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.callbacks.monitor import estimates
from keras_optkit.callbacks.monitor.files import LineFile
from keras_optkit.callbacks.monitor.findings import TAG, FindingsFile
from keras_optkit.callbacks.monitor.host import Stopwatch, default_hparams, memory
from keras_optkit.callbacks.monitor.reading import charts_png
from keras_optkit.callbacks.monitor.step import Probe, clips, matching_layers
from keras_optkit.callbacks.monitor.values import Values, tag_of
from keras_optkit.callbacks.sinks.sink import Opening, Sink, checked_sinks, writes
from keras_optkit.callbacks.sinks.tensorboard import TensorBoard
from keras_optkit.fit.steps import attach, detach, is_built
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.of_model import optimizers_of, used_optimizers_of
from keras_optkit.registry import register


@register(
    "callback",
    paper="Goodfellow, Bengio and Courville 2016, Deep Learning, section 11.5 (visualise the training); "
    "McCandlish et al., arXiv 1812.06162, appendix A (gradient noise scale)",
    tags=("passive",),
    cases=({"log_dir": "logs", "every": 3},),
)
class TrainingMonitor(Callback):
    """Writes what happens in training to lines of JSON and to TensorBoard or other `sinks`, every `every` updates.

    The first updates are written at 1, 2, 4, 8, ... The lines of JSON, `monitor.jsonl`, are always written.

    | tag | value |
    |---|---|
    | `train/learning_rate` | the rate used in this update |
    | `train/estimate`, `train/effective_rate` | of a rule that finds its rate, the estimate and the rate times it |
    | `train/loss` | the loss of this batch alone, with regularisation, before the update |
    | `train/penalty` | the part of it that regularizers of weights add, where there are any |
    | `train/gradient_norm` | `‖g‖`, over all trained weights, before clipping and without loss scaling |
    | `train/weight_norm` | `‖θ‖` before the update |
    | `train/update_ratio` | `‖θ′ - θ‖ / ‖θ‖`, θ′ being the weights after the update |
    | `train/nonfinite` | how many elements of the gradient are not finite |
    | `train/clip_rate` | the share of the last 20 written updates in which clipping changed the gradient |
    | `train/skipped` | updates left out so far for gradients that were not finite, where the optimizer counts them |
    | `train/loss_scale` | the scale of the loss in this update, with a `LossScaleOptimizer` |
    | `train/noise_scale` | with `noise_scale`, the gradient noise scale `tr(Σ) / ‖G‖²`, in examples |
    | `gradient_norm/<layer>`, `weight_norm/<layer>`, `update_ratio/<layer>` | the same of the weights of one layer |
    | `nonfinite/<layer>` | the same of one layer, where there are any |
    | `activation_mean/<layer>`, `activation_std/<layer>` | with `activations`, of all outputs in the batch |
    | `activation_zeros/<layer>` | the share of outputs that are 0 |
    | `activation_dead/<layer>` | the share of units that are 0 in the whole batch |
    | `activation_saturated/<layer>` | of a tanh or sigmoid, the share of outputs beyond ±0.99, or 0.01 and 0.99 |
    | `weights/<variable>` | with `histograms`, a histogram of the weights |
    | `log10_update_ratio/<layer>`, ... | in TensorBoard only, logarithms of the three values of each layer |
    | `hyperparameters/<name>` | the optimizer's other hyperparameters in this update: `momentum`, `weight_decay`, ... |
    | `throughput/updates`, `throughput/examples` | a second, since the last write, without validation |
    | `memory/process`, `memory/process_peak`, `memory/accelerator`, `memory/accelerator_peak` | in MiB |
    | `epoch/<name>` | every epoch, everything in the epoch's logs: `epoch/loss`, `epoch/val_accuracy`, ... |
    | `epoch/loss_scale` | the scale at the end of the epoch, also if all of its updates were skipped |

    `<layer>` is the path of the layer in the model. With several optimizers, `train/learning_rate`, `train/loss`,
    `train/penalty`, `train/loss_scale`, `train/clip_rate`, `train/estimate`, `train/effective_rate` and
    `hyperparameters/` have the name of the attribute that holds the optimizer in them, as in
    `train/learning_rate/d_optimizer`; the rule of the n-th group has `group_n` in the tags of its estimate. Logs of an
    epoch that are not numbers are left out, with one warning. The loss is the batch's own, whereas Keras's logs hold
    the mean since the epoch began. The values are computed inside the training step, with any optimizer, in graph mode,
    with XLA, in mixed precision and on replicas, and are read only when they are written. Training itself is not
    changed.

    The training step is compiled twice: as it is, and with the computations, for the updates that are to be written. So
    all other updates cost nothing, and the first one that is written waits for the compiler. The model keeps both for
    the next `fit`.

    The gradient noise scale follows from the squared norms of the gradients of the batch, of B examples, and of its
    first half, of b: `‖G‖² ≈ (B ‖g_B‖² - b ‖g_b‖²) / (B - b)` and `tr(Σ) ≈ (‖g_b‖² - ‖g_B‖²) / (1/b - 1/B)`, running
    means of both with decay 0.9 per write. It has no value while the first is not above 0. It is the batch size above
    which larger batches hardly save updates.

    The step axis counts updates of the weights (`optimizer.iterations`), and the steps of every tag always increase:
    over several calls of `fit`, and in a new process with the same `log_dir`, whether its optimizer was restored or
    begins at 0. Where the callback itself is restored (`load_state_dict`), steps that are in the files are computed,
    but not written again. With `steps_per_execution=k` there are values for every k-th update at most. Updates that are
    skipped are not written. Under gradient accumulation the gradient is that of the last micro-batch; the clip rate is
    about their mean, which is what is clipped. The directory's first `fit` writes a layout for TensorBoard's custom
    scalars and the HParams.

    When not to use it: on a backend other than TensorFlow and JAX. A custom `train_step` that does not go through
    `optimizer.scale_loss` (on JAX: does not update Keras's metric "loss") has no `train/loss`, and one that does not go
    through `optimizer.apply` (on JAX: `optimizer.stateless_apply`) has no value of gradients and weights. With batch
    normalisation the noise scale is only a rough estimate, since half of a batch is normalised differently.

    Args:
        log_dir: Directory of the files, a string or a path; made when it does not exist.
        every: Number of updates between two values, at least 1. The first updates are written at the powers of 2 below.
        activations: A regular expression that is looked for in the paths of layers, those inside others included; the
            first output of the matching ones is measured. On TensorFlow only. None: none.
        histograms: Writes histograms of all weights with every k-th write, k >= 1. None: never.
        noise_scale: Whether the gradient noise scale is measured, for which a written update computes the gradient of
            half of the batch besides. On TensorFlow only, with Keras's own `train_step`.
        hparams: Name to number, string or boolean for TensorBoard's HParams table, or a run's; `"auto"` takes the
            arguments of the optimizer and of `fit`; None for none. A directory or run that has some keeps them.
        findings: Whether to write what is wrong with the run, with advice, whenever that changes: as the text
            `findings` to the sinks, and as lines of JSON to `findings.jsonl`. The rules are those of `inspect` and
            others about many updates; `keras_optkit.diagnose` reads them afterwards. What is known of the model when
            the run begins is written to `model.json`, for which all weights are read once.
        sinks: What else is written to, a list of `ok.callbacks.sinks.Sink`: `TensorBoard()`, `WandB()`, `MLflow()`,
            `Trackio(run)`, or sinks of your own. None is `[TensorBoard()]`; an empty list writes lines of JSON only.
        figures: Whether to write the charts of `plot_monitor` as the figure `charts` to the sinks when a `fit` ends;
            needs matplotlib.

    Raises:
        ImportError: For `figures` without matplotlib; when training begins, for a sink without its package.
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; for `histograms` or `figures` that none of the sinks takes; when training
            begins, for `activations` that match no layer, and for `noise_scale` with a custom `train_step`.
        RuntimeError: When training begins, on another backend than TensorFlow and JAX, for `activations` or
            `noise_scale` on another than TensorFlow, and for a sink without a run.

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
        print(ok.callbacks.read_monitor(logs)["train/loss"].steps)
    ```
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        every: int = 10,
        activations: str | None = None,
        histograms: int | None = None,
        noise_scale: bool = False,
        hparams: Mapping[str, Any] | str | None = "auto",
        findings: bool = False,
        sinks: Sequence[Sink] | None = None,
        figures: bool = False,
    ):
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self.every = arguments.integer("every", every, 1)
        self.activations = arguments.pattern("activations", activations, optional=True)
        self.histograms = arguments.integer("histograms", histograms, 1, optional=True)
        self.noise_scale = arguments.boolean("noise_scale", noise_scale)
        self.hparams = _checked_hparams(hparams)
        self.findings = arguments.boolean("findings", findings)
        self.sinks = None if sinks is None else checked_sinks(sinks)
        self.figures = arguments.boolean("figures", figures)
        self._sinks = (TensorBoard(),) if self.sinks is None else self.sinks
        self._refuse_what_no_sink_takes()
        self._step = -1  # where the axis has got to; -1: not known yet
        self._offset = 0  # of the axis from the optimizer's count
        self._due = 0  # the step from which on there is something to write
        self._most = 1.0  # updates that a batch has made, or more
        self._counted = 0, 0  # updates and batches, when they were last known
        self._epoch_step = -1  # the step at the end of the last epoch
        self._writes = 0
        self._values = Values()
        self._epoch = 0
        self._batch: int | None = None  # the batch that the wait was counted at; None: the one before the next
        self._probe: Any = None
        self._lines: LineFile | None = None
        self._open: list[Sink] = []
        self._findings: FindingsFile | None = None
        self._left_out: set[str] = set()  # what was in the logs of an epoch and is not a number
        self._last_of_lines: Any = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()
        self._refuse_what_cannot_be_had()
        begun_at = self._updates()
        absent = self._absent_tags()
        lines = self._lines = LineFile(self.log_dir, self._last_of_lines)  # first, since it may be refused
        for sink in self._sinks:
            self._open.append(sink)  # is closed whatever happens
            sink.open(Opening(self.log_dir, absent, unchanged=lines.known))
        if self.findings and (self._findings is None or not lines.known):
            self._findings = FindingsFile(self.log_dir)
        if self._findings is not None and is_built(self.model):
            self._findings.see_model(self.model)
        key = "TrainingMonitor", self.activations, self.noise_scale
        self._probe = attach(self.model, key, lambda: Probe(self.model, self.activations, self.noise_scale))
        self._probe.begin_fit()
        if self.hparams is not None:
            auto = self.hparams == "auto"
            hparams = default_hparams(self.model, self.params) if auto else self.hparams
            for sink in self._sinks:
                sink.write_hparams(hparams)
        if self._step < 0:
            last = {of_epoch: max(step, *self._steps_of_sinks(of_epoch)) for of_epoch, step in lines.last.items()}
            self._step, self._epoch_step = max(0, *last.values()), last[True]
        self._offset = max(0, self._step - begun_at)  # every step written from now on is a new one
        self._step = self._offset + begun_at
        self._due = self._next_due()
        self._stopwatch, self._batches = Stopwatch(), 0
        self._batch = None
        self._counted = self._step, 0
        self._wait = self._until_due()

    def _refuse_what_no_sink_takes(self) -> None:
        wanted = {"write_histograms": self.histograms is not None, "write_figure": self.figures}
        for method, name in (("write_histograms", "histograms"), ("write_figure", "figures")):
            if wanted[method] and not any(writes(sink, method) for sink in self._sinks):
                kinds = ", ".join(type(sink).__name__ for sink in self._sinks) or "there are none"
                raise ValueError(f"{name} must be left out: none of the sinks ({kinds}) takes them.")
        if self.figures:
            charts_png(None)

    def _steps_of_sinks(self, of_epoch: bool) -> list[int]:
        """The last steps in those that know; with -1, so that there are some."""
        return [-1, *(step for sink in self._sinks if (step := sink.last_step(of_epoch=of_epoch)) is not None)]

    def _refuse_what_cannot_be_had(self) -> None:
        on_request = {"activations": self.activations is not None, "noise_scale": self.noise_scale}
        wanted = [name for name, wanted in on_request.items() if wanted]
        if wanted and keras.config.backend() != "tensorflow":
            raise RuntimeError(
                f"{' and '.join(wanted)} must be left out on the {keras.config.backend()} backend, where nothing can "
                "be taken out of what is differentiated."
            )
        if self.noise_scale and type(self.model).train_step is not keras.Model.train_step:
            raise ValueError(
                f"noise_scale must be False for {type(self.model).__name__}, which has a train_step of its own: the "
                "gradient of half a batch is computed as Keras's does."
            )
        if self.activations is not None and is_built(self.model):  # or the first step builds layers that may match
            matching_layers(self.model, self.activations)

    def _absent_tags(self) -> tuple[str, ...]:
        """How the tags begin that this training has no values of."""
        optimizers = optimizers_of(self.model)
        present = {
            "train/loss_scale": any(isinstance(o, keras.optimizers.LossScaleOptimizer) for o in optimizers),
            "train/clip_rate": any(map(clips, optimizers)),
            "train/noise_scale": self.noise_scale,
            "train/estimate": any(map(estimates.names, optimizers)),
            "activation_": self.activations is not None,
        }
        return tuple(tag for tag, is_present in present.items() if not is_present)

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Writes the values of the previous batch, and says whether the step that begins is to compute some.

        `on_train_batch_end` would do the same, but a callback that has it makes Keras wait for every step.
        """
        if self._batch is not None:
            self._wait -= batch - self._batch
            self._batches += batch - self._batch
        self._batch = batch
        if self._wait <= 0:
            self._write_if_due()
        self._probe.want(self._wait <= self.model.steps_per_execution)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._epoch = epoch
        self._stopwatch.go_on()

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self._probe is not None:
            self._stopwatch.pause()

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self._probe is not None:
            self._stopwatch.go_on()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._stopwatch.pause()
        self._finish_batch()
        self._write_if_due()
        if self._step == self._epoch_step:  # not one update in this epoch: it has a step of its own all the same
            self._offset += 1
            self._step += 1
        self._epoch_step = self._step
        values = {f"epoch/{name}": value for name, value in self._numbers(logs or {}).items()}
        optimizers = used_optimizers_of(self.model)
        for name, optimizer in optimizers.items():
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                values[tag_of("epoch/loss_scale", name, optimizers)] = number(optimizer.dynamic_scale)
        self._write(values, of_epoch=True)
        for sink in self._sinks:
            sink.flush()
        if self._lines is not None:
            self._lines.flush()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        try:
            if self._lines is not None and self._probe is not None:
                self._write_if_due()
        finally:
            self._end(failed=True)

    def state_dict(self) -> dict[str, Any]:
        """The position of the axis, and the state of running shares and means; values that are due are written."""
        if self._probe is not None:
            self._finish_batch()
            self._write_if_due()
        return {
            "step": self._step,
            "offset": self._offset,
            "due": self._due,
            "epoch_step": self._epoch_step,
            "writes": self._writes,
            **self._values.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; what is in the files already is then computed, but not written again."""
        self._step, self._offset, self._due = state["step"], state["offset"], state["due"]
        self._epoch_step, self._writes = state["epoch_step"], state["writes"]
        self._values.restore(state)
        self._wait, self._batch = self._until_due(), None
        if self._probe is not None:
            self._probe.fresh = False
        self._counted = self._step, self._batches

    def _next_due(self) -> int:
        power = 1 << self._step.bit_length()
        regular = (self._step // self.every + 1) * self.every
        return min(power, regular) if power < self.every else regular

    def _until_due(self) -> int:
        """The batches from the next one on until something may be due, if none makes more updates than any before."""
        return max(1, math.ceil((self._due - self._step) / self._most))

    def _finish_batch(self) -> None:
        """Counts the batches of the step that was begun last, where no other step is known to begin."""
        if self._batch is not None and not self._probe.ended:
            left = (self.params.get("steps") or math.inf) - self._batch
            self._batches += min(self.model.steps_per_execution, left)
        self._batch = None

    def _write_if_due(self) -> None:
        self._step = self._offset + self._updates()
        updates, batches = self._step - self._counted[0], self._batches - self._counted[1]
        if batches > 0:
            self._most, self._counted = max(self._most, updates / batches), (self._step, self._batches)
        if self._step >= self._due and self._probe.fresh:
            written = self._write(self._new_values(), of_epoch=False)
            self._writes += 1
            if written and self.histograms and self._writes % self.histograms == 0:
                self._write_histograms(written)
            self._due = self._next_due()
        self._wait = self._until_due()

    # -- what ---------------------------------------------------------------------------------------------------------

    def _new_values(self) -> dict[str, float]:
        """All values of the last update, by tag."""
        read = self._probe.read()
        values = self._values.of(read, self.model)
        return values | self._stopwatch.rates(self._step, self._batches, read.scalars.get("examples")) | memory()

    def _write(self, values: Mapping[str, float], *, of_epoch: bool) -> list[Sink]:
        """Writes to the lines and the sinks, and returns the sinks that the step was new to."""
        assert self._lines is not None
        is_new = self._lines.write(values, self._step, self._epoch, of_epoch=of_epoch)
        if is_new and self._findings is not None:
            self._findings.see_model(self.model)  # which the first step may have built
            self._write_findings(self._findings.add(values, self._step, of_epoch=of_epoch))
        written = []
        for sink in self._sinks:
            last = sink.last_step(of_epoch=of_epoch)
            if is_new if last is None else self._step > last:
                sink.write_values(values, self._step, of_epoch=of_epoch)
                written.append(sink)
        return written

    def _write_findings(self, text: str | None) -> None:
        """Writes what is found, if that has changed."""
        if text is not None and self._findings is not None:
            for sink in self._sinks:
                sink.write_text(TAG, text, self._step)
            self._findings.write(self._epoch)

    def _write_histograms(self, sinks: Sequence[Sink]) -> None:
        paths = LayerTree.of(self.model).paths_of
        weights = {
            f"weights/{next(iter(paths(v)), v.name)}": ops.convert_to_numpy(v) for v in self.model.trainable_variables
        }
        for sink in sinks:
            sink.write_histograms(weights, self._step)

    def _numbers(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """What in the logs is a number; of everything else one warning says that it is left out."""
        found, others = {}, []
        for name, value in logs.items():
            scalar = _scalar(value)
            if scalar is not None:
                found[name] = scalar
            elif name not in self._left_out:
                others.append(f"{name!r} ({type(value).__name__})")
                self._left_out.add(name)
        if others:
            warnings.warn(
                f"TrainingMonitor writes numbers, and leaves out what else is in the logs: {', '.join(others)}.",
                stacklevel=2,
            )
        return found

    def _end(self, *, failed: bool = False) -> None:
        if self._probe is not None:
            detach(self._probe)
            self._probe = None
        if self._lines is None:
            return
        lines, opened = self._lines, self._open
        self._lines, self._open = None, []
        with contextlib.ExitStack() as closing:  # in the opposite order, and all of them even if one raises
            closing.callback(lambda: setattr(self, "_last_of_lines", lines.close()))
            for sink in opened:  # an exception in what follows, or in another sink, is a failure, too
                closing.push(lambda kind, *_, sink=sink: sink.close(failed=failed or kind is not None))
            if len(opened) < len(self._sinks):
                return  # one of them could not be opened
            if self._findings is not None:
                self._write_findings(self._findings.end())
            if self.figures and max(lines.last.values()) >= 0:
                png = charts_png(self.log_dir)
                for sink in opened:
                    sink.write_figure("charts", png, max(lines.last.values()))


def _scalar(value: Any) -> float | None:
    """A number, also as a tensor or an array with one element; None for everything else."""
    if value is None or isinstance(value, str | bytes | Mapping | list | tuple):
        return None
    try:
        array = np.asarray(ops.convert_to_numpy(value))
        return float(array.item()) if array.size == 1 and array.dtype.kind in "biuf" else None
    except (TypeError, ValueError):
        return None


def _checked_hparams(hparams: Any) -> Any:
    if hparams is None or hparams == "auto":
        return hparams
    wanted = '"auto", None, or a dict of name to number, string or boolean'
    if not isinstance(hparams, Mapping):
        raise TypeError(f"hparams must be {wanted}, got {hparams!r} of type {type(hparams).__name__}.")
    for name, value in hparams.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(f"hparams must be {wanted}, got {name!r}: {value!r}.")
    return dict(hparams)
