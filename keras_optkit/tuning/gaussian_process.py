"""Proposals of Optuna's Gaussian process, computed by a process of its own.

It needs torch, whose CUDA build, imported after TensorFlow, is a segmentation fault. So this file is run by itself, in
a process that imports neither TensorFlow nor this package: it reads a line of JSON for each question, and writes one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def propose(question: dict[str, Any]) -> dict[str, Any]:
    """The parameters that the sampler proposes, given all trials so far."""
    import optuna
    from optuna.distributions import json_to_distribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(seed=question["seed"], n_startup_trials=0, warn_independent_sampling=False)
    study = optuna.create_study(directions=question["directions"], sampler=sampler)
    distributions = {name: json_to_distribution(text) for name, text in question["distributions"].items()}
    for trial in question["trials"]:
        state = optuna.trial.TrialState.RUNNING if trial["values"] is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state, values=trial["values"], params=trial["params"], distributions=distributions
            )
        )
    return dict(study.ask(distributions).params)


def main() -> None:
    """Answers until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"params": propose(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
