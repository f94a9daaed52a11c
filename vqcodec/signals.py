"""What signals do that ask the process to end. Standard library only."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn


def leave(number: int, _: object) -> NoReturn:
    """A handler that exits with the code of shells, 128 and the number of the signal, and so cleans up."""
    sys.exit(128 + number)


@contextlib.contextmanager
def exiting() -> Iterator[None]:
    """Let the process clean up when it is told to end, as on Ctrl-C. Signals that are ignored stay ignored."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    caught = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
