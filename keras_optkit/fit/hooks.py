"""Hooks around the methods of one object."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

#: Called with the method's arguments; the method runs inside the context manager that it returns, and if that yields a
#: function, the function is called with the method's result.
Hook = Callable[..., contextlib.AbstractContextManager[Any]]


_thread = threading.local()  # the replicas of a strategy are traced in threads of their own


@contextlib.contextmanager
def muted(*, but: Collection[str] = ()) -> Iterator[None]:
    """No hook in this thread sees anything, except for those around the methods of these names."""
    before, _thread.seen = getattr(_thread, "seen", None), but
    try:
        yield
    finally:
        _thread.seen = before


def around(owner: Any, method: str, hook: Hook, *, first: bool = False) -> Callable[[], None]:
    """Runs `hook` around `owner.method` from now on, on this one object, and returns a function that removes it.

    One method may have several hooks, which can be removed in any order; those added with `first` are entered before
    the others. What Keras compiles calls the method only while it is traced.
    """
    own = vars(owner)  # not setattr, where Keras and TensorFlow would begin to track what is set
    wrapper = own.get(method)
    if not hasattr(wrapper, "hooks"):
        wrapper = own[method] = _wrap(getattr(owner, method), method, replaced=wrapper)
    hooks = wrapper.hooks
    hooks.insert(0 if first else len(hooks), hook)

    def remove() -> None:
        if hook in hooks:
            hooks.remove(hook)
        if not hooks and own.get(method) is wrapper:
            del own[method]
            if wrapper.replaced is not None:
                own[method] = wrapper.replaced

    return remove


def _wrap(function: Callable[..., Any], method: str, replaced: Any) -> Any:
    hooks: list[Hook] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen = getattr(_thread, "seen", None)
        if seen is not None and method not in seen:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            see_result = [stack.enter_context(hook(*args, **kwargs)) for hook in hooks]
            result = function(*args, **kwargs)
            for see in see_result:
                if see is not None:
                    see(result)
            return result

    wrapper.hooks = hooks  # type: ignore[attr-defined]
    wrapper.replaced = replaced  # type: ignore[attr-defined]
    return wrapper
