"""What a file holds of an optimizer: each parameter's state, and a description by which a wrong file is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit.backend import key, on_host
from keras_optkit.optimizers.engine.codecs import CODECS, Codec
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import with_routes
from keras_optkit.optimizers.engine.rounding import stored_as
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.rule import slots_of
from keras_optkit.optimizers.slots import Fill, FromWeights

_FORMAT = 2

#: State for each parameter besides the rule's slots, packed as they are.
PER_PARAMETER = ("accumulated", "average")

#: The same for some parameters.
PER_SOME = ("master", "product")

_opening: ContextVar[bool] = ContextVar("opening", default=False)


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """While Keras compiles a model as a file says, whose optimizer may have been built for other weights."""
    token = _opening.set(True)
    try:
        yield
    finally:
        _opening.reset(token)


def is_opening() -> bool:
    """Whether a model is being opened."""
    return _opening.get()


class SavedState(keras.optimizers.Optimizer):
    """The part of `Optimizer` that writes its state to a file and reads it from one.

    Files are independent of the packing, of the number of replicas and of the paths of the variables; entries are
    numbered by the model's order. `.keras` and `.weights.h5` files call the two public methods through Keras,
    `tf.train.Checkpoint` through `backend.in_checkpoints`, and state trees through `state_tree.py`. State for other
    variables is refused, even if they have the same shapes in the same model. A model file always opens, though:
    weights may have been frozen or unfrozen between the last step and saving. Only the place of the last non-finite
    gradient depends on the packing, so after loading with another packing `nonfinite` may name another variable.
    """

    def _schema(self) -> dict[str, Any]:
        """What a file says about the state in it, so that a wrong file is refused."""
        state = self._held.state
        copies = [name for name in (*PER_PARAMETER, *PER_SOME) if state.has(name)]
        return {
            "format": _FORMAT,
            "optimizer": keras.saving.get_registered_name(type(self)),
            "learning_rate": "constant" if self._schedule is None else "schedule",
            "state": sorted([*self._common_slots(), *self.rule.scalars(), *copies]) if self._held.variables else None,
            "variables": [[_kind(v), list(v.shape)] for v in self._in_model_order()],
            "names": [_name(v) for v in self._in_model_order()],
            "trainable": [bool(getattr(v, "trainable", True)) for v in self._in_model_order()],
            "rules": self._own_rules(),
            "since": self._since(),
            "in_model": self._in_model(),
        }

    def _in_model(self) -> dict[str, Any] | None:
        """The variables' positions among the model's weights, which distinguish layers of one shape; None if unknown.

        Paths would not: Keras numbers the names of layers consecutively in a process.
        """
        model = self._held.model and self._held.model()
        if model is None:
            return None
        weights = {key(v): place for place, v in enumerate(model.weights)}
        places = [weights.get(key(v)) for v in self._in_model_order()]
        return None if None in places else {"weights": len(weights), "places": places}

    def _common_slots(self) -> set[str]:
        """The state that the optimizer's own rule has for all parameters that it is for."""
        own = [set(slots_of(self.rule, b.weight)) for b in self._held.buckets if b.rule == (0, "")]
        return set.intersection(*own) if own else set()

    def _own_rules(self) -> dict[str, str]:
        """By the places of variables, how they are updated: by another rule, or with state that others do not have."""
        rules, common = with_routes(self._rules), self._common_slots()
        found: dict[str, str] = {}
        for bucket in self._held.buckets:
            rule = rules[bucket.rule].rule
            slots = slots_of(rule, bucket.weight)
            shaped = any(isinstance(slot, Fill) and slot.shape is not None for slot in slots.values())
            if bucket.rule == (0, "") and set(slots) == common and not shaped:
                continue
            names = ", ".join(_with_shape(name, slot) for name, slot in slots.items())
            axes = bucket.weight.axes if shaped else None
            seen = f", from axes {axes.inputs} to {axes.outputs}" if axes else ""
            text = f"{type(rule).__name__} with {names or 'no state'}{seen}"
            found |= {str(self._held.places[i]): text for i in bucket.indices}
        return found

    def _entries(self) -> dict[str, tuple[Any, Bucket | None]]:
        """The variables to save by name; one that holds a bucket's state with that bucket, to be split by."""
        state = self._held.state
        if not state.has("iterations"):
            state = State(iterations=self._updates, multiplier=self._multiplier)
        entries: dict[str, tuple[Any, Bucket | None]] = {}
        for name, part in state._asdict().items():
            if isinstance(part, dict):
                entries |= {f"{name}.{key}": (v, None) for key, v in part.items()}
            elif not isinstance(part, list | tuple):
                entries[name] = (part, None)
        for b, bucket in enumerate(self._held.buckets):
            packed = {f"slot.{name}": v for name, v in state.slots[b].items()}
            packed |= {name: getattr(state, name)[b] for name in PER_PARAMETER if state.has(name)}
            for name in PER_SOME:
                packed |= getattr(state, name)[b] if state.has(name) else {}
            entries |= {f"{name}.{bucket.indices[0]}": (v, bucket) for name, v in packed.items()}
        return entries

    def _counts(self) -> list[tuple[Any, list[str]]]:
        """Variables with a whole number for each parameter of a bucket, and the names of these numbers.

        They are which gradients the micro-batches since the last update had, and how many updates there were.
        """
        state, held = self._held.state, self._held
        found = []
        for b, bucket in enumerate(held.buckets):
            counts = {"given": state.given[b]} if state.has("given") else {}
            counts |= state.updates[b] if state.has("updates") else {}
            found += [(v, [f"{name}.{held.places[i]}" for i in bucket.indices]) for name, v in counts.items()]
        return found

    def packed(self) -> dict[str, Any]:
        """The description, and by which variables, named by their paths, the state is held as it is packed now.

        `unpacked` makes the entries of a file of their values.
        """
        places = self._held.places
        return {
            "schema": self._schema(),
            "entries": {
                name: [
                    [part.path for part in tree.flatten(variable)],
                    bucket and {"form": bucket.form, "places": [places[i] for i in bucket.indices]},
                    type(variable).__name__ if isinstance(variable, Codec) else "",
                ]
                for name, (variable, bucket) in self._entries().items()
            },
            "given": [[flags.path, names] for flags, names in self._counts()],
        }

    def save_own_variables(self, store: Any) -> None:
        """Writes the state, parameter by parameter: a file does not depend on how parameters were packed."""
        if isinstance(self._held.pending, dict):  # loaded, never used
            for name, value in self._held.pending.items():
                store[name] = value
            return
        if self._held.pending is not None:
            warnings.warn(
                f"The state that {self.name} was given by an `.h5` file is not saved: it is known what it is for once "
                "the model has been trained.",
                stacklevel=2,
            )
        store["schema"] = np.frombuffer(json.dumps(self._schema()).encode(), np.uint8)
        for name, (variable, bucket) in self._entries().items():
            if bucket is None:
                store[name] = on_host(variable)
            else:
                slot = name.rsplit(".", 1)[0]
                for i, part in zip(bucket.indices, bucket.separate(_wide(variable, bucket)), strict=True):
                    store[f"{slot}.{self._held.places[i]}"] = part
        for flags, names in self._counts():
            for name, flag in zip(names, on_host(flags), strict=True):
                store[name] = flag

    def load_own_variables(self, store: Any) -> None:
        """Restores the state; refuses that of another optimizer or another model.

        State that is loaded before the optimizer is built, or while all weights are frozen, is kept, and restored when
        there is something to train. A file that holds no optimizer state at all changes nothing.

        In `keras.models.load_model`, state for other variables than those that are trained is no error: those that
        were frozen since the last step before saving are left out, and where variables joined nothing fits. A warning
        names what is not used.

        Raises:
            ValueError: If the saved state does not belong to this optimizer and these variables.
        """
        saved = {name: np.array(store[name]) for name in list(store.keys())}
        if not saved:
            return
        if "schema" not in saved:
            raise ValueError(
                f"The saved optimizer state was not written by keras_optkit (it holds {len(saved)} unnamed arrays) and "
                f"cannot be restored into {type(self).__name__}. Load with `compile=False`, or compile with the "
                "optimizer that was saved."
            )
        if self._held.variables:
            self._restore(saved)
            return
        theirs = self._refuse_unless_same(saved, ("optimizer", "learning_rate"))
        self._updates.assign(saved["iterations"])
        self._multiplier.assign(saved["multiplier"])
        self._held.pending = saved
        if self.built and theirs["variables"]:
            warnings.warn(
                f"{self.name} has nothing to train, and its saved state (update {saved['iterations']}) is for "
                f"{_listed(theirs['variables'])}. It is kept until these are trained again.",
                stacklevel=2,
            )

    def _restore(self, saved: dict[str, np.ndarray] | Legacy, *, waited: bool = False) -> None:
        """Restores state, as in the files of Keras 3 or as the arrays of an `.h5` file.

        Args:
            saved: The state.
            waited: Whether it was loaded before there was something to train.
        """
        if isinstance(saved, Legacy):
            try:
                saved.refuse_unless_for(self.variables)
                self.set_weights(saved.values)
            except ValueError as error:
                warnings.warn(f"The optimizer state of the `.h5` file is not used: {error}", stacklevel=2)
            return
        if self._held.opened:
            self._held.opened = False
            usable = self._usable(saved, waited=waited)
            if usable is None:
                self._updates.assign(saved["iterations"])
                self._multiplier.assign(saved["multiplier"])
                self._pack_again([int(saved["iterations"])] * len(self._held.variables))
                return
            saved = usable
        schema = self._refuse_unless_same(
            saved, ("optimizer", "learning_rate", "state", "variables", "in_model", "rules")
        )
        fresh = schema["state"] is None  # it was saved before build
        if not fresh and schema["since"] != self._since():
            self._pack_again(schema["since"])
        entries = self._entries()
        if fresh:
            entries = {name: entries[name] for name in ("iterations", "multiplier")}
        for name, (variable, bucket) in entries.items():
            if name.startswith("nonfinite.") and name not in saved:  # counting may begin at any time
                continue
            if bucket is None:
                variable.assign(saved[name])
            else:
                slot = name.rsplit(".", 1)[0]
                whole = bucket.join([saved[f"{slot}.{self._held.places[i]}"] for i in bucket.indices])
                value = stored_as(variable, whole, bucket) if isinstance(variable, Codec) else bucket.stored(whole)
                for part, new in zip(tree.flatten(variable), tree.flatten(value), strict=True):
                    part.assign(new)
        for counts, names in [] if fresh else self._counts():
            # files from before `given` was written: in the middle of a cycle all gradients count as there
            values = [saved.get(name) if name in saved else 2 * (saved["micro"] > 0) for name in names]
            counts.assign(np.array(values, "int32"))

    def _usable(self, saved: dict[str, np.ndarray], *, waited: bool) -> dict[str, np.ndarray] | None:
        """Of the state in a model's file, that of the variables which are trained now; None if it cannot be told.

        Variables are known by their places among the model's weights. In older files they are by order and shapes;
        those that were frozen after the last step by a flag, or if it was changed meanwhile by their names, which may
        be those of another layer in a model of models.
        """
        theirs, ours = json.loads(saved["schema"].tobytes()), self._schema()
        flags = theirs.get("trainable", [True] * len(theirs["variables"]))
        there, here = theirs.get("in_model"), ours["in_model"]
        if _comparable(there, here):
            flags = [place in here["places"] for place in there["places"]]
        elif waited and "names" in theirs:
            flags = [name in ours["names"] for name in theirs["names"]]
        kept = [place for place, flag in enumerate(flags) if flag]
        fits = [theirs["variables"][place] for place in kept] == ours["variables"]
        if theirs["state"] is None or (fits and all(flags)):
            return saved
        left = [v for v, flag in zip(theirs["variables"], flags, strict=True) if not (fits and flag)]
        warnings.warn(
            f"The saved state of {self.name} (update {saved['iterations']}) is not used for {_listed(left)}: the model "
            f"was saved with other weights frozen than those that the optimizer had last trained. It now trains "
            f"{_listed(ours['variables'])}{'' if fits else ', which start without state'}.",
            stacklevel=2,
        )
        if not fits:
            return None
        places = {place: new for new, place in enumerate(kept)}
        part = {}
        for name, value in saved.items():
            stem, _, end = name.rpartition(".")
            if stem not in (*PER_PARAMETER, *PER_SOME) and not stem.startswith("slot."):
                part[name] = value
            elif int(end) in places:
                part[f"{stem}.{places[int(end)]}"] = value
        lists = ("variables", "names", "trainable", "since")
        schema = theirs | {name: [theirs[name][place] for place in kept] for name in lists}
        if there is not None:
            schema["in_model"] = there | {"places": [there["places"][place] for place in kept]}
        schema["rules"] = {str(places[int(p)]): rule for p, rule in theirs["rules"].items() if int(p) in places}
        return part | {"schema": np.frombuffer(json.dumps(schema).encode(), np.uint8)}

    def _refuse_unless_same(self, saved: dict[str, np.ndarray], keys: Sequence[str]) -> dict[str, Any]:
        """Raises with the differences between the saved schema and this one; returns the saved one."""
        theirs, ours = json.loads(saved["schema"].tobytes()), self._schema()
        if theirs["format"] != _FORMAT:
            raise ValueError(f"The optimizer state has format {theirs['format']!r}; this version reads {_FORMAT}.")
        if theirs["state"] is None:  # saved before build
            keys = [key for key in keys if key not in ("state", "variables", "in_model", "rules")]
        lines = [line for key in keys if key != "in_model" for line in _differences(key, theirs[key], ours[key])]
        if "in_model" in keys and not lines:
            lines = _other_layers(theirs, ours)
        if lines:
            raise ValueError(
                f"The saved optimizer state does not belong to this {type(self).__name__} (saved != here):\n  "
                + "\n  ".join(lines)
            )
        return theirs


