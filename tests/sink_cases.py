"""Writes to W&B, MLflow and Trackio as they are without a server, and reads it back: `python tests/sink_cases.py`.

Needs `pip install keras-optkit[wandb,mlflow,trackio]` and matplotlib. A broken model is trained with `TrainingMonitor`;
the values are compared with the lines of JSON. Names of packages as arguments choose among them.
"""

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np


def written(log_dir):
    """(tag, step, value) of the lines of JSON."""
    import keras_optkit as ok

    curves = ok.callbacks.read_monitor(log_dir).items()
    return [(tag, int(s), float(v)) for tag, curve in curves for s, v in zip(curve.steps, curve.values, strict=True)]


def fits(sink, log_dir):
    """Two `fit`, the second of which is resumed: its first update is computed again."""
    import keras

    import keras_optkit as ok

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    tiny = keras.initializers.RandomNormal(stddev=1e-4)
    layers = [keras.layers.Dense(8, "relu", kernel_initializer=tiny, name="a>b"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(ok.optimizers.Adam(1e-3), "mse")
    for again in (False, True):
        monitor = ok.callbacks.TrainingMonitor(
            log_dir, every=2, findings=True, figures=True, sinks=[sink], histograms=None if is_mlflow(sink) else 2
        )
        if again:
            model.optimizer.iterations.assign(6)
        callbacks = [monitor, *([restored(monitor)] if again else [])]
        model.fit(x, x[:, :1], batch_size=4, epochs=1, callbacks=callbacks, verbose=0)


def is_mlflow(sink):
    return type(sink).__name__ == "MLflow"


def restored(monitor):
    """Has a monitor begin at update 6, as if the run had been restored there; 7 and 8 are in the files."""
    import keras

    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            clips = {"clips": {}, "noise": []}
            state = {"step": 6, "offset": 0, "due": 7, "epoch_step": -1, "writes": 4, **clips}
            monitor.load_state_dict(state)

    return Begin()


def wandb(directory):
    """Read from the file that `wandb sync` sends: records in the log format of LevelDB, each a message of protobuf."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    import keras_optkit as ok

    run = wandb.init(project="sinks", mode="offline", dir=str(directory), settings=wandb.Settings(silent=True))
    fits(ok.callbacks.sinks.WandB(), directory / "logs")
    run.finish()
    (file,) = directory.rglob("*.wandb")
    values, texts, figures, histograms, params, axes = [], [], [], 0, {}, set()
    for payload in leveldb_records(file.read_bytes()[7:]):
        record = Record.FromString(payload)
        for item in record.config.update if record.HasField("config") else ():
            params[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if record.HasField("metric"):
            axes.add((record.metric.glob_name or record.metric.name, record.metric.step_metric))
        if not record.HasField("history"):
            continue
        row = {}
        for item in record.history.item:
            tag, *inside = item.nested_key or [item.key]  # a picture, say, is written key by key
            value = json.loads(item.value_json)
            row[tag] = row.get(tag, {}) | {inside[0]: value} if inside else value
        for tag, value in row.items():
            kind = value.get("_type") if isinstance(value, dict) else None
            if kind == "html-file":
                texts.append((directory / file.parent / "files" / value["path"]).read_text())
            elif kind == "image-file":
                figures.append((directory / file.parent / "files" / value["path"]).read_bytes())
            elif kind == "histogram":
                histograms += 1
            elif tag not in ("update",) and not tag.startswith("_"):
                values.append((tag, row["update"], float(value)))
    assert ("train/*", "update") in axes
    return values, texts, figures, histograms, params


def leveldb_records(data, block=32768):
    """The payloads of a log of LevelDB, joined where they are split; the blocks begin before the header of 7 bytes."""
    place, parts = 0, b""
    while place + 7 <= len(data):
        left = block - (place + 7) % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def mlflow(directory):
    """Read by its own client, from SQLite."""
    import mlflow

    import keras_optkit as ok

    mlflow.set_tracking_uri(f"sqlite:///{directory}/mlflow.db")
    experiment = mlflow.create_experiment("sinks", artifact_location=(directory / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        fits(ok.callbacks.sinks.MLflow(), directory / "logs")
    client, number = mlflow.MlflowClient(), run.info.run_id
    data = client.get_run(number).data
    history = [metric for name in data.metrics for metric in client.get_metric_history(number, name)]
    values = [(m.key.replace("_x3e_", ">"), m.step, m.value) for m in history]
    files = [f.path for place in ("findings", "charts") for f in client.list_artifacts(number, place)]
    read = {path: Path(client.download_artifacts(number, path, str(directory))).read_bytes() for path in files}
    texts = [content.decode() for path, content in read.items() if path.endswith(".md")]
    return values, texts, [content for path, content in read.items() if path.endswith(".png")], 0, data.params


def trackio(directory):
    """Read by the class that its dashboard reads with, from SQLite."""
    os.environ["TRACKIO_DIR"] = str(directory / "trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    import keras_optkit as ok

    run = trackio.init("sinks", name="one", auto_log_gpu=False, auto_log_cpu=False, embed=False)
    fits(ok.callbacks.sinks.Trackio(run), directory / "logs")
    trackio.finish()
    values, texts, figures, histograms = [], [], [], 0
    for row in SQLiteStorage.get_logs("sinks", "one"):
        for tag, value in row.items():
            kind = value.get("_type") if isinstance(value, dict) else None
            if kind == "trackio.markdown":
                texts.append(value["_value"])
            elif kind == "trackio.image":
                figures.append((directory / "trackio" / "media" / value["file_path"]).read_bytes())
            elif kind == "trackio.histogram":
                histograms += 1
            elif tag not in ("step", "timestamp"):
                values.append((tag, row["step"], float(value)))
    return values, texts, figures, histograms, {}


def main(names):
    print(
        f"{'package':8} {'version':>8} {'values':>12} {'findings':>8} {'figures':>7} {'histograms':>10} {'params':>6}"
    )
    right = True
    for name in names or ["wandb", "mlflow", "trackio"]:
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            values, texts, figures, histograms, params = globals()[name](place)
            expected = written(place / "logs")
            same = sum(values.count(value) == 1 for value in expected)
            right &= sorted(values) == sorted(expected)
            lines = (place / "logs" / "findings.jsonl").read_text().splitlines()
            right &= len(texts) == len(lines) and any("kernel_scale" in text for text in texts)
            right &= len(figures) == 2 and all(figure.startswith(b"\x89PNG") for figure in figures)
            version = sys.modules[name].__version__
            print(
                f"{name:8} {version:>8} {f'{same} of {len(expected)}':>12} {len(texts):8} {len(figures):7} "
                f"{histograms:10} {'beta_1' in params!s:>6}",
                flush=True,
            )
    return 0 if right else "What was read back is not what was written."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
