"""The tags of `TrainingMonitor`, and in which charts they are shown."""

from __future__ import annotations

#: The groups of tags in the order of the charts: category, title of the chart, patterns of the tags in it.
CHARTS = (
    ("training", "loss", ("train/loss(/.*)?", "train/penalty(/.*)?", "epoch/(val_)?loss")),
    ("training", "learning rate", ("train/learning_rate(/.*)?",)),
    ("training", "estimated learning rate", ("train/estimate(/.*)?", "train/effective_rate(/.*)?")),
    ("training", "norm of gradient and weights", ("train/gradient_norm", "train/weight_norm")),
    ("training", "update-to-weight ratio", ("train/update_ratio",)),
    ("training", "clip rate", ("train/clip_rate(/.*)?",)),
    ("training", "non-finite numbers and skipped updates", ("train/nonfinite", "train/skipped", "nonfinite/.*")),
    ("training", "loss scale", ("train/loss_scale(/.*)?",)),
    ("training", "gradient noise scale", ("train/noise_scale",)),
    ("layers", "update-to-weight ratio by layer", ("update_ratio/.*",)),
    ("layers", "norm of the gradient by layer", ("gradient_norm/.*",)),
    ("layers", "norm of the weights by layer", ("weight_norm/.*",)),
    ("activations", "mean", ("activation_mean/.*",)),
    ("activations", "standard deviation", ("activation_std/.*",)),
    ("activations", "share of zeros", ("activation_zeros/.*",)),
    ("activations", "share of dead units", ("activation_dead/.*",)),
    ("activations", "share of saturated outputs", ("activation_saturated/.*",)),
    ("resources", "examples a second", ("throughput/examples",)),
    ("resources", "updates a second", ("throughput/updates",)),
    ("resources", "memory, MiB", ("memory/.*",)),
)

#: The tags whose curves lie orders of magnitude apart, so that their logarithms are charted.
LOGARITHMIC = ("update_ratio/", "gradient_norm/", "weight_norm/")

#: How the tags begin of values of an epoch.
EPOCH = "epoch/"

#: What is before the first "/" of the tags.
PREFIXES = frozenset(pattern.split("/")[0] for *_, patterns in CHARTS for pattern in patterns) | {
    "hyperparameters",
    "epoch",
}