def entry_of(entry: Sequence[Any]) -> tuple[list[str], dict[str, Any] | None, str]:
    """The paths, the bucket and the codec of an entry of `packed`; older ones have a single path and no codec."""
    paths, bucket, codec = [*entry, ""][:3]
    return [paths] if isinstance(paths, str) else paths, bucket, codec


def unpacked(packed: dict[str, Any], values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The entries of a file.

    Args:
        packed: What `SavedState.packed` returned.
        values: The values of the variables in it by their paths.
    """
    schema = packed["schema"]
    store = {"schema": np.frombuffer(json.dumps(schema).encode(), np.uint8)}
    for name, entry in packed["entries"].items():
        paths, described, codec = entry_of(entry)
        held = [values[path] for path in paths]
        if described is None:
            store[name] = held[0]
            continue
        shapes = tuple(tuple(schema["variables"][place][1]) for place in described["places"])
        bucket = Bucket(tuple(described["places"]), shapes, "", Treatment(), described["form"])
        parts = bucket.separate(_wide(CODECS[codec](*held) if codec else held[0], bucket))
        slot = name.rsplit(".", 1)[0]
        store |= {f"{slot}.{place}": part for place, part in zip(described["places"], parts, strict=True)}
    for path, names in packed["given"]:
        store |= dict(zip(names, values[path], strict=True))
    return store


@dataclass(frozen=True)
class Legacy:
    """What an `.h5` file holds of an optimizer.

    Attributes:
        values: The values of `Optimizer.variables`.
        paths: The variables' paths in the file, "adam/m"; None where they are not known.
    """

    values: list[np.ndarray]
    paths: list[str] | None

    @classmethod
    def of(cls, weights: Sequence[Any]) -> Legacy:
        """Of what Keras hands to `set_weights`: HDF5's own objects, which have a name, or arrays."""
        names = [getattr(weight, "name", None) for weight in weights]
        known = all(isinstance(name, str) for name in names)
        paths = [str(name).partition("/optimizer_weights/")[2] for name in names] if known else None
        return cls([np.array(weight) for weight in weights], paths)

    def refuse_unless_for(self, variables: Sequence[Any]) -> None:
        """Raises if the weights joined the optimizer in another order than here, which the names tell."""
        theirs, ours = _joined(self.paths or []), _joined(v.path for v in variables)
        if self.paths is not None and theirs != ours:
            raise ValueError(
                f"of the state in it, {', '.join(theirs[:4]) or 'none'} is of weights that joined the optimizer after "
                f"others, and here {', '.join(ours[:4]) or 'none'} is. Use a `.keras` or a `.weights.h5` file, which "
                "tell which weights these are."
            )


#: How the names end of the state of weights that joined after others.
_JOINED = re.compile(r"_joined_\d+(_\d+)?$")


def _joined(paths: Iterable[str]) -> list[str]:
    """The names of the state of weights that joined after others."""
    return [path.split("/")[-1] for path in paths if _JOINED.search(path)]


def _wide(stored: Any, bucket: Bucket) -> np.ndarray:
    """What files hold of packed state: its values, in at least float32, since HDF5 does not know bfloat16."""
    if isinstance(stored, Codec):
        held = type(stored)(*map(on_host, stored))
        return np.asarray(keras.ops.convert_to_numpy(bucket.stored(held.decode(bucket))))
    value = on_host(stored)
    return value.astype("float32") if value.dtype.name == "bfloat16" else value


def _comparable(a: Any, b: Any) -> bool:
    """Whether places are those in models of as many weights."""
    return a is not None and b is not None and a["weights"] == b["weights"]


def _other_layers(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The variables that are of another layer of the model, as far as it is known."""
    there: Any = theirs.get("in_model")
    here = ours["in_model"]
    if not _comparable(there, here):
        return []
    pairs = enumerate(zip(there["places"], here["places"], strict=True))
    lines = [
        f"variable {i}: {theirs['names'][i]}, number {a} of the model's weights != {ours['names'][i]}, number {b}"
        for i, (a, b) in pairs
        if a != b
    ]
    return lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]


def _differences(key: str, theirs: Any, ours: Any) -> list[str]:
    if theirs == ours:
        return []
    if key != "variables":
        return [f"{key}: {theirs} != {ours}"]
    lines = [f"number of variables: {len(theirs)} != {len(ours)}"] if len(theirs) != len(ours) else []
    lines += [
        f"variable {i}: {_described(a)} != {_described(b)}"
        for i, (a, b) in enumerate(itertools.zip_longest(theirs, ours))
        if a != b
    ]
    return lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]


def _listed(variables: Sequence[Any]) -> str:
    names = [_described(variable) for variable in variables[:10]]
    more = [f"{len(variables) - 10} more"] if len(variables) > 10 else []
    return f"{len(variables)} variable{'s' if len(variables) != 1 else ''} ({', '.join([*names, *more])})"


def _described(variable: list[Any] | None) -> str:
    return "none" if variable is None else f"{variable[0]} {tuple(variable[1])}"


def _with_shape(name: str, slot: Fill | FromWeights) -> str:
    own = isinstance(slot, Fill) and slot.shape is not None
    return f"{name} {slot.shape}" if own else name  # type: ignore[union-attr]


def _name(variable: Any) -> str:
    """The name of a variable with that of its layer; the beginning of paths changes when a model is loaded."""
    return "/".join(getattr(variable, "path", variable.name).split("/")[-2:])


def _kind(variable: Any) -> str:
    """The last part of a variable's path, without the number that makes it unique: "kernel", "gamma", ..."""
    return re.sub(r"(_\d+)?(:\d+)?$", "", variable.name.split("/")[-1])
