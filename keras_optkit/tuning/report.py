"""`Result.report`: one page of HTML that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from keras_optkit.callbacks.identity import versions
from keras_optkit.tuning import export, plots
from keras_optkit.tuning.result import Result, cells_of

_DPI = 100

# What the page may load: its own pictures, style and script, and nothing else, whatever is in a name or a message.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 0.88rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top; }
th { background: #f4f4f4; white-space: nowrap; }
.text, dt, dd { text-align: left; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .best td { font-weight: 600; background: #fff3e2; } .failed td { color: #a11; }
.trials th { cursor: pointer; } .trials th::after { content: " \\2195"; color: #999; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; } dt { color: #666; } dd { margin: 0; }
pre, code { font: 13px/1.4 ui-monospace, monospace; background: #f4f4f4; }
pre { padding: 0.7rem; overflow-x: auto; }
img { max-width: 100%; height: auto; }
"""

_SORT = """
for (const head of document.querySelectorAll(".trials th")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex;
  const up = head.dataset.up !== "1";
  for (const other of head.parentNode.children) delete other.dataset.up;
  head.dataset.up = up ? "1" : "0";
  const key = row => row.cells[place].textContent;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;  // what is missing comes last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
});
"""


def report(result: Result, path: Any, title: Any) -> None:
    """See `Result.report`."""
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {title!r} of type {type(title).__name__}.")
    export.file_of(path)  # raises before the figures are drawn
    export.write(path, page(result, title))


def page(result: Result, title: str) -> str:
    """The page."""
    sections: dict[str, Callable[[Result], str]] = {
        "Summary": _summary,
        "Best hyperparameters": _best,
        "Best model": _model,
        "Trials": _trials,
        "Failures": _failures,
        "History": lambda result: _picture(plots.history(result), "Score by trial"),
        "Importance": _importance,
        "Hyperparameters": lambda result: _picture(plots.slices(result), "Score by hyperparameter"),
        "Parallel coordinates": lambda result: _picture(plots.parallel(result), "Trials as lines"),
        "Pareto front": _pareto,
        "Learning curves": _learning_curves,
    }
    made = {name: make(result) for name, make in sections.items()}
    content = "\n".join(f"<h2>{name}</h2>\n{text}" for name, text in made.items() if text)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{content}
<script>{_SORT}</script>
</body>
</html>
"""


def _definitions(entries: Mapping[str, Any]) -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in entries.items())
    return f"<dl>{''.join(lines)}</dl>"


def _table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], kind: str = "") -> str:
    """A table; each row with the class that says how it looks."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = (f'<tr class="{look}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>' for look, cells in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{names}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def _picture(figure: Any, text: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    source = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{source}"></p>'


def _summary(result: Result) -> str:
    best, trials = result.best_trial, result.trials
    failed = sum(trial.status == "failed" for trial in trials)
    pruned = sum(trial.status == "pruned" for trial in trials)
    objectives = ", ".join(f"{name} ({direction})" for name, direction in result.objectives.items())
    scores = ", ".join(f"{name} = {best.metrics.get(name, result.best_score):.6g}" for name in result.objectives)
    again = (
        "The directory was a temporary one. With directory= of your own a search can be continued."
        if result.temporary
        else f"Run the same script again with directory={str(result.directory)!r} and a larger max_trials=."
    )
    facts = {
        "best": f"{scores} in epoch {best.best_epoch} of trial {best.number}",
        "objective": objectives,
        "trials": f"{len(trials)}, of which {failed} failed" + (f" and {pruned} were pruned" if pruned else ""),
        "epochs": f"{sum(trial.epochs for trial in trials)} in {sum(trial.seconds for trial in trials):.1f} s",
        "seed": result.seed,
        "directory": result.directory,
        "to continue": again,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return _definitions(facts)


def _best(result: Result) -> str:
    return _definitions({name: repr(value) for name, value in result.best.items()})


def _model(result: Result) -> str:
    path = str(result.model_path)
    if not result.model_path.exists():
        return f"<p>There is no file <code>{escape(path)}</code> any more.</p>"
    if result.model_path.suffix == ".keras":
        code = f"import keras\n\nmodel = keras.saving.load_model({path!r})"
        note = f"It is in <code>{escape(path)}</code> and loads without the build function:"
    else:
        code = f"model = build(...)  # with the best hyperparameters\nmodel.load_weights({path!r})"
        note = f"Its weights are in <code>{escape(path)}</code>, since Keras cannot write or read it as a whole:"
    if result.temporary:
        note = f"The file is deleted with the result; keep a copy with <code>result.best_model.save</code>. {note}"
    return f"<p>{note}</p>\n<pre>{escape(code)}</pre>"


def _trials(result: Result) -> str:
    head, lines = cells_of(result)
    looks = ["best", *("failed" if line[1] == "failed" else "" for line in lines[1:])]
    return _table(head, zip(looks, lines, strict=True), "trials")


def _failures(result: Result) -> str:
    failed = [trial for trial in result.trials if trial.status == "failed"]
    items = (f"<li>Trial {trial.number}: {escape(trial.reason)}</li>" for trial in failed)
    return f'<ul class="text">{"".join(items)}</ul>' if failed else ""


def _importance(result: Result) -> str:
    try:
        return _picture(plots.importances(result), "Importance of the hyperparameters")
    except (ImportError, ValueError) as error:  # without Optuna, or of too few trials
        return f"<p>{escape(str(error))}</p>"


def _pareto(result: Result) -> str:
    if len(result.objectives) < 2:
        return ""
    head = ["trial", *result.objectives]
    rows = [("", [str(t.number), *(f"{t.metrics[name]:.6g}" for name in result.objectives)]) for t in result.pareto]
    return _picture(plots.pareto_front(result), "Trials by their objectives") + _table(head, rows)


def _learning_curves(result: Result) -> str:
    try:
        return _picture(plots.learning_curves(result), "Metrics by epoch")
    except ValueError as error:  # of a version that kept none
        return f"<p>{escape(str(error))}</p>"
