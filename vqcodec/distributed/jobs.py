"""Jobs: which file is to be made from which, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyarrow import fs

from vqcodec import files
from vqcodec.distributed import places
from vqcodec.distributed.columns import Transcoder

SHARD_SUFFIX = ".tar"  # of WebDataset


@dataclass(frozen=True)
class Job:
    """One file to make from another.

    Attributes:
        root: the input folder, an absolute path or a URI.
        name: of the source, relative to the root, with "/".
        target: name of the target, relative to the output folder.
    """

    root: str
    name: str
    target: str

    @property
    def source(self) -> str:
        """Where the source is."""
        return f"{places.plain(self.root)}/{self.name}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        source: that of the job.
        read: bytes read.
        written: bytes written; 0 if nothing was.
        errors: [file, message] for the source, or for each member of a shard that stayed as it was.
        notes: [file, note] for what was converted or lost.
    """

    source: str
    read: int
    written: int
    errors: list[list[str]]
    notes: list[list[str]]


def plan(inputs: Sequence[str], output: str, kind: type[Transcoder], *, overwrite: bool) -> tuple[list[Job], int]:
    """Decide which file goes where: under the same name, with the suffix changed. Shards keep theirs.

    After a.jpg, which becomes a.vqz, a.png of the same folder becomes a.png.vqz.

    Args:
        inputs: files, and folders that are searched for shards and for what the transcoder reads; paths or URIs.
        output: the folder to fill; it may be missing.
        kind: the transcoder.
        overwrite: whether files that are there are made again.

    Returns:
        The jobs, and how many more are not needed because their target is there.

    Raises:
        ValueError: a folder holds no such file, two files have the same target, a target is one of the inputs, or an
            address cannot be understood.
        OSError: an input or the output cannot be listed.
    """
    output = places.absolute(output)
    targets: dict[str, Job] = {}
    for root, name in places.find(inputs, output, (*kind.suffixes, SHARD_SUFFIX)):
        target = name if is_shard(name) else files.renamed(name, kind.suffixes, kind.new_suffix)
        if target in targets and targets[target].name != name:
            target = name + kind.new_suffix
        job = Job(root, name, target)
        if (other := targets.setdefault(target, job)) is not job:
            raise ValueError(f"{other.source} and {job.source} would both become {target}")
    jobs = list(targets.values())
    shards = [job for job in jobs if is_shard(job.name)]  # which keep their names
    sources = {places.identity(job.root, job.name) for job in shards}
    for job in shards:
        if places.identity(output, job.target) in sources:
            raise ValueError(f"the output {places.plain(output)}/{job.target} would replace an input")
    if overwrite:
        return jobs, 0
    filesystem, base = places.open_filesystem(output)
    there = {
        places.relative(info.path, base)
        for info in filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        if info.is_file
    }
    missing = [job for job in jobs if job.target not in there]
    return missing, len(jobs) - len(missing)


def is_shard(name: str) -> bool:
    """Whether a file is taken for a shard."""
    return name.lower().endswith(SHARD_SUFFIX)
