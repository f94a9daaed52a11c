"""Shards: tar files of samples, as WebDataset has them, copied with their pictures converted."""

import io
import tarfile
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from vqcodec import files
from vqcodec.distributed.columns import Transcoder
from vqcodec.distributed.groups import Item
from vqcodec.distributed.jobs import Outcome
from vqcodec.errors import one_line

_PIECE = 1 << 22  # bytes of a shard to ask for at a time


def convert(source: pa.NativeFile, made: IO[bytes], transcoder: Transcoder, outcome: Outcome, most_files: int) -> None:
    """Copy a tar file with its pictures converted. What cannot be converted stays under its name.

    Args:
        source: the tar file.
        made: takes the new one.
        transcoder: converts its pictures.
        outcome: takes errors and notes.
        most_files: to be in memory together.

    Raises:
        tarfile.ReadError: the file is cut or damaged, or has a sparse file.
    """
    names: set[str] = set()
    new_names: dict[str, str] = {}
    with (
        tarfile.open(fileobj=source, mode="r|", bufsize=_PIECE) as old,
        tarfile.open(fileobj=made, mode="w|", format=tarfile.PAX_FORMAT) as new,
    ):
        for member, data, result in transcoder.convert_each(_members(old, transcoder.suffixes), most_files):
            if not member.isfile():  # a folder or a link
                if member.linkname in new_names:  # to a picture, and so is one itself
                    member.linkname = new_names[member.linkname]
                    member.name = files.renamed(member.name, transcoder.suffixes, transcoder.new_suffix)
                new.addfile(member)
                continue
            name, path = member.name, f"{outcome.source}/{member.name}"
            if result is not None:
                renamed = files.renamed(name, transcoder.suffixes, transcoder.new_suffix)
                if renamed in names:
                    outcome.errors.append([path, f"the shard has {renamed} already"])
                elif isinstance(result, Exception):
                    outcome.errors.append([path, one_line(result)])
                else:
                    (data, notes), name = result, renamed
                    new_names[member.name] = renamed
                    outcome.notes.extend([path, note] for note in notes)
            names.add(name)
            copy = tarfile.TarInfo(name)  # not the old one, whose extended header may repeat its name and size
            copy.size, copy.mtime, copy.mode = len(data), member.mtime, member.mode
            new.addfile(copy, io.BytesIO(data))
        # tarfile takes whatever is no header for the end. The real one is blocks of zeros.
        rest = source.size() - old.offset
        source.seek(source.size() - max(0, rest))
        if rest < tarfile.BLOCKSIZE or any(piece.strip(b"\0") for piece in iter(lambda: source.read(_PIECE), b"")):
            raise tarfile.ReadError(f"damaged at byte {old.offset}")


def _members(tar: tarfile.TarFile, suffixes: tuple[str, ...]) -> Iterator[Item[tarfile.TarInfo]]:
    """Each member, its content, and whether it is a file with one of the suffixes."""
    for member in tar:
        if member.issparse():  # of any size, whatever the size of the shard
            raise tarfile.ReadError(f"{member.name} is a sparse file")
        content = tar.extractfile(member) if member.isfile() else None
        yield member, content.read() if content else b"", member.isfile() and member.name.lower().endswith(suffixes)
