"""`diagnose`: what the log of a run says was wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keras_optkit import arguments
from keras_optkit.advice import Finding
from keras_optkit.callbacks.monitor.facts import MODEL
from keras_optkit.callbacks.monitor.files import LINES
from keras_optkit.callbacks.monitor.findings import replayed


@dataclass(frozen=True)
class RunDiagnosis:
    """What the log of one run says.

    Attributes:
        updates: The update at which the log ends.
        writes: How many updates have values in it.
        warnings: What has likely harmed the run, causes before their consequences; `step` is the update since which
            it is so.
        hints: What does little harm, or did none.
        unmeasured: What the log does not have, and why.
    """

    updates: int
    writes: int
    warnings: tuple[Finding, ...] = ()
    hints: tuple[Finding, ...] = ()
    unmeasured: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.warnings)
        lines = [f"{self.updates} updates, {count} warning{'s' * (count != 1)}."]
        lines += [f"{place}. {each}" for place, each in enumerate(self.warnings, 1)]
        lines += [f"Hint: {each}" for each in self.hints]
        lines += [f"Not measured: {each}" for each in self.unmeasured]
        return "\n".join(lines)


@dataclass(frozen=True)
class Diagnosis:
    """What the logs of runs say.

    Attributes:
        runs: Each run by its directory, relative to the one that was given; "." is that one itself.
    """

    runs: Mapping[str, RunDiagnosis]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The warnings of all runs, one run after the other."""
        return tuple(each for run in self.runs.values() for each in run.warnings)

    @property
    def hints(self) -> tuple[Finding, ...]:
        """The hints of all runs."""
        return tuple(each for run in self.runs.values() for each in run.hints)

    def __str__(self) -> str:
        if list(self.runs) == ["."]:
            return str(self.runs["."])
        return "\n\n".join(f"{name}: {run}" for name, run in self.runs.items())


def diagnose(log_dir: str | os.PathLike[str]) -> Diagnosis:
    """Reads the log of a run, and says what was wrong with it.

    The log is that of `TrainingMonitor`, also of a run that died or still runs. What holds at its end is told, with the
    update since which it has held; what has passed is not. Adjacent layers with the same finding are one range.

    | rule | says |
    |---|---|
    | `loss_value`, `missing_gradient` | the loss or gradients are NaN or infinite; the gradient of layers is always 0 |
    | `kernel_scale`, `identical_layers`, `l2_and_adaptive` | as in `inspect`, before the first update |
    | `loss_at_start` | the first cross-entropy was more than 10 times that of a guess |
    | `rate_is_zero` | in the last three writes and the last tenth of the run |
    | `update_size` | the median of `‖change‖ / ‖weights‖` over the layers is above 0.1, or too small |
    | `no_update` | epochs have ended without an update |
    | `exploding_gradient` | the gradient is 100 times as large as at first, and the loss has not fallen |
    | `loss_rises`, `loss_does_not_move` | threefold; by less than 2% in 100 updates or more |
    | `dead_units`, `saturation`, `growth`, `vanishing` | as in `inspect`, with `activations` |
    | `vanishing_gradient` | the first layer's gradient is a 100,000th of another's |
    | `stands_still` | an update changes weights by less than 1e-5 of their norm, though the rate is not lowered |
    | `clipping` | as a hint, in 90% of the last updates |

    Medians are over the last 20 writes. Most rules need eight writes.

    When not to use it: as a proof that a run was healthy. Overfitting, wrong labels, and a rate that is a few times off
    are not found.

    Args:
        log_dir: The directory that the monitor was given, or one with several such directories in it, at any depth.
            With `TrainingMonitor(..., findings=True)` the log has what rules about kernels need.

    Returns:
        A `Diagnosis`, which prints as text; `runs` has the warnings and hints of each run.

    Raises:
        FileNotFoundError: If there is no log in the directory.
        TypeError: `log_dir` is not a path.
        ValueError: A log has lines that are not a monitor's.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((512, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")  # a rate of 0
    with tempfile.TemporaryDirectory() as logs:
        monitor = ok.callbacks.TrainingMonitor(logs, every=4, findings=True)
        model.fit(x, x[:, :1], batch_size=16, epochs=2, callbacks=[monitor], verbose=0)
        diagnosis = ok.diagnose(logs)
    print(diagnosis)
    assert diagnosis.warnings[0].rule == "rate_is_zero"
    ```
    """
    directory = Path(arguments.path("log_dir", log_dir))
    if not directory.is_dir():
        raise FileNotFoundError(
            f"log_dir must be the directory of a TrainingMonitor, got {str(directory)!r}: no directory."
        )
    found = sorted({path.parent for path in directory.rglob(LINES)})
    if not found:
        raise FileNotFoundError(
            f"log_dir must be the directory of a TrainingMonitor or have some in it, got {str(directory)!r}: there is "
            f"no {LINES}."
        )
    return Diagnosis({path.relative_to(directory).as_posix(): _of_run(path) for path in found})


def _of_run(directory: Path) -> RunDiagnosis:
    following = replayed(str(directory))
    following.ask()
    history, findings = following.history, following.findings
    unmeasured = []
    if not history.count and not history.epochs:
        unmeasured.append("Everything: the log ends before its first value.")
    if not (directory / MODEL).exists():
        unmeasured.append("Kernels: the monitor had findings=False.")
    return RunDiagnosis(
        history.step,
        history.count,
        tuple(each for each in findings if not each.is_hint),
        tuple(each for each in findings if each.is_hint),
        tuple(unmeasured),
    )
