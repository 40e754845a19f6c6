"""TensorBoard, started for real and looked at in a real browser, shows what the package logs."""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from playwright.sync_api import TimeoutError as NotShown
from playwright.sync_api import sync_playwright

import keras_optkit as ok

SCREENSHOTS = "KERAS_OPTKIT_SCREENSHOTS"  # a directory for pictures of the pages, if wanted
PATIENCE = 90_000  # milliseconds until something that is not shown counts as missing
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The cells of the HParams table, row by row; a cell of the grid is a slot that the page's text is assigned to.
READ_TABLE = """grid => [...grid.shadowRoot.querySelectorAll("thead tr, tbody tr:not([hidden])")].map(
    row => [...row.children].map(
        cell => cell.querySelector("slot").assignedElements().map(element => element.innerText.trim()).join("")))"""


@contextlib.contextmanager
def tensorboard(log_dir):
    """Starts TensorBoard on a directory; gives its address once all logs are loaded."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "localhost", "--port", "0"]
    command += ["--load_fast", "false", "--reload_interval", "0", "--reload_task", "blocking"]  # load, then serve
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watchdog = threading.Timer(240, process.kill)
        watchdog.start()
        try:
            output = []
            for line in process.stdout:
                output.append(line)
                if found := re.search(r"TensorBoard \S+ at (http://\S+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError(f"TensorBoard did not start:\n{''.join(output)}")
        finally:
            watchdog.cancel()
            process.terminate()


@contextlib.contextmanager
def browser_page():
    """A page of headless Chromium with a fresh profile."""
    chromium = shutil.which("chromium")
    assert chromium, "This test needs the browser Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def picture(page, name):
    if directory := os.environ.get(SCREENSHOTS):
        page.screenshot(path=str(Path(directory) / f"{name}.png"))


def assert_charts(page, url, tags):
    """The scalars dashboard draws at least one line for each tag."""
    page.goto(f"{url}#scalars")
    search = page.locator("tf-tag-filterer input")
    for tag in tags:
        search.fill(f"^{re.escape(tag)}$")
        name = page.locator("tf-card-heading").get_by_text(tag, exact=True)
        card = page.locator("tf-scalar-card").filter(has=name).first
        try:
            card.locator(".line-plot path[d^='M']").first.wait_for(state="attached")
        except NotShown:
            raise AssertionError(f"TensorBoard draws no chart of {tag!r}.") from None
    picture(page, "scalars")


def assert_layout(page, url, charts):
    """The custom-scalars dashboard opens on these charts: title to the tags that it draws a line of."""
    page.goto(f"{url}#custom_scalars")
    for title, tags in charts.items():
        card = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has_text=title).first
        try:
            card.scroll_into_view_if_needed()
            card.locator(f".line-plot path[d^='M'] >> nth={len(tags) - 1}").wait_for(state="attached")
        except NotShown:
            raise AssertionError(f"TensorBoard's custom scalars show no chart {title!r} of {tags}.") from None


def same(cell, value):
    """Whether a cell shows a value; an inactive hyperparameter, None, is an empty cell."""
    if value is None or isinstance(value, bool | str):
        return cell == ("" if value is None else str(value).lower() if isinstance(value, bool) else value)
    try:
        return math.isclose(float(cell), value, rel_tol=1e-3)  # TensorBoard shows five digits
    except ValueError:
        return False


def assert_hparams(page, url, trials):
    """The HParams table has one row for each trial with these values, and no other row."""
    page.goto(f"{url}#hparams")
    grid = page.locator("vaadin-grid#sessionGroupsTable")
    try:
        grid.get_by_text("Trial ID", exact=True).wait_for()
    except NotShown:
        raise AssertionError("TensorBoard shows no HParams table.") from None
    names = list({name: None for trial in trials for name in trial})
    shown = grid.evaluate(READ_TABLE)[0]
    boxes = page.locator("tf-hparams-query-pane paper-checkbox")
    for name in names:  # TensorBoard shows five hyperparameters and five metrics, and the others when they are ticked
        exactly = re.compile(rf"^\s*{re.escape(name)}\s*$")
        try:
            if name not in shown:
                boxes.filter(has_text=exactly).click()
            grid.locator(".table-header").filter(has_text=exactly).first.wait_for()
        except NotShown:
            raise AssertionError(f"The HParams table has the columns {shown}, and no {name!r}.") from None
    with contextlib.suppress(NotShown):  # the rows come after the header; a missing one is reported below
        page.wait_for_function(
            f"([grid, count]) => ({READ_TABLE})(grid).filter(row => row[0]).length > count",
            arg=[grid.element_handle(), len(trials)],
        )
    head, *rows = [row for row in grid.evaluate(READ_TABLE) if row[0]]
    rows = [dict(zip(head, row, strict=False)) for row in rows]
    for trial in trials:
        found = [row for row in rows if all(same(row[name], value) for name, value in trial.items())]
        assert found, f"No row of the HParams table shows {trial}; it has {rows}."
        rows.remove(found[0])
    assert not rows, f"The HParams table shows trials that were not run: {rows}."
    picture(page, "hparams")


def assert_tensorboard_shows(log_dir, tags, trials):
    """Opens TensorBoard on `log_dir` and looks for charts of `tags` and for an HParams table of exactly these `trials`.

    Args:
        log_dir: What TensorBoard is started on.
        tags: Names of scalars.
        trials: For each trial what its row shows, column to value; None means that the cell is empty.
    """
    with tensorboard(log_dir) as url, browser_page() as page:
        assert_charts(page, url, tags)
        assert_hparams(page, url, trials)


def rows(result):
    """What the HParams table is to show of a search: the hyperparameters and the best objective."""
    names = list(result.space)
    best = f"best_{result.objective}"
    return [{name: t.values.get(name) for name in names} | {best: t.score} for t in result.trials]


@pytest.mark.long
def test_tensorboard_shows_scalars_and_hparams(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(96, 4)).astype("float32")
    y = (x[:, :1] > x[:, 1:2]).astype("float32")

    def build(hp):
        if hp.learning_rate > 1:
            raise ValueError("a trial that fails")
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
        optimizer = keras.optimizers.SGD(hp.learning_rate, hp.get("momentum", 0.0), nesterov=hp.get("nesterov", False))
        model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
        return model

    Choice = ok.tuning.Choice
    grid = ok.tuning.search(
        build,
        ok.tuning.Space(
            method=Choice(["plain", "momentum"]),
            momentum=Choice([0.5, 0.9], when={"method": "momentum"}),
            nesterov=Choice([True], when={"method": "momentum"}),
            learning_rate=Choice([0.05]),
            batch_size=Choice([32]),
        ),
        (x, y),
        strategy="grid",
        epochs=2,
        seed=0,
        log_dir=tmp_path / "grid",
        verbose=0,
    )
    # A second search, with other hyperparameters and the same names of trials, beside the first.
    random = ok.tuning.search(
        build,
        {"learning_rate": Choice([0.125, 8.0]), "epochs": Choice([1])},
        (x, y),
        seed=0,
        callbacks=lambda hp, log_dir: [ok.callbacks.TrainingMonitor(log_dir)],  # noqa: ARG005
        log_dir=tmp_path / "random",
        verbose=0,
    )
    trials = rows(grid) + rows(random)
    assert len(trials) == 5
    assert [trial.status for trial in sorted(random.trials, key=lambda t: t.values.learning_rate)] == [
        "completed",
        "failed",
    ]
    tags = [
        "epoch_loss",
        "epoch_accuracy",
        "best_val_accuracy",
        "train/learning_rate",
        "train/loss",
        "train/gradient_norm",
    ]
    assert_tensorboard_shows(tmp_path, tags, trials)


def digits_run(log_dir):
    """A small real training that is watched with everything there is."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype("float32")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv_1"),
            layers.BatchNormalization(name="norm_1"),
            layers.ReLU(name="relu_1"),
            layers.Conv2D(32, 3, strides=2, activation="relu", name="conv_2"),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(10, name="logits"),
        ],
        name="digits",
    )
    updates = 5 * 45
    rate = ok.schedules.Warmup(ok.schedules.Cosine(5e-3, updates), steps=20)
    model.compile(
        ok.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=2.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    monitor = ok.callbacks.TrainingMonitor(
        log_dir, every=5, activations="relu|hidden|conv_2", histograms=3, noise_scale=True
    )
    model.fit(x, y, validation_split=0.2, batch_size=32, epochs=5, callbacks=[monitor], verbose=0)


def test_tensorboard_opens_on_the_charts_of_the_monitor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits_run("runs/digits")
    layers = ["conv_1", "norm_1", "conv_2", "hidden", "logits"]
    charts = {
        "learning rate": ["train/learning_rate"],
        "norm of gradient and weights": ["train/gradient_norm", "train/weight_norm"],
        "gradient noise scale": ["train/noise_scale"],
        "update-to-weight ratio by layer": [f"update_ratio/{name}" for name in layers],
    }
    run = {"optimizer": "AdamW", "learning_rate": "Warmup", "batch_size": 32, "epochs": 5, "global_clipnorm": 2}
    with tensorboard("runs") as url, browser_page() as page:
        assert_charts(page, url, ["train/clip_rate", "update_ratio/conv_1", "activation_dead/hidden"])
        assert_hparams(page, url, [run])
        page.set_viewport_size({"width": 1800, "height": 1130})  # without scrolling
        assert_layout(page, url, charts)
        picture(page, "monitor")  # that of docs/guide/monitoring.md, there with 64 colours
