"""Trainings that are killed with SIGKILL, run again, killed again, and compared with one that was left alone.

`tests/test_resume.py` runs a share of it; the long form is

    python tests/kill.py --runs 12 --kills 3

A training is a process of its own. All are forked from one that has imported TensorFlow and has not used it yet, which
saves the time of the import.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf

import keras_optkit as ok
from keras_optkit.callbacks import bundle
from keras_optkit.callbacks.identity import differences
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.callbacks.stock import has_state, state_of

ROWS, BATCH, EPOCHS, EVERY = 160, 16, 12, 4


class Remember(keras.layers.Layer):
    """Keeps the numbers of the rows that the last training step was given, and gives the rest on."""

    def build(self, shape):
        self.rows = self.add_weight(shape=(BATCH // self.replicas,), initializer="zeros", trainable=False, name="rows")

    def __init__(self, replicas=1, **kwargs):
        super().__init__(**kwargs)
        self.replicas = replicas

    def call(self, x, training=False):
        if training:
            self.rows.assign(x["row"][:, 0])
        return x["x"]


class Log(keras.callbacks.Callback):
    """Writes down every batch that was trained on, with the numbers of its rows, and says where the training is."""

    stateless = True

    def __init__(self, path, layer):
        super().__init__()
        self.file, self.layer = path.open("a"), layer

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        parts = self.model.distribute_strategy.experimental_local_results(self.layer.rows.value)
        rows = [int(n) for part in parts for n in part.numpy()]
        print(json.dumps([self.epoch, batch, rows]), file=self.file, flush=True)


def cnn():
    """Dropout, batch normalisation, augmentation, a moving average of the weights, and most of the callbacks."""
    rows = Remember()
    inputs = {"x": keras.Input((8, 8, 1)), "row": keras.Input((1,))}
    x = keras.layers.RandomFlip("horizontal")(rows(inputs))
    x = keras.layers.RandomTranslation(0.1, 0.1)(x)
    x = keras.layers.Conv2D(8, 3)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3)(keras.layers.Flatten()(keras.ops.relu(x)))
    x = keras.layers.Dense(2000, "relu")(x)  # so that writing takes a while
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    optimizer = ok.optimizers.AdamW(3e-3, use_ema=True, ema_momentum=0.9, global_clipnorm=1.0)
    return model, rows, optimizer, _images()


def transformer():
    """Attention, Schedule-Free, and accumulation that a bundle finds in the middle of a cycle."""
    rows = Remember()
    inputs = {"x": keras.Input((8, 8)), "row": keras.Input((1,))}
    x = keras.layers.Dense(16)(rows(inputs))
    y = keras.layers.MultiHeadAttention(2, 8, dropout=0.1)(x, x)
    x = keras.layers.LayerNormalization()(x + keras.layers.Dropout(0.1)(y))
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    optimizer = ok.optimizers.ScheduleFreeAdamW(1e-2, warmup_steps=5, gradient_accumulation_steps=3)
    x, y = _images()
    return model, rows, optimizer, ({**x, "x": x["x"][..., 0]}, y)


def replicas():
    """Two replicas, on logical devices, with one of Keras's optimizers under loss scaling."""
    rows = Remember(2)
    inputs = {"x": keras.Input((8, 8, 1)), "row": keras.Input((1,))}
    x = keras.layers.Flatten()(rows(inputs))
    x = keras.layers.Dropout(0.3)(keras.layers.Dense(32, "relu")(x))
    x = keras.layers.BatchNormalization()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    return model, rows, keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(3e-3)), _images()


SCENARIOS = {"cnn": cnn, "transformer": transformer, "replicas": replicas}


def _images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, ROWS)
    x = rng.normal(size=(ROWS, 8, 8, 1)) + np.linspace(-1, 1, 8)[None, :, None, None] * (y[:, None, None, None] - 1.5)
    return {"x": x.astype("float32"), "row": np.arange(ROWS, dtype="float32")[:, None]}, y


def train(scenario: str, directory: Path) -> None:
    """The script that is run again and again."""
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    strategy = tf.distribute.get_strategy()
    if scenario == "replicas":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model, rows, optimizer, (x, y) = SCENARIOS[scenario]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    callbacks = [
        *(ours if scenario == "cnn" else stock)(directory),
        ok.callbacks.Resume(directory / "resume", every=EVERY, strict=True),
        keras.callbacks.CSVLogger(directory / "log.csv"),
        Log(directory / f"batches-{os.getpid()}.jsonl", rows),
    ]
    data = ok.data.Shuffled(x, y, batch_size=BATCH, seed=5)
    history = model.fit(data, epochs=EPOCHS, validation_data=(x, y), callbacks=callbacks, verbose=0)
    result = {
        "state": vars(TrainingState.of(model)),
        "history": history.history,
        "epochs": history.epoch,
        "log": (directory / "log.csv").read_text(),
        "callbacks": [{k: v for k, v in state_of(c).items() if k != "seconds"} for c in callbacks if has_state(c)],
        "checkpoints": weights_of(directory / "checkpoints", model),
    }
    bundle.write(directory / "result.npz", bundle.pack(result))


