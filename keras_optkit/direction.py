"""Whether a metric is to be small or large, as far as its name says."""

from __future__ import annotations

import re

_WORDS = {
    "min": "loss error crossentropy divergence hinge poisson logcosh perplexity mse rmse mae mape msle "
    "false_positives false_negatives",
    "max": "accuracy acc auc precision recall sensitivity specificity f1 fbeta_score r2 iou io_u true_positives "
    "true_negatives",
}


def by_name(metric: str) -> str | None:
    """Returns "min" or "max", by the words in the name of a metric; None if they do not say, or say both.

    KerasTuner's own rule would minimise F1 and R2.
    """
    name = "_".join(["", *re.split(r"[^a-z0-9]+", metric.lower()), ""])
    found = [way for way, words in _WORDS.items() if any(f"_{word}_" in name for word in words.split())]
    return found[0] if len(found) == 1 else None
