"""Checks for optimizers.

The twin of an optimizer's card is a generator; see `keras_optkit.testing.twins.optimizers` for its form.
"""

from keras_optkit.testing.checks.optimizers import (
    averages,
    config,
    execution,
    formula,
    gradients,
    groups,
    narrow,
    state,
)

__all__ = ["averages", "config", "execution", "formula", "gradients", "groups", "narrow", "state"]
