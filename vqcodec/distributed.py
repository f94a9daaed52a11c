"""Many pictures on many processes and machines, by Ray Data.

    dataset -> map_batches(Compress) -> dataset     bytes in, bytes out, for pipelines of your own
    folders -> plan -> jobs -> make -> outcomes     files in, files out, for `vqcodec compress --ray`

Ray schedules, restarts and balances; here is what it runs. An actor holds one model and works on one picture at a time.
The files of `make` are read and written by the actors themselves, so that only names pass through Ray.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import secrets
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import ray.data  # sets up its log, which cluster() silences
import torch
from pyarrow import fs

from vqcodec import bitstream, codec, files, image, packaged, weights
from vqcodec.errors import WeightsError, one_line

SHARD_SUFFIX = ".tar"  # of WebDataset
MOST_FILES = 16  # of a task of Ray: what is tried again, from its first unfinished file, when its actor dies
RETRIES = 3  # of such a task; a picture that always kills its actor must not stop the rest
_DIED = f"not finished: {1 + RETRIES} workers died of it or of a file beside it (memory, or a crash)"
_NATIVE = {"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"}  # what pyarrow opens without fsspec
_PIECE = 1 << 22  # bytes of a shard to ask for at a time
_ATOMIC = {"s3", "gcs", "abfs"}  # filesystems of pyarrow in which an object appears when all of it is there
_STRINGS = pa.list_(pa.string())
_OUTCOME = pa.schema(
    [
        ("source", pa.string()),
        ("read", pa.int64()),
        ("written", pa.int64()),
        ("errors", pa.list_(_STRINGS)),
        ("notes", pa.list_(_STRINGS)),
    ]
)


# Columns of datasets


class Transcoder:
    """A callable for `Dataset.map_batches(..., batch_format="pyarrow")`: it replaces the files in a column by others.

    The column holds whole files as bytes. Where one cannot be converted, the result is null and the column "error" says
    why in one line; else "error" is null. "notes" lists what was converted or lost. All other columns and the order of
    the rows stay. Where "error" is there already, rows with an error keep it and their null, so that transcoders can
    follow each other. A null in the column stays null, without an error.

    Attributes:
        suffixes: file name suffixes of what it reads, in lower case.
        new_suffix: file name suffix of what it makes.
    """

    suffixes: tuple[str, ...]
    new_suffix: str

    def __init__(self, column: str) -> None:
        self._column = column

    def convert(self, data: bytes) -> tuple[bytes, tuple[str, ...]]:
        """Convert one file.

        Returns:
            The new file, and notes of one line each.

        Raises:
            VqcodecError: the file or the weights cannot be used; the message says why.
        """
        raise NotImplementedError

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Convert a batch.

        Raises:
            KeyError: it has no such column.
        """
        rows = len(batch)
        names = batch.column_names
        known = batch["error"].to_pylist() if "error" in names else [None] * rows
        made: list[bytes | None] = []
        errors: list[str | None] = []
        notes: list[list[str]] = batch["notes"].to_pylist() if "notes" in names else [[] for _ in range(rows)]
        for data, error, noted in zip(batch[self._column], known, notes, strict=True):
            result = None
            if error is None and data.is_valid:
                try:
                    result, new = self.convert(data.as_py())
                    noted += new
                except Exception as caught:  # noqa: BLE001 - one bad file must not stop the others
                    error = one_line(caught)
            made.append(result)
            errors.append(error)
        columns = {
            self._column: pa.array(made, pa.large_binary()),
            "error": pa.array(errors, pa.string()),
            "notes": pa.array(notes, _STRINGS),
        }
        for name, values in columns.items():
            if name in names:
                batch = batch.set_column(names.index(name), name, values)
            else:
                batch = batch.append_column(name, values)
        return batch


