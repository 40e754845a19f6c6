"""A process that imports no TensorFlow, in which the references run.

torch's CUDA build, imported after TensorFlow, is a segmentation fault. So this process sends functions by file and name
to one that has neither TensorFlow nor this package, and gets arrays back.
"""

from __future__ import annotations

import atexit
import inspect
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}


@cache
def _process() -> subprocess.Popen[bytes]:
    served = Path(__file__).with_name("serving.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(served)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


def elsewhere(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, computed in the process without TensorFlow.

    Args:
        function: A function at the top of a file that imports neither TensorFlow nor this package.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Raises:
        RuntimeError: If it raises there, with its traceback; or if the process has ended.
    """
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    task = (inspect.getsourcefile(function), function.__module__, function.__name__)
    try:
        # what is sent may be of classes of that file, which the other process has to load before it reads them
        pickle.dump(task, process.stdin)
        pickle.dump((args, kwargs), process.stdin)
        process.stdin.flush()
        succeeded, result = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError) as error:
        _process.cache_clear()
        raise RuntimeError(f"the process of the references ended with {process.wait()} in {function}") from error
    if not succeeded:
        raise RuntimeError(f"{function.__name__} failed in the process of the references:\n{result}")
    return result
