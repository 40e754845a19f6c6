"""The reference of APOLLO."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_optkit.testing.parity.compare import STEPS
from keras_optkit.testing.parity.reference import Reference
from keras_optkit.testing.twins.low_rank import projection


def projections(config: Mapping[str, Any]) -> dict[tuple[int, int], np.ndarray]:
    """All projections of a run, by the length of the side that is projected and by how many were drawn before."""
    times = range(STEPS // config["projection_frequency"] + 1)
    return {(n, i): projection(config["seed"], i, config["rank"], n) for n in range(2, 9) for i in times}


REFERENCES = (
    Reference(
        "APOLLO",
        "apollo_torch.apollo:AdamW",
        {
            "lr": "learning_rate",
            "betas": ("beta_1", "beta_2"),
            "eps": "epsilon",
            "weight_decay": "weight_decay",
            "rank": "rank",
            "scale": "scale",
            "scale_type": "scale_type",
            "update_proj_gap": "projection_frequency",
            "projections": projections,
        },
        {"table": 8},
        cases=(
            {"learning_rate": 0.01, "rank": 2},
            {
                "learning_rate": 0.01,
                "beta_1": 0.8,
                "beta_2": 0.9,
                "epsilon": 1e-4,
                "rank": 1,
                "scale": 128.0,
                "scale_type": "tensor",
                "projection_frequency": 7,
                "seed": 3,
            },
        ),
        view="matrices",
        run="apollo",
        deviations="with the same random projections, and with the decay before the step, as in AdamW",
    ),
)
