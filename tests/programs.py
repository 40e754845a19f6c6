"""Programs in the form of public examples, with optimizer, monitor, guard, Checkpoint and Resume dropped in.

    python tests/programs.py [NAME ...]

runs those of `tests/example_programs` (all, without a name), prints a table in Markdown and fails if anything is not as
it should be. Of each program is checked that

- **first step**: after one batch, the weights are those of Keras's optimizers with the same formula, up to rounding.
  Those are given the gradient of an embedding as one tensor: a row that occurs several times in a batch they would
  otherwise square once for each time, before the sum;
- **monitor**: in the first updates, norm of the gradient, norm of the weights and update-to-weight ratio are those that
  NumPy makes of what Keras's optimizers are given by the same program, run eagerly;
- **passive**: monitor, Checkpoint and Resume change nothing: all is bitwise as with the guard alone (which is part of
  the compiled step, and may change it by rounding);
- **Checkpoint**: what it wrote last are the weights at the end;
- **killed**: killed with SIGKILL after a random batch and run again, everything is bitwise as without: weights, state
  of all optimizers, seeds, logs.

Every run is a process of its own, forked from one that has imported TensorFlow or JAX and has not used it yet.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np

import keras_optkit as ok
from keras_optkit.optimizers.of_model import innermost, optimizers_of

#: The programs, by the backend that they are for.
PROGRAMS = {
    "actor_critic": "tensorflow",
    "convnet_jax": "jax",
    "custom_loop": "tensorflow",
    "distillation": "tensorflow",
    "gan": "tensorflow",
    "miniature_gpt": "tensorflow",
    "siamese": "tensorflow",
    "simclr": "tensorflow",
    "transfer": "tensorflow",
    "transformer": "tensorflow",
    "unknown_length": "tensorflow",
    "vae": "tensorflow",
}

#: Updates whose monitored values are compared.
COMPARED = 3


class Enough(Exception):
    """Ends a program early; the model is its argument."""


class Count(keras.callbacks.Callback):
    """Counts the batches of a program, over all its fits, and at one of them does something."""

    stateless = True

    def __init__(self, at: int | None = None, then: Callable[[Any], None] = lambda _: None):
        super().__init__()
        self.batches, self.at, self.then = 0, at, then

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches == self.at:
            self.then(self.model)  # asking for the model has Keras fill its variables on JAX


class Histories(keras.callbacks.Callback):
    """Keeps the logs of all epochs of a run that was not interrupted, or of its last part."""

    stateless = True

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.logs.append((epoch, {name: float(value) for name, value in (logs or {}).items()}))


class Tools:
    """What a program is run with: optimizers of this package (or stock ones), and callbacks."""

    def __init__(self, directory: Path, callbacks: Callable[[str], list[Any]], *, stock: bool = False):
        self.directory, self.callbacks_of, self.stock = directory, callbacks, stock
        self.optimizers: list[Any] = []
        self.resumed_from: Any = None

    def adam(self, rate: float, **arguments: Any) -> Any:
        if self.stock:
            return self._made(keras.optimizers.Adam(rate, **arguments))
        # with Keras's ε, and like it moving the rows of an embedding that are not in a batch
        return self._made(ok.optimizers.Adam(rate, epsilon=1e-7, epsilon_hat=True, sparse="dense", **arguments))

    def sgd(self, rate: float, **arguments: Any) -> Any:
        if self.stock:
            return self._made(keras.optimizers.SGD(rate, **arguments))
        return self._made(ok.optimizers.SGD(rate, sparse="dense", **arguments))

    def _made(self, optimizer: Any) -> Any:
        self.optimizers.append(optimizer)
        if self.stock and keras.config.backend() == "tensorflow":
            import tensorflow as tf

            plain = optimizer.apply
            vars(optimizer)["apply"] = lambda gradients, variables: plain(
                [tf.convert_to_tensor(gradient) for gradient in gradients], variables
            )
        return optimizer

    def callbacks(self, fit: str = "fit") -> list[Any]:
        return self.callbacks_of(fit)

    def resumed(self, where: Any) -> None:
        """For a program that does without Resume."""
        self.resumed_from = where


def program(name: str) -> Any:
    return importlib.import_module(f"example_programs.{name}")


def trained(name: str, tools: Tools) -> Any:
    """The model of a program when it has ended."""
    keras.utils.set_random_seed(1)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    try:
        return program(name).train(tools)
    except Enough as enough:
        return enough.args[0]


def state(model: Any, tools: Tools) -> dict[str, np.ndarray]:
    """Weights, seeds, and the variables of all optimizers, by path."""
    variables = [*model.variables]
    held = {id(inner): inner for one in [*optimizers_of(model), *tools.optimizers] for inner in innermost(one)}
    for optimizer in held.values():
        variables += optimizer.variables
    return {f"{i} {variable.path}": copied(variable) for i, variable in enumerate(variables)}


# -- the runs, each in a process of its own ---------------------------------------------------------------------------


def enough(model: Any) -> None:
    raise Enough(model)


def first_step(name: str, directory: Path, *, stock: bool) -> Any:
    """The weights after one batch."""
    made = Count(1, enough)
    model = trained(name, Tools(directory, lambda _: [made], stock=stock))
    return [copied(w) for w in model.trainable_weights]


def by_hand(name: str, directory: Path) -> Any:
    """For each of the first batches the norms that NumPy makes of what the stock optimizers were given."""
    batches: list[list[tuple[Any, Any, Any]]] = []

    class Begin(keras.callbacks.Callback):
        stateless = True

        def on_train_begin(self, logs: Any = None) -> None:
            self.model.run_eagerly = True
            self.model.make_train_function(force=True)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            batches.append([])

    class Recording(Tools):
        def _made(self, optimizer: Any) -> Any:
            plain = super()._made(optimizer).apply

            def apply(gradients: Any, variables: Any) -> None:
                pairs = [(copied(g), copied(v), v) for g, v in zip(gradients, variables, strict=True)]
                plain(gradients, variables)
                batches[-1] += [(g, before, copied(v)) for g, before, v in pairs]

            vars(optimizer)["apply"] = apply
            return optimizer

    ended = Count(COMPARED, enough)
    trained(name, Recording(directory, lambda _: [Begin(), ended], stock=True))
    return [
        {
            "train/gradient_norm": norm(g for g, _, _ in batch),
            "train/weight_norm": norm(before for _, before, _ in batch),
            "train/update_ratio": norm(after - before for _, before, after in batch)
            / norm(before for _, before, _ in batch),
        }
        for batch in batches
    ]


def copied(array: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(array))


def norm(arrays: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(array, dtype="float64"))) for array in arrays))


def whole(name: str, directory: Path, *, kill_at: int | None = None, bare: bool = False) -> Any:
    """A run with all callbacks, or with the guard alone, to its end or until it is killed."""
    module, histories, resumes, checkpoints = program(name), Histories(), [], []
    count = Count(kill_at, lambda _: os.kill(os.getpid(), signal.SIGKILL))

    def callbacks(fit: str) -> list[Any]:
        if hasattr(module, "LOOP"):
            return [count]
        if bare:
            return [ok.callbacks.NonFiniteGuard(spike=None), count]
        every = "epoch" if hasattr(module, "BY_EPOCH") else 2
        resumes.append(ok.callbacks.Resume(directory / fit / "resume", every=every))
        checkpoints.append(
            ok.callbacks.Checkpoint(directory / fit / "checkpoints", monitor=None, top_k=0, save="weights")
        )
        monitor = ok.callbacks.TrainingMonitor(directory / fit / "monitor", every=1)
        return [monitor, ok.callbacks.NonFiniteGuard(spike=None), checkpoints[-1], histories, count, resumes[-1]]

    tools = Tools(directory, callbacks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x must be a keras_optkit.data.Shuffled")
        model = trained(name, tools)
    found: dict[str, Any] = {"state": state(model, tools), "batches": count.batches, "logs": histories.logs}
    found["resumed"] = tools.resumed_from or [resume.resumed_from for resume in resumes]
    if checkpoints:
        found["weights"] = weights(model)
        checkpoints[-1].load_latest(model)
        found["checkpoint"] = weights(model)
        fits = sorted((path for path in directory.iterdir()), key=lambda path: path.stat().st_mtime)
        found["monitored"] = {
            tag: dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for tag, c in monitored(fits[0]).items()
        }
    return found


def monitored(fit: Path) -> Any:
    return ok.callbacks.read_monitor(fit / "monitor")


def weights(model: Any) -> dict[str, np.ndarray]:
    return {f"{i} {weight.path}": copied(weight) for i, weight in enumerate(model.weights)}


def unequal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """The names of what is not bitwise equal."""
    return sorted(one.keys() ^ other.keys()) + [
        name for name in one if name in other and one[name].tobytes() != other[name].tobytes()
    ]


def in_a_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns in a forked process; None if that was killed.

    Raises:
        RuntimeError: With the traceback, if it has failed.
    """
    with tempfile.TemporaryDirectory() as name:
        process = os.fork()
        if not process:
            code = 1
            try:
                (Path(name) / "result").write_bytes(pickle.dumps(function(*args, **kwargs)))
                code = 0
            except BaseException:
                (Path(name) / "error").write_text(traceback.format_exc(limit=-4))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == -signal.SIGKILL:
            return None
        if code:
            error = Path(name) / "error"
            raise RuntimeError(error.read_text() if error.exists() else f"exit code {code}")
        return pickle.loads((Path(name) / "result").read_bytes())


