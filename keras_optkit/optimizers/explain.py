"""How each variable of a model is trained, as a table."""

from __future__ import annotations

from typing import NamedTuple

from keras_optkit.tables import table


class Explained(NamedTuple):
    """How one variable is trained; a row of `Explanation`.

    `estimate` is that of a rule that finds its learning rate, a factor on `learning_rate`; None for other rules.
    """

    path: str
    shape: tuple[int, ...]
    group: str
    rule: str
    learning_rate: float
    weight_decay: float
    state_bytes: int
    estimate: float | None = None

    @property
    def effective_rate(self) -> float:
        """The learning rate, times the estimate if there is one."""
        return self.learning_rate * (1.0 if self.estimate is None else self.estimate)


class Explanation(NamedTuple):
    """How every variable is trained. Printing it shows a table, with the estimates of the rates if there are any.

    Attributes:
        rows: One `Explained` for each variable, in the order in which the optimizer has them.
    """

    rows: tuple[Explained, ...]

    def __str__(self) -> str:
        found = any(row.estimate is not None for row in self.rows)
        head = ("variable", "shape", "group", "rule", "rate", *["estimate", "rate x estimate"] * found)
        total = f"{sum(row.state_bytes for row in self.rows):,}"
        cells = [
            (
                *(r.path, str(r.shape), r.group, r.rule, f"{r.learning_rate:g}"),
                *["" if r.estimate is None else f"{r.estimate:g}", f"{r.effective_rate:g}"] * found,
                *(f"{r.weight_decay:g}", f"{r.state_bytes:,}"),
            )
            for r in self.rows
        ]
        head = (*head, "decay", "state, bytes")
        last = (f"{len(self.rows)} variables", *[""] * (len(head) - 2), total)
        return "\n".join(table([head, *cells, last], left=range(4)))
