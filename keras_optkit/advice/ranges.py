"""Adjacent layers with the same finding, told as one range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keras_optkit.advice.measured import Finding

#: Rules of single layers, whose findings are merged, and words by which those of one rule differ.
_OF_LAYERS = ("kernel_scale", "dead_units", "saturation")
_KINDS = ("larger", "smaller")


def runs(paths: Sequence[str], order: Sequence[str]) -> list[list[str]]:
    """Paths in the given order, those that are next to each other in one list."""
    place = {path: number for number, path in enumerate(order)}
    found: list[list[str]] = []
    for path in sorted(paths, key=lambda each: place.get(each, len(order))):
        if found and path in place and place.get(found[-1][-1]) == place[path] - 1:
            found[-1].append(path)
        else:
            found.append([path])
    return found


def named(paths: Sequence[str]) -> str:
    """A list of adjacent layers as text: "conv0", or "conv0 to conv5"."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"


def merged(findings: Sequence[Finding], order: Sequence[str]) -> list[Finding]:
    """The findings, with one for adjacent layers that a rule finds the same in.

    Args:
        findings: What rules have found.
        order: The layers that may be adjacent, in the order of the model.
    """
    alike: dict[tuple[object, ...], dict[str, Finding]] = {}
    for each in findings:
        if each.rule in _OF_LAYERS:
            kinds = tuple(word in each.reason for word in _KINDS)
            alike.setdefault((each.rule, each.fix, each.is_hint, kinds), {}).setdefault(each.where, each)
    result = [each for each in findings if each.rule not in _OF_LAYERS]
    for found in alike.values():
        for paths in runs(list(found), order):
            others = len(paths) - 1
            more = "" if not others else f" The same is true of the {others} layer{'s' * (others > 1)} after it."
            result.append(replace(found[paths[0]], where=named(paths), reason=found[paths[0]].reason + more))
    return sorted(result, key=lambda each: each.severity)