# -- what is checked --------------------------------------------------------------------------------------------------


def check(name: str) -> dict[str, str]:
    """A row of the table: what was found for each thing that is checked; "FAILED: ..." for what is not right."""
    row = {"program": name, "modelled on": program(name).SOURCE}
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for part in ("first", "bare", "whole", "killed"):
            (directory / part).mkdir()

        def attempt(what: str, function: Callable[[], str]) -> None:
            try:
                row[what] = function()
            except Exception as error:
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                row[what] = f"FAILED: {lines[-1].strip()[:300]}" if lines else f"FAILED: {error!r}"
                print(f"--- {name}, {what}:\n{error}", file=sys.stderr)

        runs: dict[str, Any] = {}

        def first() -> str:
            ours, stock = (in_a_process(first_step, name, directory / "first", stock=s) for s in (False, True))
            start = in_a_process(initial, name, directory / "first")
            moved = max(float(np.max(np.abs(a - b))) for a, b in zip(stock, start, strict=True))
            apart = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, stock, strict=True))
            assert moved > 0, "the first step of the stock optimizer moves nothing"
            assert apart <= 1e-3 * moved, f"{apart:.1e} apart, where the largest step is {moved:.1e}"
            return f"{apart / moved:.0e} of a step apart"

        def passive() -> str:
            runs["bare"] = in_a_process(whole, name, directory / "bare", bare=True)
            runs["whole"] = in_a_process(whole, name, directory / "whole")
            different = unequal(runs["bare"]["state"], runs["whole"]["state"])
            assert not different, f"other than without them: {', '.join(different)}"
            return "bitwise"

        def checkpoint() -> str:
            if "checkpoint" not in runs["whole"]:
                return "none"
            held = runs["whole"]["checkpoint"]
            different = unequal(held, runs["whole"]["weights"])
            assert not different, f"other than at the end: {', '.join(different)}"
            return "bitwise"

        def monitor() -> str:
            if "monitored" not in runs["whole"]:
                return "none"
            hand = by_hand_on_jax if keras.config.backend() == "jax" else by_hand
            expected, worst = in_a_process(hand, name, directory / "first"), 0.0
            for update, values in enumerate(expected, 1):
                for tag, value in values.items():
                    found = runs["whole"]["monitored"].get(tag, {}).get(update)
                    assert found is not None, f"{tag} was not written for update {update}"
                    worst = max(worst, abs(found - value) / value)
                    assert abs(found - value) <= 1e-3 * value, (
                        f"{tag} of update {update} is {found:.6g}, by hand {value:.6g}"
                    )
            return f"{3 * len(expected)} values, within {worst:.0e}"

        def killed() -> str:
            total = runs["bare"]["batches"]
            at = random.Random(name).randrange(total // 2, total)
            assert in_a_process(whole, name, directory / "killed", kill_at=at) is None, "was not killed"
            again = in_a_process(whole, name, directory / "killed")
            assert again["resumed"], "began from the beginning"
            different = unequal(again["state"], runs["whole"]["state"])
            assert not different, f"killed after {at} of {total} batches: other {', '.join(different)}"
            logs = runs["whole"]["logs"][len(runs["whole"]["logs"]) - len(again["logs"]) :]
            assert again["logs"] == logs, f"killed after {at} of {total} batches: other logs"
            return f"after {at} of {total} batches, resumed at {again['resumed']}: bitwise"

        attempt("first step", first)
        attempt("passive", passive)
        if "whole" in runs:
            attempt("Checkpoint", checkpoint)
            attempt("monitor", monitor)
            attempt("killed", killed)
    return row


def initial(name: str, directory: Path) -> Any:
    """The weights that the program begins with: those after a step with a rate of 0."""

    class Still(Tools):
        def adam(self, rate: float, **arguments: Any) -> Any:
            return super().sgd(0.0)

        def sgd(self, rate: float, **arguments: Any) -> Any:
            return super().sgd(0.0)

    model = trained(name, Still(directory, lambda _: [Count(1, enough)], stock=True))
    return [copied(w) for w in model.trainable_weights]


def by_hand_on_jax(name: str, directory: Path) -> Any:
    """As `by_hand`, of the first update: JAX differentiates the loss on the first batch as a function of weights."""
    import jax

    batches: list[Any] = []
    model_of: list[Any] = []

    class See(keras.callbacks.Callback):
        stateless = True

        def on_train_begin(self, logs: Any = None) -> None:
            model = self.model
            x, y = batches[0]
            loss_of = model.loss

            def loss(weights: Any) -> Any:
                y_pred, _ = model.stateless_call(
                    weights, [v.value for v in model.non_trainable_variables], x, training=True
                )
                return keras.ops.mean(keras.losses.get(loss_of)(y, y_pred))

            before = [copied(v) for v in model.trainable_variables]
            gradients = jax.grad(loss)([v.value for v in model.trainable_variables])
            model_of.append(([copied(g) for g in gradients], before))

    seen = ok.data.Shuffled.__getitem__

    def item(self: Any, index: int) -> Any:
        batch = seen(self, index)
        if not batches:
            batches.append(batch)
        return batch

    ok.data.Shuffled.__getitem__ = item  # type: ignore[method-assign]
    model = trained(name, Tools(directory, lambda _: [See(), Count(1, enough)], stock=True))
    gradients, before = model_of[0]
    after = [copied(v) for v in model.trainable_variables]
    return [
        {
            "train/gradient_norm": norm(gradients),
            "train/weight_norm": norm(before),
            "train/update_ratio": norm(a - b for a, b in zip(after, before, strict=True)) / norm(before),
        }
    ]


COLUMNS = ("program", "modelled on", "first step", "monitor", "passive", "Checkpoint", "killed")


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(PROGRAMS))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}. Programs: {', '.join(PROGRAMS)}")
    as_json = "PROGRAMS_AS_JSON" in os.environ
    if not as_json:
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    failed = False
    for name in names or PROGRAMS:
        row = check(name) if PROGRAMS[name] == keras.config.backend() else elsewhere(name)
        failed |= any(value.startswith("FAILED") for value in row.values())
        shown = " | ".join(row.get(column, "").replace("|", "\\|") for column in COLUMNS)
        print(json.dumps(row) if as_json else f"| {shown} |", flush=True)
    return int(failed)


def elsewhere(name: str) -> dict[str, str]:
    """The row of a program that is for another backend, which a process can have but one of."""
    environment = os.environ | {"KERAS_BACKEND": PROGRAMS[name], "PROGRAMS_AS_JSON": "1"}
    command = [sys.executable, __file__, name]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
