"""Collects the warnings that a thread causes.

`warnings.catch_warnings` replaces the filters of the whole process. Where two threads overlap, the last one to leave
would put back what the other one had set. Here the first thread to enter sets the filters and the last one to leave
puts them back, and each gets its own warnings.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()
_lists: dict[int, list[warnings.WarningMessage]] = {}  # by thread
_outside = contextlib.ExitStack()  # the filters from before the first thread entered


@contextlib.contextmanager
def caught_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collect all warnings of this thread in the body, whatever the filters say.

    Those of a body within it go to that one only. Those of other threads go where they would have gone, but the
    filters do not hold any of them back.
    """
    own: list[warnings.WarningMessage] = []
    with _lock:
        if not _lists:
            _collect()
        outer = _lists.get(threading.get_ident())
        _lists[threading.get_ident()] = own
    try:
        yield own
    finally:
        with _lock:
            if outer is not None:
                _lists[threading.get_ident()] = outer
            else:
                del _lists[threading.get_ident()]
            if not _lists:
                _outside.close()


def _collect() -> None:
    """Let every warning through, to the list of its thread if there is one."""
    _outside.enter_context(warnings.catch_warnings())
    warnings.simplefilter("always")
    elsewhere = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        own = _lists.get(threading.get_ident())
        if own is None:
            elsewhere(message, category, filename, lineno, *rest)  # type: ignore[arg-type]
        else:
            own.append(warnings.WarningMessage(message, category, filename, lineno))

    warnings.showwarning = show  # type: ignore[assignment]
