"""What functions, classes and values mean, as JSON that is the same in every process and another after a change.

Code is compared as it is compiled: comments, docstrings, annotations, formatting, and the file and line where it stands
make no difference. What it refers to counts with it: default values, the variables that a function encloses, and the
globals that it reads, the user's functions among them, to any depth. The code of installed packages is taken to be the
same; `keras_optkit.callbacks.Resume` tells other releases.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import re
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

#: Packages whose code is not looked into.
_LIBRARIES = {"keras", "keras_optkit", "keras_tuner", "tensorflow", "jax", "jaxlib", "numpy", "ml_dtypes"}

#: Names that Keras makes up, with a number that depends on what was built before.
COUNTER = re.compile(r"_\d+$")

_ABSENT = object()

_CHUNK = 1 << 24  # bytes of an array that are copied at a time, if they have to be


def checksum(array: np.ndarray) -> str:
    """Type, shape and a checksum of all rows of an array, which are read in parts."""
    rows = max(1, _CHUNK * max(1, len(array)) // max(1, array.nbytes)) if array.ndim else 1
    total = 0
    for begin in range(0, len(array), rows) if array.ndim else (None,):
        part = array if begin is None else array[begin : begin + rows]
        if part.dtype == object:
            total = zlib.crc32(repr(part.tolist()).encode(), total)
        else:
            total = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, total)
    return f"{array.dtype} {array.shape} {total:08x}"


def meaning(value: Any) -> Any:
    """Describes a value as JSON; what cannot be looked into, by its type."""
    return _Describing().of(value)


class _Describing:
    """One description: what occurs again in it, also inside itself, is named by where it occurred first."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}  # with the thing itself, so that its id stays its own

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if value == value and abs(value) != float("inf") else repr(value)
        if isinstance(value, np.generic):
            return self.of(value.item())
        if isinstance(value, bytes | complex | range | slice | type(...)):
            return repr(value)
        if id(value) in self._seen:
            return f"<{self._seen[id(value)][0]}>"
        self._seen[id(value)] = len(self._seen), value
        return self._of_new(value)

    def _of_new(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.of(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(part) for part in value]
        if isinstance(value, set | frozenset):
            return sorted((self.of(part) for part in value), key=json.dumps)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools.partial):
            return {"function": self.of(value.func), "arguments": self.of([value.args, value.keywords])}
        if isinstance(value, types.MethodType):
            return {"function": self.of(value.__func__), "of": self.of(value.__self__)}
        function = value
        if not isinstance(value, types.FunctionType):  # it may be around one, as those of tf.function and jax.jit are
            function = inspect.unwrap(getattr(value, "python_function", value))
        if isinstance(function, types.FunctionType):
            return self._function(function)
        if hasattr(value, "assign") and hasattr(value, "shape"):
            return f"variable {value.dtype} {tuple(value.shape)}"
        if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
            try:
                return checksum(np.asarray(value))
            except (TypeError, ValueError, NotImplementedError):  # ragged, sparse, or symbolic
                return type(value).__name__
        if hasattr(value, "element_spec"):
            return {"dataset": repr(value.element_spec), "batches": _length(value)}
        return self._object(value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        described: dict[str, Any] = {"class": self._class(kind)}
        if isinstance(value, keras.layers.Layer):  # it may be large, and the model's own are described with the model
            return described
        if hasattr(value, "get_config"):
            try:
                described["config"] = self.of(without_made_up(value.get_config()))
            except Exception:  # many users' classes have none that works
                described["config"] = None
            # what a config has of a function is its name
            described["functions"] = {
                name: self.of(part)
                for name, part in vars(value).items()
                if isinstance(part, types.FunctionType) and _is_own(part.__module__)
            }
        elif _is_own(kind.__module__):
            described["attributes"] = {name: self.of(part) for name, part in getattr(value, "__dict__", {}).items()}
        return described

    def _class(self, kind: type) -> str:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not is_known_code(kind.__module__):
            parts = {key: self.of(_plain_function(part)) for key, part in vars(kind).items() if not _is_made(key)}
            bases = [self.of(base) for base in kind.__bases__]
            return f"{kind.__qualname__} {_digest([parts, bases])}"
        return name

    def _function(self, function: types.FunctionType) -> str:
        if is_known_code(function.__module__):
            return f"{function.__module__}.{function.__qualname__}"
        code = function.__code__
        held = [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        if _is_own(function.__module__):
            cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
            enclosed = {name: cell.cell_contents for name, cell in cells if not _is_empty(cell)}
            held += [self.of(part) for part in _referred_to(code, function.__globals__ | enclosed)]
        return f"{function.__name__} {_digest([list(_instructions(code)), held])}"


def without_made_up(config: Any) -> Any:
    """A config without what differs between two builds of the same: counters in names, ids, and shapes to build for."""
    if isinstance(config, Mapping):
        left_out = ("build_config", "build_input_shape", "shared_object_id")
        return {key: without_made_up(part) for key, part in config.items() if key not in left_out}
    if isinstance(config, list | tuple):
        return [without_made_up(part) for part in config]
    return COUNTER.sub("", config) if isinstance(config, str) else config


def _digest(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _instructions(code: types.CodeType) -> Iterator[Any]:
    """What a function does; not where it stands. A docstring is a constant that no instruction loads."""
    yield code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount, code.co_posonlyargcount
    yield code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    for instruction in dis.get_instructions(code):
        if instruction.opname not in ("EXTENDED_ARG", "RESUME", "NOP"):
            yield instruction.opname, _constant(instruction.argval)


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return list(_instructions(value))
    if isinstance(value, tuple):
        return [_constant(part) for part in value]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return repr(value)


def _referred_to(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    """The values of globals and enclosed variables that a function reads, down to the attribute that it takes of one.

    So a change of `config.epochs` is none of a function that reads `config.temperature`.
    """
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("EXTENDED_ARG", "PRECALL", "CACHE")]
    for i, instruction in enumerate(instructions):
        if isinstance(instruction.argval, types.CodeType):
            yield from _referred_to(instruction.argval, names)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF") and instruction.argval in names:
            value = names[instruction.argval]
            for following in instructions[i + 1 :]:
                taken = inspect.getattr_static(value, str(following.argval), _ABSENT)
                computed = hasattr(type(taken), "__get__") and not isinstance(value, types.ModuleType)
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD") or taken is _ABSENT or computed:
                    break
                value = taken
            yield value


def _plain_function(part: Any) -> Any:
    """What is inside a method of a class's `__dict__`."""
    if isinstance(part, staticmethod | classmethod):
        return part.__func__
    if isinstance(part, property):
        return [part.fget, part.fset, part.fdel]
    return part


#: What Python puts into a class's `__dict__` that says nothing of what the class does.
_MADE = {
    "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__",
    "__firstlineno__", "__qualname__", "__static_attributes__", "__annotations_cache__",
}  # fmt: skip


def _is_made(name: str) -> bool:
    return name in _MADE or name.startswith("_abc_")


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def is_known_code(module: str | None) -> bool:
    """Whether code is of Python or of a package whose release is compared."""
    top = (module or "builtins").split(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


@functools.cache
def _is_own(module: str | None) -> bool:
    """Whether code is not of an installed package, so that what it refers to is looked into as well."""
    if is_known_code(module):
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def _length(dataset: Any) -> Any:
    cardinality = getattr(dataset, "cardinality", None)
    return int(cardinality()) if cardinality is not None else None
