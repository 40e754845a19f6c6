"""The other end of `process.py`: computes what it reads, and imports neither TensorFlow nor this package."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
from typing import Any


def _loaded(path: str, name: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def main() -> None:
    """Answers until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    while True:
        try:
            path, module, name = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            function = getattr(_loaded(path, module), name)
            args, kwargs = pickle.load(sys.stdin.buffer)
            answer = (True, function(*args, **kwargs))
        except Exception:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
