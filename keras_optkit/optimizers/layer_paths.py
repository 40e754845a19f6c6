"""The layers of a model as a tree, with the paths that patterns are looked for in, and their depths.

A path holds the names of the layers that contain a layer and its own, "backbone/block5/conv", without the name of the
model; that of a variable adds the variable's name. Keras's own paths of variables lack the names of nested models, so
two models made by one function look alike in them, and change when a model is reloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from keras_optkit import backend
from keras_optkit.kernels import KERNEL, role
from keras_optkit.private import sublayers

#: A model with more layers than this is not opened further, and more plain layers in a row are taken together,
DEEP = 24
#: in so many blocks.
BLOCKS = 12

#: A layer that is shared may have so many paths.
_MOST_PATHS = 16


class Node:
    """A layer in a model.

    Attributes:
        layer: The layer itself; None where only the paths of variables are known.
        path: Its path, which no other layer has.
        paths: `path` and, for a layer that is in several places, its paths there.
        inside: The layers directly inside it.
        first: Those of `inside` that are nowhere else before, so that they make a tree.
        own: Its own variables by name, without those of layers inside it; their keys (`backend.key`).
    """

    def __init__(self, layer: Any, path: str):
        self.layer = layer
        self.path = path
        self.paths = [path]
        self.inside: list[Node] = []
        self.first: list[Node] = []
        self.own: dict[str, int] = {}

    def below(self) -> Iterator[Node]:
        """All layers inside it, at any depth, each once, outer ones first."""
        for node in self.first:
            yield node
            yield from node.below()

    def all_inside(self) -> dict[int, Node]:
        """All layers inside it, by the id of the node, also those that are elsewhere in the tree."""
        found: dict[int, Node] = {}
        waiting = list(self.inside)
        while waiting:
            node = waiting.pop()
            if id(node) not in found:
                found[id(node)] = node
                waiting += node.inside
        return found

    @property
    def size(self) -> int:
        """The number of layers with weights of their own that it consists of."""
        return bool(self.own) + sum(node.size for node in self.first)


class LayerTree:
    """The layers of a model, found as objects, and their variables.

    Attributes:
        root: The model.
        nodes: All layers in it, outer ones first, in the order in which the model has them.
    """

    def __init__(self, root: Node):
        self.root = root
        self.nodes = list(root.below())
        self._places: dict[int, list[tuple[Node, str]]] = {}
        for node in [root, *self.nodes]:
            for name, key in node.own.items():
                self._places.setdefault(key, []).append((node, name))

    @classmethod
    def of(cls, model: Any) -> LayerTree:
        """The tree of a model or a layer."""
        nodes: dict[int, Node] = {}
        root = nodes[id(model)] = Node(model, "")
        _visit(root, nodes)
        for node in nodes.values():
            theirs = {backend.key(v) for inner in node.inside for v in inner.layer.weights}
            own = [v for v in node.layer.weights if backend.key(v) not in theirs]
            node.own = dict(zip(_unique(v.name for v in own), map(backend.key, own), strict=True))
        return cls(root)

    @classmethod
    def of_paths(cls, paths: Sequence[str]) -> LayerTree:
        """What Keras's paths of variables tell of the tree; the key of a variable is its place in the list."""
        nodes = {"": Node(None, "")}
        for key, path in enumerate(paths):
            *layers, name = path.split("/")
            node = nodes[""]
            for i in range(len(layers)):
                inner = "/".join(layers[: i + 1])
                if inner not in nodes:
                    nodes[inner] = Node(None, inner)
                    node.inside.append(nodes[inner])
                    node.first.append(nodes[inner])
                node = nodes[inner]
            node.own[name if name not in node.own else f"{name}_{key}"] = key
        return cls(nodes[""])

    def layer_of(self, variable: Any) -> Node | None:
        """The layer that a variable belongs to; None for one that is not in the model."""
        places = self._places.get(backend.key(variable))
        return places[0][0] if places else None

    def paths_of(self, variable: Any) -> list[str]:
        """The paths of a variable, the one to show first; none for a variable that is not in the model."""
        places = self._places.get(backend.key(variable), [])
        return [f"{path}/{name}".lstrip("/") for node, name in places for path in node.paths]

    def all_paths(self) -> list[str]:
        """The paths of all variables."""
        places = [place for places in self._places.values() for place in places]
        return [f"{path}/{name}".lstrip("/") for node, name in places for path in node.paths]

    def last_kernel(self, keys: set[int]) -> set[int]:
        """The keys of the kernels of the last layer that has one of its own, frozen or not.

        Of a custom model that holds several, such as a GAN, it is that of the one that all of `keys` are in.
        """
        root = self.root
        while not hasattr(root.layer, "outputs"):  # what Sequential and functional models have
            inside = [n for n in root.first if isinstance(n.layer, keras.Model) and keys <= _keys_in(n)]
            if not inside:
                break
            root = inside[0]
        for node in reversed([root, *root.below()]):
            own = set(node.own.values())
            kernels = [v for v in node.layer.weights if backend.key(v) in own and role(v, node.layer)[0] == KERNEL]
            if kernels:
                return set(map(backend.key, kernels))
        return set()

    def matching(self, pattern: str) -> list[Node]:
        """The layers in one of whose paths a pattern is found, with and without a slash at its end."""
        return [n for n in self.nodes if any(re.search(pattern, p) or re.search(pattern, f"{p}/") for p in n.paths)]

    # -- depth --------------------------------------------------------------------------------------------------------

    def depths(self, blocks: int | str | None = None) -> dict[int, int]:
        """The depth of the block that each variable is in, by its key, counted from 0.

        Args:
            blocks: How layers make blocks; see `Optimizer`'s `layer_blocks`.
        """
        order = [self.root, *self.nodes]
        of_node = self._by_pattern(blocks) if isinstance(blocks, str) else self._by_structure(blocks)
        depth: dict[int, int] = {}
        for node in reversed(order):  # weights of a layer that was opened are counted with the first one inside it
            if id(node) not in of_node:
                inner = [of_node[id(n)] for n in node.first if n.size]
                of_node[id(node)] = min(inner, default=0)
            depth |= dict.fromkeys(node.own.values(), of_node[id(node)])
        return depth

    def _by_structure(self, limit: int | None) -> dict[int, int]:
        of_node: dict[int, int] = {}
        count = 0
        for run in self._runs():
            plain = sum(node.size == 1 for node in run)
            most = limit if limit is not None else BLOCKS if plain > DEEP else len(run)
            groups = min(most, len(run))
            for place, node in enumerate(run):
                depth = count + place * groups // len(run)
                of_node |= dict.fromkeys([id(node), *map(id, node.below())], depth)
            count += groups
        return of_node

    def _runs(self) -> list[list[Node]]:
        """The layers that are counted, those that are next to each other in one list.

        They are the layers of the model. One that holds more than half of them all, or more than `DEEP`, is opened,
        since the model would have hardly any depth otherwise; models in it are as long as there are few layers.
        """
        large = min(DEEP, self.root.size // 2)
        opened = {id(node) for node in self.nodes if node.size > large and _can_be_opened(node)}
        opened.add(id(self.root))
        while True:
            runs = _in_runs(self.root, opened)
            models = {id(n) for run in runs for n in run if isinstance(n.layer, keras.Model) and n.first}
            more = _in_runs(self.root, opened | models)
            if not models or sum(map(len, more)) > DEEP:
                return runs
            opened |= models

    def _by_pattern(self, pattern: str) -> dict[int, int]:
        """Layers make a block for which the pattern's groups, or all that it matches, are equal.

        So do neighbours without a match that are inside the same layer.
        """
        around = {id(inner): id(node) for node in [self.root, *self.nodes] for inner in node.first}
        of_node: dict[int, int] = {}
        order: dict[Any, int] = {}
        unmatched: tuple[int, int] | None = None  # the block of the node before, if that has no match
        for node in self.nodes:
            if not node.own:
                continue
            found = re.search(pattern, f"{node.path}/")
            if found is not None:
                unmatched = None
            elif unmatched is None or unmatched[0] != around[id(node)]:
                unmatched = around[id(node)], len(order)
            block = unmatched if found is None else found.groups() or found.group()
            of_node[id(node)] = order.setdefault(block, len(order))
        return of_node


def _keys_in(node: Node) -> set[int]:
    return {key for n in (node, *node.below()) for key in n.own.values()}


def _visit(node: Node, nodes: dict[int, Node]) -> None:
    layers = [layer for layer in sublayers(node.layer, direct=True) if not isinstance(layer, keras.layers.InputLayer)]
    layers = list({id(layer): layer for layer in layers}.values())
    for layer, name in zip(layers, _unique(layer.name for layer in layers), strict=True):
        paths = [f"{path}/{name}".lstrip("/") for path in node.paths]
        if id(layer) not in nodes:
            nodes[id(layer)] = Node(layer, paths[0])
            node.first.append(nodes[id(layer)])
        for path in paths:  # more than one where this layer or one around it is shared
            _add_path(nodes[id(layer)], path)
        node.inside.append(nodes[id(layer)])
    for inner in node.first:  # after all of them have got the shorter paths
        _visit(inner, nodes)


def _add_path(node: Node, path: str) -> None:
    if path in node.paths or len(node.paths) >= _MOST_PATHS:
        return
    node.paths.append(path)
    for inner in node.inside:
        _add_path(inner, f"{path}/{inner.path.rsplit('/', 1)[-1]}")


def _unique(names: Iterable[str]) -> list[str]:
    """The names, with a number after those that occur for the second time."""
    names = list(names)
    found: list[str] = []
    for name in names:
        other, number = name, 0
        while other in found or (number and other in names):
            number += 1
            other = f"{name}_{number}"
        found.append(other)
    return found


def _can_be_opened(node: Node) -> bool:
    """Whether a layer is more than one of Keras's own with parts, such as attention or Bidirectional."""
    layer = node.layer
    kerases = type(layer).__module__.partition(".")[0] == "keras" and not isinstance(layer, keras.Model)
    return bool(node.first) and not (kerases and len(node.first) > 1)


def _in_runs(node: Node, opened: set[int]) -> list[list[Node]]:
    runs: list[list[Node]] = [[]]
    for inner in node.first:
        if id(inner) in opened and inner.first:
            runs += [*_in_runs(inner, opened), []]
        elif inner.size:
            runs[-1].append(inner)
    return [run for run in runs if run]
