"""How each variable of a model is trained, as a table."""

from __future__ import annotations

from typing import NamedTuple


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
        table = [head, *cells, (f"{len(self.rows)} variables", "", "", "", "", "", total)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            left = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
            lines.append("  ".join([*left, *right]).rstrip())
        return "\n".join(lines)
