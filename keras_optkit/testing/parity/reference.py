"""Which independent implementation an optimizer is compared with, and how its arguments are translated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: How the reference is given the parameters; see `keras_optkit.testing.parity.problem`.
VIEWS = ("keras", "matrices", "units", "flat vectors")
#: The largest error allowed, relative to the largest element of a parameter.
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


@dataclass(frozen=True)
class Reference:
    """One comparison of an optimizer with another implementation.

    It is run for each case of the card, without and with weight decay, in float32 and float64.

    Attributes:
        optimizer: Name of the optimizer.
        implementation: "module:Class" of torch, of a package that builds on it, or of optax.
        arguments: The reference's arguments: each is the name of one of ours, a tuple of names, or a function of all of
            ours, a dict. Without "weight_decay" among them, the optimizer is compared without decay only.
        theirs: Arguments that the reference needs in addition.
        ours: Arguments that our optimizer needs in addition to those of the case; `decay_mask="all"` is one already.
        cases: Arguments of ours; None for those of the card.
        view: How the reference is given the parameters: as in Keras; "matrices" with outputs in the rows, as torch has
            them, and vectors in one axis; "units", the same but for tables, whose rows stay rows; or "flat vectors",
            where only vectors differ from Keras.
        only: The parameters that are compared: None for all, or the name of a rule, as `explain` shows it, for those
            that it updates.
        run: Name of the function that runs the reference, of `keras_optkit.testing.parity.runs`, of `differentiated`
            (with `needs`), or of `here`; None for the usual one.
        evaluated: Where the reference has weights to evaluate at, their name in its state; they are compared, too.
        inject: What our state is set to after the first step: a function of the variables and of what `run` returns
            with the weights, to a dict of arrays by the names in files.
        needs: What steps take besides the gradient: "second_gradient" or "hessian_vector". Both sides are then given a
            function, and for the latter also our random vectors.
        tolerance: The largest error for each dtype that is compared.
        deviations: Where the reference departs from the paper, is patched, or is not compared, and why.
    """

    optimizer: str
    implementation: str
    arguments: Mapping[str, Any]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] | None = None
    view: str = "keras"
    only: str | None = None
    run: str | None = None
    evaluated: str | None = None
    inject: Callable[[list[Any], Any], dict[str, Any]] | None = None
    needs: str | None = None
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)
    deviations: str = ""

    @property
    def decays(self) -> tuple[float, ...]:
        """The weight decays that are compared."""
        return (0.0, 0.1) if "weight_decay" in self.arguments else (0.0,)

    def translated(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's arguments for the config of our optimizer."""
        found = dict(self.theirs)
        for name, ours in self.arguments.items():
            if callable(ours):
                found[name] = ours(config)
            elif isinstance(ours, tuple):
                found[name] = tuple(config[each] for each in ours)
            else:
                found[name] = config[ours]
        return found
