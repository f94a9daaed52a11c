"""Places: folders and files by path or URI, on this machine or another, by pyarrow and fsspec."""

import contextlib
import errno
import functools
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from pyarrow import fs

from vqcodec import files

_NATIVE = {"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"}  # what pyarrow opens without fsspec
_ATOMIC = {"s3", "gcs", "abfs"}  # filesystems of pyarrow in which an object appears when all of it is there


def absolute(place: str) -> str:
    """The absolute path of a path; a URI as it is."""
    return place if "://" in place else os.path.abspath(place)


def plain(place: str) -> str:
    """A place without the query of a URI, which has options of the filesystem, and without a "/" at its end."""
    return (place.partition("?")[0] if "://" in place else place).rstrip("/")


@functools.lru_cache
def open_filesystem(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of an absolute path or URI, and the path in it."""
    scheme, separator, _ = place.partition("://")
    if not separator or scheme in _NATIVE:
        return fs.FileSystem.from_uri(place)
    import fsspec

    filesystem, path = fsspec.url_to_fs(place)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def identity(place: str, name: str) -> tuple[str, str]:
    """What two files have in common only if they are the same: name is that of one in a folder, by path or URI."""
    filesystem, base = open_filesystem(place)
    path = f"{base.rstrip('/')}/{name}"
    return filesystem.type_name, os.path.realpath(path) if isinstance(filesystem, fs.LocalFileSystem) else path


def relative(path: str, base: str) -> str:
    """The path in a filesystem of something below a folder, relative to that folder."""
    return path.strip("/").removeprefix(base.strip("/")).lstrip("/")


def find(inputs: Iterable[str], output: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Find the files among inputs and in folders among them; nothing that lies in an output folder inside of those.

    Args:
        inputs: files and folders, as paths or URIs.
        output: the output folder, an absolute path or a URI.
        suffixes: of the files to take from folders, with the dot, in lower case.

    Yields:
        (root, name): a folder, as an absolute path or a URI, and the name of a file relative to it, with "/".

    Raises:
        ValueError: a folder holds no such file, or an address cannot be understood.
        OSError: an input is missing or cannot be listed.
    """
    for given in inputs:
        root = absolute(given)
        address = plain(root)
        filesystem, base = open_filesystem(root)
        kind = filesystem.get_file_info(base).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), given)
        if kind == fs.FileType.File:
            folder, _, name = address.rpartition("/")
            yield folder + root.removeprefix(address) or "/", name
            continue
        if isinstance(filesystem, fs.LocalFileSystem):
            names = [name for _, name in files.find([base], suffixes)]
        else:
            infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
            names = sorted(relative(info.path, base) for info in infos if info.is_file)
            names = [
                name
                for name in names
                if name.lower().endswith(tuple(suffixes)) and not any(part.startswith(".") for part in name.split("/"))
            ]
            if not names:
                raise ValueError(f"folder {given} holds no files named *{' *'.join(suffixes)}")
        made = plain(output)
        yield from ((root, name) for name in names if made == address or not f"{address}/{name}".startswith(f"{made}/"))


def write(filesystem: fs.FileSystem, path: str, content: IO[bytes]) -> None:
    """Write a file that appears under its name when all of it is there, and the folders on the way to it."""
    if filesystem.type_name in _ATOMIC:
        with filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(content, stream)
        return
    folder = path.rpartition("/")[0]
    filesystem.create_dir(folder, recursive=True)
    temporary = f"{folder}/.vqcodec-{secrets.token_hex(8)}.tmp"
    try:
        with filesystem.open_output_stream(temporary, compression=None) as stream:
            shutil.copyfileobj(content, stream)
        filesystem.move(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            filesystem.delete_file(temporary)
        raise
