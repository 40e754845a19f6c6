"""How each variable of a model is trained, as a table."""

from __future__ import annotations

from typing import NamedTuple

from keras_optkit.tables import table


class Explained(NamedTuple):
    """How one variable is trained; a row of `Explanation`."""

    path: str
    shape: tuple[int, ...]
    group: str
    rule: str
    learning_rate: float
    weight_decay: float
    state_bytes: int


class Explanation(NamedTuple):
    """How every variable is trained. Printing it shows a table.

    Attributes:
        rows: One `Explained` for each variable, in the order in which the optimizer has them.
    """

    rows: tuple[Explained, ...]

    def __str__(self) -> str:
        head = ("variable", "shape", "group", "rule", "rate", "decay", "state, bytes")
        total = f"{sum(row.state_bytes for row in self.rows):,}"
        cells = [
            (r.path, str(r.shape), r.group, r.rule, f"{r.learning_rate:g}", f"{r.weight_decay:g}", f"{r.state_bytes:,}")
            for r in self.rows
        ]
        last = (f"{len(self.rows)} variables", "", "", "", "", "", total)
        return "\n".join(table([head, *cells, last], left=range(4)))
