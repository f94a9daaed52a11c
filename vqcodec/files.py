"""Finds input files, plans the names of outputs, and reads and writes whole files. Standard library only.

Errors of the file system are raised as OSError with the file's name, arguments that do not go together as ValueError.
"""

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from vqcodec import streams

STREAM = "-"
_STEPS = (2 * 10**9, 10**9, 10**7, 10**3, 100)  # nanoseconds to which FAT, HFS+, exFAT and NTFS round times down
VQZ_SUFFIXES = (".vqz",)
PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".heic", ".heif", ".jxl"),
    *(".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)


@dataclass(frozen=True)
class Job:
    """One file to make from another.

    Attributes:
        source: the file to read, or "-" for standard input.
        target: the file to write, or "-" for standard output.
        folder: if not "", an output folder above the target: missing folders down to the target are made. If "", the
            folder of the target must exist.
        note: why the target is not called as usual; "" if it is.
    """

    source: str
    target: str
    folder: str = ""
    note: str = ""


def find(inputs: Iterable[str], suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """List input files, and replace each folder by the files in it that have one of the suffixes.

    Folders are searched recursively, in alphabetical order. Inside them, symbolic links to folders are not followed;
    pipes, sockets and devices, and names that start with a dot are left out. A folder that cannot be searched is listed
    itself: reading it as a file fails, and says why.

    Args:
        inputs: names of files and folders.
        suffixes: with the dot, in lower case; upper case in names matches too.

    Returns:
        (path, name) of each file. The name is relative to the folder in which the file was found.

    Raises:
        ValueError: a folder holds no such file.
    """
    found: list[tuple[str, str]] = []
    for given in inputs:
        if not os.path.isdir(given):
            found.append((given, os.path.basename(given)))
            continue
        paths: list[str] = []
        closed: list[OSError] = []
        for folder, subfolders, names in os.walk(given, onerror=closed.append):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(folder, name)
                if name.lower().endswith(tuple(suffixes)) and not name.startswith(".") and not is_special(path):
                    paths.append(path)
        paths += [error.filename for error in closed]
        found += [(path, os.path.relpath(path, given)) for path in paths]
        if not paths:
            raise ValueError(f"folder {given} holds no files named *{' *'.join(suffixes)}")
    return found


def plan(inputs: Sequence[str], output: str | None, *, suffixes: Sequence[str], new_suffix: str) -> list[Job]:
    """Decide which file goes where.

    Args:
        inputs: files, folders, or "-" alone.
        output: a file, a folder or "-". A folder receives the layout of the input folders; it may be missing. None
            puts outputs beside their inputs, and the output of standard input on standard output.
        suffixes: the usual suffixes of inputs. The target's suffix replaces these; it follows any other, and it
            follows the suffix of an input that would otherwise have the same target as one before it.
        new_suffix: the suffix of targets.

    Raises:
        ValueError: there are several inputs and the output is not a folder, two inputs have the same target, a target
            is one of the inputs, the output is "", or "-" stands where a name is needed.
        OSError: the current folder has been removed.
    """
    if output == "":
        raise ValueError("the name of the output is empty")
    if STREAM in inputs:
        if len(inputs) > 1:
            raise ValueError("- (standard input) cannot be combined with other inputs")
        if output is not None and os.path.isdir(output):
            raise ValueError(f"{output} is a folder, and standard input has no name to use in it")
        return [Job(STREAM, output or STREAM)]
    found = find(inputs, suffixes)
    several = len(inputs) > 1 or os.path.isdir(inputs[0])
    folder = output is not None and (os.path.isdir(output) or output.endswith((os.sep, "/")))
    with _naming(os.curdir):  # which may have been removed
        if not (several or folder or output is None):
            jobs = [Job(found[0][0], output or "")]
        elif output == STREAM:
            raise ValueError("several files cannot go to standard output")
        elif output is not None and os.path.exists(output) and not os.path.isdir(output):
            raise ValueError(f"{output} is not a folder; for several inputs, the output must be one")
        else:
            jobs = _name_targets(found, output or "", suffixes, new_suffix)
        check_distinct(jobs)
    return jobs


def is_special(path: str) -> bool:
    """Whether a path is that of a device, a pipe, a socket or a folder."""
    return os.path.exists(path) and not os.path.isfile(path)


def check(job: Job, *, overwrite: bool) -> None:
    """Check, before the work begins, that the source can be read and the target can be written.

    Args:
        job: the files.
        overwrite: whether the target may exist.

    Raises:
        OSError: the job would fail; the message says why.
    """
    if job.source != STREAM:
        _check_access(job.source, os.R_OK)
    if job.target == STREAM:
        return
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(job.target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), job.target)
        if stat.S_ISREG(mode) and not overwrite:
            raise _exists(job.target)
        _check_access(job.target, os.W_OK)
        if not stat.S_ISREG(mode):
            return  # a device or a pipe
    written = os.path.realpath(job.target) if os.path.islink(job.target) else job.target
    folder = os.path.dirname(written) or os.curdir
    while job.folder and not os.path.exists(folder) and os.path.dirname(folder) != folder:  # write() makes it
        folder = os.path.dirname(folder) or os.curdir
    _check_access(folder, os.W_OK | os.X_OK)


def is_current(job: Job) -> bool:
    """Whether the target is a file that is as new as the source, or newer."""
    if STREAM in (job.source, job.target):
        return False
    try:
        source, target = os.stat(job.source), os.stat(job.target)
    except OSError:
        return False
    made, wanted = target.st_mtime_ns, source.st_mtime_ns
    return stat.S_ISREG(target.st_mode) and (made >= wanted or any(made == wanted - wanted % step for step in _STEPS))


def status(path: str) -> os.stat_result | None:
    """The times and the identity of a regular file; None for "-", devices and pipes.

    Raises:
        OSError: there is no such file.
    """
    if path == STREAM:
        return None
    found = os.stat(path)
    return found if stat.S_ISREG(found.st_mode) else None


def read(path: str) -> bytes:
    """Read a whole file or, for "-", standard input.

    Raises:
        OSError: the file cannot be read.
    """
    if path != STREAM:
        return Path(path).read_bytes()
    with _naming("standard input"):
        return sys.stdin.buffer.read()


def write(path: str, data: bytes, *, overwrite: bool, like: os.stat_result | None = None) -> None:
    """Write a file as `write_atomically` does, and the folders that are missing on the way to it.

    Args:
        path: the file; "-" for standard output. A device or a pipe is written to as it is.
        data: what the file should hold.
        overwrite: whether an existing file may be replaced.
        like: the file gets these times, unless it is a device or a pipe.

    Raises:
        FileExistsError: the file exists, and overwrite is false.
        OSError: anything else, with the name of this file.
    """
    if path == STREAM:
        _write_stdout(data)
        return
    with _naming(path):
        if is_special(path):  # the path itself: a pipe in /dev/fd has no real one
            with open(path, "wb", buffering=0) as file:
                _write_all(file, data)
            return
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
    write_atomically(path, data, overwrite=overwrite, like=like)


def write_atomically(
    path: str | os.PathLike[str], data: bytes, *, overwrite: bool = True, like: os.stat_result | None = None
) -> None:
    """Write a file so that it holds all of the data or, on any failure or Ctrl-C, stays as it was.

    The data go to a temporary file in the same folder, which then takes the name of the target, and its permissions if
    there is one. The folder must exist. A symbolic link is followed. Nothing is synchronised: after a power failure the
    data may be missing.

    Args:
        path: the file.
        data: what it should hold.
        overwrite: whether an existing file may be replaced. If not, it is kept even if it appears in the meantime.
        like: the file gets these times where its file system allows it; None for the present time.

    Raises:
        FileExistsError: the file exists, and overwrite is false.
        OSError: anything else, with the name of this file.
    """
    target = os.path.realpath(path)
    if not overwrite and os.path.exists(target):
        raise _exists(path)
    temporary = os.path.join(os.path.dirname(target), f".vqcodec-{secrets.token_hex(8)}.tmp")
    try:
        with _naming(path):
            with open(temporary, "xb", buffering=0) as file:  # its mode follows the umask, unlike that of tempfile
                _write_all(file, data)
            if like is not None:
                with contextlib.suppress(OSError):
                    os.utime(temporary, ns=(like.st_atime_ns, like.st_mtime_ns))
            if overwrite:
                with contextlib.suppress(OSError):
                    os.chmod(temporary, os.stat(target).st_mode & 0o777)
                os.replace(temporary, target)
            else:
                _move_to_free_name(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def remove_source(job: Job, data: bytes, before: os.stat_result | None) -> None:
    """Remove the source of a target, once the target is on the disk.

    Args:
        job: the files.
        data: what was written to the target, which is read back.
        before: the `status` of the source from before it was read.

    Raises:
        OSError: the target reads back otherwise, the source has changed since, or cannot be removed.
    """
    with _naming(job.target), open(job.target, "r+b") as file:
        os.fsync(file.fileno())
        if file.read() != data:
            raise OSError(errno.EIO, f"does not read back as it was written, so {job.source} is kept")
    _synchronise_folder(os.path.dirname(os.path.realpath(job.target)))
    now = status(job.source)
    if before is None or now is None or _contents(now) != _contents(before):
        raise OSError(errno.EBUSY, f"has changed since it became {job.target}, so it is kept", job.source)
    os.unlink(job.source)


def _contents(found: os.stat_result) -> tuple[int, ...]:
    """Numbers that differ between files, and between the contents of one file at different times."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _synchronise_folder(path: str) -> None:
    """Bring the names in a folder to the disk, where the system can open folders."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _move_to_free_name(source: str, target: str) -> None:
    """Rename a file, but never replace another one. A second name may remain.

    Raises:
        FileExistsError: the target exists.
    """
    try:
        os.link(source, target)  # fails if the target exists, unlike os.rename
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # a system or a file system without hard links, FAT for example
        with open(target, "xb"):  # reserves the name: fails if the target exists
            pass
        try:
            os.replace(source, target)
        except BaseException:
            os.unlink(target)
            raise


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make the system's errors in the body name this file, and not a folder or a temporary file."""
    try:
        yield
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write_stdout(data: bytes) -> None:
    try:
        with _naming("standard output"):
            _write_all(sys.stdout.buffer, data)
            sys.stdout.buffer.flush()
    except OSError:
        streams.discard(sys.stdout)
        raise


def _write_all(file: BinaryIO | FileIO, data: bytes) -> None:
    """Write all of the data. An unbuffered file, such as standard output of `python -u`, may take less at a time."""
    rest = memoryview(data)
    while rest:
        taken = file.write(rest)
        if not taken:  # it would block
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[taken:]


def renamed(name: str, suffixes: Sequence[str], new_suffix: str) -> str:
    """The name with the new suffix in the place of one of the given ones, or after any other."""
    stem, suffix = os.path.splitext(name)
    return (stem if suffix.lower() in suffixes else name) + new_suffix


def _name_targets(found: Sequence[tuple[str, str]], folder: str, suffixes: Sequence[str], new_suffix: str) -> list[Job]:
    """Name the target of each (path, name): beside the path, or by its name in a folder unless that is ""."""
    jobs: list[Job] = []
    earlier: dict[str, tuple[str, str]] = {}  # by target: how it is called without the new suffix, and its source
    for path, name in found:
        place = os.path.join(folder, name) if folder else path
        target = renamed(place, suffixes, new_suffix)
        other, source = earlier.get(os.path.realpath(target), (place, ""))
        note = ""
        if os.path.abspath(other) != os.path.abspath(place):
            note = f"becomes {place}{new_suffix}, because {source} becomes {target}"
            target = place + new_suffix
        elif os.path.exists(place + new_suffix):
            target = place + new_suffix  # as it was named when there was another source, which may be gone
        earlier.setdefault(os.path.realpath(target), (place, path))
        jobs.append(Job(path, target, folder, note))
    return jobs


def check_distinct(jobs: Sequence[Job]) -> None:
    """Check that no target is a source, by whatever name, and that no two targets are one file.

    Raises:
        ValueError: there is such a target.
    """
    sources = {}
    for job in jobs:
        with contextlib.suppress(OSError):
            sources[_identity(job.source)] = job.source
    targets: dict[str, str] = {}
    for job in jobs:
        if job.target == STREAM:
            continue
        with contextlib.suppress(OSError):
            if (source := sources.get(_identity(job.target))) is not None:
                raise ValueError(f"the output {job.target} would replace the input {source}")
        path = os.path.realpath(job.target)
        if path in targets:
            raise ValueError(f"{targets[path]} and {job.source} would both become {job.target}")
        targets[path] = job.source


def _identity(path: str) -> tuple[int, int]:
    """Return device and inode, which are the same for all names of and links to a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _check_access(path: str, mode: int) -> None:
    os.stat(path)
    if not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def _exists(path: str | os.PathLike[str]) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "File exists, -f would overwrite it", os.fspath(path))
