"""The standard streams of the process, which may be closed, full or unbuffered. Standard library only."""

import io
import os
import sys
from typing import TextIO

_STREAMS = (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_RDONLY))


def repair() -> None:
    """Make closed streams fail when they are used, unbuffered ones write all, and stdout take every character.

    Python has None in the place of a closed stream, and would give its number to the next file that is opened. As
    `stdopen` of gnulib does, a file takes the number that has the wrong direction. With `python -u`, text goes to a raw
    file, and nobody looks at how much of it that took.
    """
    for number, (name, mode, wrong) in enumerate(_STREAMS):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.open(os.devnull, wrong), mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream.buffer, io.RawIOBase):
            setattr(
                sys,
                name,
                open(number, mode, encoding=stream.encoding, errors=stream.errors, closefd=False),  # noqa: SIM115
            )
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files, as Python does for stderr


def discard(stream: TextIO) -> None:
    """Send what is left in a stream that has failed, and all that follows, to nowhere.

    Else the interpreter would try again when it ends, report several lines and change the exit code.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