def ours(directory: Path) -> list:
    return [
        ok.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.05),
        ok.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        ok.callbacks.Checkpoint(directory / "checkpoints", top_k=2, last_n=2, every=7, save="weights"),
        ok.callbacks.AveragedWeights(),
    ]


def stock(directory: Path) -> list:
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    return [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.05),
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(checkpoints / "best.weights.h5", save_best_only=True, save_weights_only=True),
    ]


def weights_of(directory: Path, model: keras.Model) -> dict:
    """The weights in the checkpoints, by the names of the files."""
    found = {}
    for path in sorted(directory.glob("*.weights.h5")):
        model.load_weights(path)
        found[path.name] = [np.array(weight) for weight in model.get_weights()]
    return found


def start(scenario: str, directory: Path) -> int:
    """Begins a training in a process of its own and returns the number of the process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout = sys.stderr = (directory / f"output-{os.getpid()}.txt").open("w", buffering=1)
        train(scenario, directory)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


def ended(process: int) -> int | None:
    """The exit code of a process, negative for a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def batches(directory: Path, process: int) -> list:
    """The log of one process, without a last line that is torn."""
    path = directory / f"batches-{process}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_at_random(rng: random.Random, directory: Path, process: int, batch: int) -> tuple[int, str]:
    """Kills a training, a random time after it has trained on a batch, or in the first write after that.

    Now and then with SIGTERM. Returns the exit code, and says where it was.
    """
    in_write, delay = rng.random() < 0.4, rng.random() * 0.03
    number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
    torn = set((directory / "resume").glob(".*.tmp"))  # left by the process before
    while (code := ended(process)) is None:
        trained = len(batches(directory, process))
        writing = bool(set((directory / "resume").glob(".*.tmp")) - torn)
        if trained >= batch and (writing or not in_write):
            time.sleep(0 if in_write else delay)
            os.kill(process, number)
            return wait(process), f"{number.name} after {trained} batches" + (", in a write" if in_write else "")
        time.sleep(0.0005)
    return code, "too late: it had ended"


def compare(left_alone: Path, killed: Path) -> list[str]:
    """What is not bitwise the same at the end of two trainings."""
    a, b = (bundle.pack(bundle.read(path / "result.npz")) for path in (left_alone, killed))
    different = differences(json.loads(a.text), json.loads(b.text))
    return different + [name for name in a.arrays if a.arrays[name].tobytes() != b.arrays[name].tobytes()]


def run(scenario: str, kills: int, seed: int, reference: Path, say=print) -> None:
    """One training that is killed some times and then left to end; raises if anything is not as in `reference`."""
    rng = random.Random(f"{scenario} {seed}")
    whole = [line for log in reference.glob("batches-*.jsonl") for line in map(json.loads, log.open())]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "resume").mkdir()
        reached, done, n, terminated = 0, [], 0, False
        while True:
            process = start(scenario, directory)
            if n < kills:
                share = (len(whole) - reached) // (kills - n)  # so that there is something left for the next ones
                code, where = kill_at_random(rng, directory, process, rng.randrange(max(1, share)))
            else:
                code, where = wait(process), "ended"
            log = batches(directory, process)
            begun = whole.index(log[0]) if log else reached
            assert log == whole[begun : begun + len(log)], f"{where}: other batches than without a kill"
            assert begun <= reached, f"{where}: begun at {begun}, though only {reached} batches were trained"
            again = 0 if terminated else 2 * EVERY  # one bundle may have been in the making
            assert begun >= reached - again, f"{where}: {reached - begun} batches were trained again"
            reached = begun + len(log)
            done.append(f"{where} (from {begun} to {reached})")
            n += 1
            terminated = code == 128 + signal.SIGTERM
            if code != -signal.SIGKILL and not terminated:
                break
        output = "\n".join(path.read_text() for path in directory.glob("output-*.txt"))
        assert code == 0, output
        assert reached == len(whole)
        assert n == kills + 1, f"killed {n - 1} times only: {done}"
        assert not (different := compare(reference, directory)), different
        say(f"{scenario}, run {seed}, {len(whole)} batches: {'; '.join(done)}: all equal", flush=True)


def left_alone(scenario: str, directory: Path) -> None:
    """A training without a kill."""
    (directory / "resume").mkdir()
    assert wait(start(scenario, directory)) == 0, next(directory.glob("output-*.txt")).read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4, help="trainings of each scenario")
    parser.add_argument("--kills", type=int, default=3, help="kills of each training")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    given = parser.parse_args()
    for scenario in given.scenarios.split(","):
        with tempfile.TemporaryDirectory() as reference:
            left_alone(scenario, Path(reference))
            for seed in range(given.runs):
                run(scenario, given.kills, seed, Path(reference))


if __name__ == "__main__":
    main()
