"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], *, left: Sequence[int] = (), rule: bool = False) -> list[str]:
    """The lines of a table, whose columns are as wide as they have to be.

    Args:
        lines: The cells of each line, the head first.
        left: The columns that begin at the left; numbers end at the right.
        rule: Whether there is a line of dashes below the head.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [padded[0], "-" * sum(widths, 2 * (len(widths) - 1)), *padded[1:]] if rule else padded