class Compress(Transcoder):
    """Picture files -> .vqz files. See `Transcoder`.

    Args:
        column: the column with the files.
        weights, device, options: as `codec.compress`. The weights are loaded at once. A path must be there on every
            machine.
        max_pixels: as `image.load`.

    Raises:
        WeightsError: the weights cannot be used.
    """

    suffixes = files.PICTURE_SUFFIXES
    new_suffix = files.VQZ_SUFFIXES[0]

    def __init__(
        self,
        column: str = "bytes",
        *,
        weights: str | None = None,
        device: str = "auto",
        max_pixels: int = bitstream.DEFAULT_MAX_PIXELS,
        **options: Any,
    ) -> None:
        super().__init__(column)
        _load(weights, device)
        self._max_pixels = max_pixels
        self._options = {"weights": weights, "device": device, **options}

    def convert(self, data: bytes) -> tuple[bytes, tuple[str, ...]]:
        picture = image.load(data, max_pixels=self._max_pixels)
        return codec.compress(replace(picture, notes=()), **self._options), picture.notes


class Decompress(Transcoder):
    """.vqz files -> picture files. See `Transcoder`.

    Args:
        column: the column with the files.
        new_suffix: file name suffix of the format to make, ".png" for example.
        weights, look, device, options: as `codec.decode_picture`. The weights are loaded at once. A path must be there
            on every machine.

    Raises:
        WeightsError: the weights cannot be used, or do not have the look.
        ImageError: no format has this suffix.
    """

    suffixes = files.VQZ_SUFFIXES
    new_suffix = ".png"

    def __init__(
        self,
        column: str = "bytes",
        *,
        new_suffix: str = new_suffix,
        weights: str | None = None,
        look: str = packaged.LOOKS[0],
        device: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(column)
        image.check_suffix(new_suffix)
        self.new_suffix = new_suffix
        _load(weights, device, look)
        self._options = {"weights": weights, "look": look, "device": device, **options}

    def convert(self, data: bytes) -> tuple[bytes, tuple[str, ...]]:
        fitting = image.adapt(codec.decode_picture(data, **self._options), self.new_suffix)
        return image.save(fitting, self.new_suffix), fitting.notes


def _load(given: str | None, device: str, look: str = packaged.LOOKS[0]) -> None:
    """Load weights into the cache that the codec takes them from."""
    found = packaged.find(given)
    weights.load(found, device, packaged.find_look(found, look))


# Files


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
        return f"{_plain(self.root)}/{self.name}"


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
    output = _absolute(output)
    targets: dict[str, Job] = {}
    for root, name in _find(inputs, output, (*kind.suffixes, SHARD_SUFFIX)):
        target = name if _is_shard(name) else files.renamed(name, kind.suffixes, kind.new_suffix)
        if target in targets and targets[target].name != name:
            target = name + kind.new_suffix
        job = Job(root, name, target)
        if (other := targets.setdefault(target, job)) is not job:
            raise ValueError(f"{other.source} and {job.source} would both become {target}")
    jobs = list(targets.values())
    sources = {job.source for job in jobs}
    for job in jobs:
        if (made := f"{_plain(output)}/{job.target}") in sources:
            raise ValueError(f"the output {made} would replace an input")
    if overwrite:
        return jobs, 0
    filesystem, base = _open(output)
    there = {
        _relative(info.path, base)
        for info in filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        if info.is_file
    }
    missing = [job for job in jobs if job.target not in there]
    return missing, len(jobs) - len(missing)


def _find(inputs: Iterable[str], output: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(root, name) of each source, as in `Job`; nothing that lies in an output folder inside of an input folder."""
    for given in inputs:
        root = _absolute(given)
        plain = _plain(root)
        filesystem, base = _open(root)
        kind = filesystem.get_file_info(base).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), given)
        if kind == fs.FileType.File:
            folder, _, name = plain.rpartition("/")
            yield folder + root.removeprefix(plain) or "/", name
            continue
        if isinstance(filesystem, fs.LocalFileSystem):
            names = [name for _, name in files.find([base], suffixes)]
        else:
            infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
            names = sorted(_relative(info.path, base) for info in infos if info.is_file)
            names = [
                name
                for name in names
                if name.lower().endswith(tuple(suffixes)) and not any(part.startswith(".") for part in name.split("/"))
            ]
            if not names:
                raise ValueError(f"folder {given} holds no files named *{' *'.join(suffixes)}")
        made = _plain(output)
        yield from ((root, name) for name in names if made == plain or not f"{plain}/{name}".startswith(f"{made}/"))


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIX)


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(place)


def _plain(place: str) -> str:
    """A place without the query of a URI, which has options of the filesystem, and without a "/" at its end."""
    return (place.partition("?")[0] if "://" in place else place).rstrip("/")


@functools.lru_cache
def _open(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of an absolute path or URI, and the path in it."""
    scheme, separator, _ = place.partition("://")
    if not separator or scheme in _NATIVE:
        return fs.FileSystem.from_uri(place)
    import fsspec

    filesystem, path = fsspec.url_to_fs(place)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _relative(path: str, base: str) -> str:
    return path.strip("/").removeprefix(base.strip("/")).lstrip("/")


class _Files:
    """A callable for `Dataset.map_batches`: takes rows of jobs, makes the files, and returns rows of outcomes.

    Args:
        transcoder: makes the transcoder.
        output: the folder to fill, an absolute path or a URI.
        overwrite: whether a file that has appeared since the jobs were planned is made again.
        threads: of torch; None for its own choice.
    """

    def __init__(
        self, transcoder: Callable[[], Transcoder], output: str, overwrite: bool, threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._transcoder = transcoder()
        self._filesystem, self._base = _open(output)
        self._overwrite = overwrite

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([vars(self._do(Job(**row))) for row in batch.to_pylist()], _OUTCOME)

    def _do(self, job: Job) -> Outcome:
        outcome = Outcome(job.source, 0, 0, [], [])
        try:
            target = f"{self._base.rstrip('/')}/{job.target}"
            if not self._overwrite and self._filesystem.get_file_info(target).type != fs.FileType.NotFound:
                # By an earlier attempt at this job, whose actor died, or by someone else.
                return Outcome(job.source, 0, 0, [], [[job.source, "was there already, left as it is"]])
            filesystem, base = _open(job.root)
            with (
                filesystem.open_input_file(f"{base.rstrip('/')}/{job.name}") as source,
                tempfile.TemporaryFile() as made,
            ):
                if _is_shard(job.name):
                    self._shard(source, made, outcome)
                else:
                    converted, notes = self._transcoder.convert(source.read())
                    made.write(converted)
                    outcome.notes.extend([job.source, note] for note in notes)
                read, written = source.size(), made.tell()
                made.seek(0)
                _write(self._filesystem, target, made)
            return Outcome(job.source, read, written, outcome.errors, outcome.notes)
        except Exception as error:  # noqa: BLE001 - one bad file must not stop the others
            return Outcome(job.source, 0, 0, [[job.source, one_line(error)]], outcome.notes)

    def _shard(self, source: pa.NativeFile, made: IO[bytes], outcome: Outcome) -> None:
        """Copy a tar file with its pictures converted. What cannot be converted stays under its name.

        Raises:
            tarfile.ReadError: the file is cut or damaged.
        """
        names = set()
        with (
            tarfile.open(fileobj=source, mode="r|", bufsize=_PIECE) as old,
            tarfile.open(fileobj=made, mode="w|", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in old:
                content = old.extractfile(member) if member.isfile() else None
                if content is None:  # a folder or a link
                    new.addfile(member)
                    continue
                data, name = content.read(), member.name
                if name.lower().endswith(self._transcoder.suffixes):
                    path = f"{outcome.source}/{name}"
                    try:
                        renamed = files.renamed(name, self._transcoder.suffixes, self._transcoder.new_suffix)
                        if renamed in names:
                            raise FileExistsError(f"the shard has {renamed} already")
                        data, notes = self._transcoder.convert(data)
                        name = renamed
                        outcome.notes.extend([path, note] for note in notes)
                    except Exception as error:  # noqa: BLE001 - one bad picture must not stop the others
                        outcome.errors.append([path, one_line(error)])
                names.add(name)
                copy = tarfile.TarInfo(name)  # not the old one, whose extended header may repeat its name and size
                copy.size, copy.mtime, copy.mode = len(data), member.mtime, member.mode
                new.addfile(copy, io.BytesIO(data))
            # tarfile takes whatever is no header for the end. The real one is blocks of zeros.
            rest = source.size() - old.offset
            source.seek(source.size() - max(0, rest))
            if rest < tarfile.BLOCKSIZE or any(piece.strip(b"\0") for piece in iter(lambda: source.read(_PIECE), b"")):
                raise tarfile.ReadError(f"damaged at byte {old.offset}")


def _write(filesystem: fs.FileSystem, path: str, content: IO[bytes]) -> None:
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


# Ray


@contextlib.contextmanager
def cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to a cluster and leave it at the end. A connection that is there stays.

    Ray's messages are kept back: in the meantime nothing can be printed to standard output, to which it writes.

    Args:
        address: of the cluster, as for `ray.init`; None for the one that $RAY_ADDRESS or `ray start` on this machine
            names, and for a new one on this machine if there is none.
        num_cpus: processors of a new one; None for all of the machine.

    Raises:
        ConnectionError: there is no cluster at this address.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        log = logging.getLogger("ray.data")
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reporting to its makers is the user's choice
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            with _without_stderr():  # where Ray's core says that it has read this level
                ray.init(
                    address,
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing goes to standard error, from code outside of Python either."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def files_of_task(count: int, actors: int) -> int:
    """How many of `count` files an actor gets at a time: few, so that all actors finish at about the same time."""
    return min(MOST_FILES, max(1, count // (4 * actors)))


def make(
    jobs: Sequence[Job], transcoder: Callable[..., Transcoder], *, output: str, overwrite: bool, device: str = "auto"
) -> Iterator[Outcome]:
    """Make files on all CPUs or GPUs of the connected cluster.

    Args:
        jobs: what to make.
        transcoder: makes the transcoder, given `device`; it is sent to the actors.
        output: the folder to fill, a path or a URI that every machine sees.
        overwrite: whether a file that has appeared since the jobs were planned is made again.
        device: "cpu"; "cuda"; or "auto", which is CUDA if the cluster has GPUs. An actor has a GPU of its own, or a CPU
            and one thread of torch.

    Yields:
        The outcome of each job, as they come.

    Raises:
        WeightsError: the weights cannot be used, or the cluster has no GPU for "cuda".
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise WeightsError("the cluster has no GPU")
    transcoder(device="cpu")  # fails here, once, if it would fail in every actor
    use_gpu = device != "cpu" and gpus > 0
    most = gpus if use_gpu else int(resources.get("CPU", 1))
    rows = files_of_task(len(jobs), most)
    count = -(-len(jobs) // rows)

    table = pa.Table.from_pylist([vars(job) for job in jobs])
    dataset = ray.data.from_arrow(table, override_num_blocks=count)
    context = dataset.context  # of this dataset alone
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard takes as long as it takes
    context.max_errored_blocks = -1  # their jobs are missed below
    with warnings.catch_warnings():
        # Ray retries without end by default. It plans to drop this argument, so pyproject.toml limits its version.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        dataset = dataset.map_batches(
            _Files,
            fn_constructor_kwargs={
                "transcoder": functools.partial(transcoder, device="cuda" if use_gpu else "cpu"),
                "output": _absolute(output),
                "overwrite": overwrite,
                "threads": None if use_gpu else 1,
            },
            batch_format="pyarrow",
            batch_size=rows,
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=min(most, count), max_tasks_in_flight_per_actor=1),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    left = {job.source for job in jobs}
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            left.discard(row["source"])
            yield Outcome(**row)
    for source in sorted(left):
        yield Outcome(source, 0, 0, [[source, _DIED]], [])
