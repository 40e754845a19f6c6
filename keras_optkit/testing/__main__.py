"""Runs the whole conformance suite, every check on every card: `python -m keras_optkit.testing [NAME...]`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from keras_optkit.registry import KINDS, cards
from keras_optkit.testing.conformance import checks_for
from keras_optkit.testing.problems import prepare


def main() -> int:
    """Prints a line for each check, and returns 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m keras_optkit.testing", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of algorithms; all when left out")
    parser.add_argument("--kind", choices=KINDS, help="only those of one kind")
    parser.add_argument("--check", action="append", metavar="CHECK", help="only this check; may be given several times")
    chosen = parser.parse_args()
    found = [card for card in cards(chosen.kind) if not chosen.names or card.name in chosen.names]
    unknown = set(chosen.names) - {card.name for card in found}
    if unknown:
        parser.error(f"unknown names {sorted(unknown)}; allowed: {', '.join(card.name for card in cards(chosen.kind))}")
    prepare()
    pairs = [(card, c) for card in found for c in checks_for(card) if not chosen.check or c.name in chosen.check]
    if not pairs:
        parser.error(f"no check {chosen.check} applies")
    failed = 0
    for i, (card, check) in enumerate(pairs, 1):
        begun = time.perf_counter()
        try:
            check(card)
        except Exception:  # a check may fail in any way
            failed += 1
            said = "FAILED"
            traceback.print_exc()
        else:
            said = "passed"
        took = time.perf_counter() - begun
        print(f"{i}/{len(pairs)} {card.kind} {card.name} {check.name}: {said} ({took:.1f} s)", flush=True)
    print(f"{len(pairs) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
