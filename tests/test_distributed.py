"""Compression by Ray: callables without a cluster, and the whole on two processors of this machine (slow)."""

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import models
import pytest
from commandline import fails, process, run, tree
from PIL import Image

from vqcodec import codec, files, image

pytest.importorskip("ray", reason="needs the extra 'ray': pip install -e '.[ray]'")

import pyarrow as pa
import pyarrow.parquet
import ray.data
from pyarrow import fs

from vqcodec import distributed
from vqcodec.distributed import Compress, Decompress, Job, Outcome, dispatch, groups, places
from vqcodec.distributed.actors import Files
from vqcodec.distributed.groups import Converted, Converter
from vqcodec.errors import ImageError, VqcodecError, WeightsError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, of itself
WEIGHTS = str(Path(__file__).parent / "golden" / "tiny.safetensors")
COMPRESS = partial(Compress, weights=WEIGHTS)
DECOMPRESS = partial(Decompress, weights=WEIGHTS)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def png(seed: int, height: int = 24, width: int = 40, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(models.picture(height, width, seed)).convert(mode).save(out, "PNG")
    return out.getvalue()


def vqz(data: bytes) -> bytes:
    """What the codec makes of a picture without Ray."""
    return codec.compress(image.load(data, max_pixels=None), weights=WEIGHTS, device="cpu")


def write(name: str, data: bytes) -> bytes:
    files.write(name, data, overwrite=True)
    return data


def shard(name: str, members: dict[str, bytes]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(name, "w") as tar:
        for path, data in members.items():
            member = tarfile.TarInfo(path)
            member.size, member.mtime = len(data), 1234
            tar.addfile(member, io.BytesIO(data))


def members(name: str) -> dict[str, bytes]:
    with tarfile.open(name) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def make_here(jobs: list[Job], transcoder: partial, output: str, *, overwrite: bool = False) -> list[Outcome]:
    """What an actor does, in this process."""
    worker = Files(partial(transcoder, device="cpu"), output, overwrite)
    return [Outcome(**row) for row in worker(pa.Table.from_pylist([vars(job) for job in jobs])).to_pylist()]


class Recording(Compress):
    """`Compress` that tells how many files it is given at a time."""

    def __init__(self, *, calls: list[int], **settings: object) -> None:
        super().__init__(weights=WEIGHTS, **settings)
        self._calls = calls

    def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
        self._calls.append(len(files))
        return super().convert_many(files)


# Groups


class Lengths(Converter):
    """Takes each file for its own number of pixels, and makes nothing but the length of its group."""

    def pixels(self, file: bytes) -> int:
        return int(file)

    def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
        return [(b"%d" % len(files), ()) for _ in files]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["1"] * 7, "3 3 3 3 3 3 1"),  # so many files
        (["40", "60", "1"], "2 2 1"),  # so many pixels
        (["1", "101", "1"], "1 1 1"),  # one with too many
        (["0000000001", "0000000001", "1"], "2 2 1"),  # so many bytes
        (["none", "none", "100"], "3 3 3"),  # no pictures
        (["-60", "60", "40"], "- 2 2"),  # one that is not to be converted has no pixels
        (["-000000000000000000000", "1", "1"], "- 2 2"),  # but it has bytes
        (["1", "1", "-", "1", "-"], "2 2 - 1 -"),
        ([], ""),
    ],
)
def test_groups_within_limits(files: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_PIXELS", 100)
    monkeypatch.setattr(groups, "MOST_BYTES", 20)
    items = [(number, file.encode(), not file.startswith("-")) for number, file in enumerate(files)]
    made = list(Lengths().convert_each(iter(items), most_files=3))
    assert [(key, file) for key, file, _ in made] == [(key, file) for key, file, _ in items]
    assert " ".join("-" if result is None else result[0].decode() for _, _, result in made) == expected


@pytest.mark.parametrize("transcoder", [COMPRESS, DECOMPRESS])
def test_bad_files_of_a_group_stop_no_others(transcoder: partial) -> None:
    pictures = [png(1), png(2)]
    good = pictures if transcoder is COMPRESS else [vqz(picture) for picture in pictures]
    bad = [b"nothing", good[0][: len(good[0]) // 2], b""]
    made = transcoder().convert_many([bad[0], good[0], bad[1], bad[2], good[1]])
    assert [type(one) for one in made] == [type(made[0]), tuple, type(made[2]), type(made[3]), tuple]
    for error in (made[0], made[2], made[3]):
        assert isinstance(error, VqcodecError)
        assert error.__traceback__ is error.__context__ is None, "its frames would keep pictures in memory"
    expected = transcoder().convert_many([good[0]]) + transcoder().convert_many([good[1]])
    assert [made[1], made[4]] == expected


# Columns


def test_batch_of_pictures_and_back() -> None:
    good, grey = png(1), png(2, mode="L")
    table = pa.table(
        {
            "key": ["a", "b", "c", "d"],
            "jpg": pa.array([good, b"no picture", None, grey], pa.binary()),
            "label": pa.array([1, None, 3, 4], pa.int64()),
            "boxes": [[[1, 2]], [], None, [[3]]],
        }
    )
    made = COMPRESS("jpg", quality=60)(table)
    assert made.column_names == ["key", "jpg", "label", "boxes", "error", "notes"]
    for name in ("key", "label", "boxes"):
        assert made[name].equals(table[name]) and made[name].type == table[name].type
    expected = [codec.compress(image.load(data, max_pixels=None), quality=60, weights=WEIGHTS) for data in (good, grey)]
    assert made["jpg"].to_pylist() == [expected[0], None, None, expected[1]]
    first, bad, absent, last = made["error"].to_pylist()
    assert (first, absent, last) == (None, None, None)
    with pytest.raises(ImageError) as caught:
        image.load(b"no picture", max_pixels=None)
    assert bad == str(caught.value)

    back = DECOMPRESS("jpg")(made)
    assert back["error"].to_pylist() == [None, bad, None, None]
    restored = [image.save(codec.decode_picture(data, weights=WEIGHTS), ".png") for data in expected]
    assert back["jpg"].to_pylist() == [restored[0], None, None, restored[1]]


def test_notes_of_a_batch() -> None:
    damaged = vqz(png(1))[:-3]
    made = DECOMPRESS("data", partial=True)(pa.table({"data": [damaged, vqz(png(2))]}))
    picture = codec.decode_picture(damaged, weights=WEIGHTS, partial=True)
    assert picture.notes and made["notes"].to_pylist() == [list(picture.notes), []]
    assert made["error"].to_pylist() == [None, None]


def test_weights_that_are_missing_are_an_error_at_once() -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        Compress(weights="missing.safetensors")
    with pytest.raises(WeightsError, match="no natural look"):
        DECOMPRESS(look="natural")


# Files, without a cluster


def plan(*inputs: str, output: str = "out", kind: type = Compress, overwrite: bool = False) -> tuple[list[Job], int]:
    return distributed.plan(inputs, output, kind, overwrite=overwrite)


def touch(*names: str) -> None:
    for name in names:
        write(name, b"x")


def test_plan_mirrors_names_and_leaves_out_what_is_there() -> None:
    touch("in/a.png", "in/sub/B.JPG", "in/sub/c.tar", "in/.hidden/d.png", "in/e.txt", "single.webp")
    root, here = os.path.abspath("in"), os.getcwd()
    everything = [
        Job(root, "a.png", "a.vqz"),
        Job(root, "sub/B.JPG", "sub/B.vqz"),
        Job(root, "sub/c.tar", "sub/c.tar"),
        Job(here, "single.webp", "single.vqz"),
    ]
    assert plan("in", "single.webp") == (everything, 0)
    touch("out/a.vqz", "out/sub/c.tar", "out/other")
    assert plan("in/", "single.webp") == ([everything[1], everything[3]], 2)
    assert plan("in", "single.webp", overwrite=True) == (everything, 0)


@pytest.mark.parametrize("root", ["memory://plan/in", "local://{here}/in", "file://{here}/in"])
def test_plan_on_other_filesystems(root: str) -> None:
    root = root.format(here=os.getcwd())
    filesystem, base = places.open_filesystem(root)
    for name in ("b.png", "sub/a.jpg", ".hidden/d.png", "e.txt"):
        places.write(filesystem, f"{base}/{name}", io.BytesIO(b"x"))
    output = root.replace("/in", "/out")
    jobs = [Job(root, "b.png", "b.vqz"), Job(root, "sub/a.jpg", "sub/a.vqz")]
    assert plan(root, output=output) == (jobs, 0)
    filesystem, base = places.open_filesystem(output)
    places.write(filesystem, f"{base}/sub/a.vqz", io.BytesIO(b"x"))
    assert plan(root, output=output) == (jobs[:1], 1)


def test_pictures_that_differ_by_suffix_alone() -> None:
    touch("in/a.jpg", "in/a.png")
    assert [job.target for job in plan("in", output="out")[0]] == ["a.vqz", "a.png.vqz"]


def test_plan_does_not_take_what_it_made_for_an_input() -> None:
    touch("in/a.tar", "in/out/a.tar")
    assert plan("in", output="in/out", overwrite=True)[0] == [Job(os.path.abspath("in"), "a.tar", "a.tar")]


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["in"], "in", "the output {here}/in/a.tar would replace an input"),
        (["in"], "link", "the output {here}/link/a.tar would replace an input"),
        (["in", "b.png"], "out", "{here}/in/b.png and {here}/b.png would both become b.vqz"),
        (["empty"], "out", "folder {here}/empty holds no files named *.png "),
        (["nonsense://x"], "out", "Protocol not known: nonsense"),
    ],
)
def test_plans_that_cannot_be(inputs: list[str], output: str, message: str) -> None:
    touch("in/a.tar", "in/b.png", "b.png", "empty/x.txt")
    os.symlink("in", "link")
    with pytest.raises(ValueError) as caught:
        plan(*inputs, output=output)
    assert str(caught.value).startswith(message.format(here=os.getcwd()))


def test_uri_with_options() -> None:
    write("in/a.png", b"x")
    here, options = f"file://{os.getcwd()}", "?options=of-the-filesystem"
    for given in (f"{here}/in{options}", f"{here}/in/{options}", f"{here}/in/a.png{options}"):
        ((job,), _) = plan(given, output=f"{here}/out{options}")
        assert (job.name, job.target, job.source) == ("a.png", "a.vqz", f"{here}/in/a.png")
        assert places.open_filesystem(job.root)[1] == os.path.abspath("in")


def test_input_that_is_missing() -> None:
    for missing in ("missing", "memory://missing"):
        with pytest.raises(FileNotFoundError):
            plan(missing)


@pytest.mark.parametrize("place", ["{here}", "file://{here}", "local://{here}", "memory://there"])
def test_there_and_back_on_filesystems(place: str) -> None:
    place = place.format(here=os.getcwd())
    filesystem, base = places.open_filesystem(place)
    data = png(1)
    places.write(filesystem, f"{base}/in/sub/a.png", io.BytesIO(data))
    jobs, _ = plan(f"{place}/in", output=f"{place}/vqz")
    (outcome,) = make_here(jobs, COMPRESS, f"{place}/vqz")
    expected = vqz(data)
    assert outcome == Outcome(f"{place}/in/sub/a.png", len(data), len(expected), [], [])
    assert filesystem.open_input_stream(f"{base}/vqz/sub/a.vqz").read() == expected
    jobs, _ = plan(f"{place}/vqz", output=f"{place}/back", kind=Decompress)
    assert make_here(jobs, DECOMPRESS, f"{place}/back")[0].errors == []
    restored = image.save(codec.decode_picture(expected, weights=WEIGHTS), ".png")
    assert filesystem.open_input_stream(f"{base}/back/sub/a.png").read() == restored
    found = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    names = sorted(places.relative(info.path, base) for info in found if info.is_file)
    assert names == ["back/sub/a.png", "in/sub/a.png", "vqz/sub/a.vqz"], "no temporary file stays"


def test_bad_files_are_outcomes() -> None:
    write("in/bad.png", b"no picture")
    write("in/good.png", png(1))
    os.mkdir("out")
    write("out/taken.vqz", b"kept")
    root = os.path.abspath("in")
    jobs = [Job(root, name, target) for name, target in [("bad.png", "bad.vqz"), ("gone.png", "gone.vqz")]]
    jobs += [Job(root, "good.png", "taken.vqz"), Job(root, "good.png", "good.vqz")]
    bad, gone, taken, good = make_here(jobs, COMPRESS, os.path.abspath("out"))
    ((path, message),) = bad.errors
    assert path == f"{root}/bad.png" and "\n" not in message and message
    assert gone.errors[0][0] == f"{root}/gone.png" and gone.errors[0][1]
    assert taken == Outcome(f"{root}/good.png", 0, 0, [], [[f"{root}/good.png", "was there already, left as it is"]])
    assert good.errors == [] and good.written == Path("out/good.vqz").stat().st_size
    assert tree("out") == ["good.vqz", "taken.vqz"]
    assert Path("out/taken.vqz").read_bytes() == b"kept"
    assert make_here(jobs[2:3], COMPRESS, os.path.abspath("out"), overwrite=True)[0].notes == []
    assert Path("out/taken.vqz").read_bytes() == vqz(png(1))


def test_failure_while_writing_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write("in/a.png", png(1))
    write("out/a.vqz", b"old")

    def fail(source: object, target: object) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.shutil, "copyfileobj", fail)
    (outcome,) = make_here(plan("in", overwrite=True)[0], COMPRESS, os.path.abspath("out"), overwrite=True)
    assert outcome.errors == [[os.path.abspath("in/a.png"), "No space left on device"]] and outcome.written == 0
    assert tree("out") == ["a.vqz"] and Path("out/a.vqz").read_bytes() == b"old"


def test_shard_there_and_back() -> None:
    long = "folder/" + "long" * 40
    pictures = {"0.png": png(1), f"{long}.png": png(2)}
    others = {"0.json": b"{}", "1.txt": b"text", "bad.jpg": b"no picture", "0.vqz": b"taken"}
    shard("in/s-000.tar", {**others, **pictures})
    jobs, _ = plan("in")
    (outcome,) = make_here(jobs, COMPRESS, os.path.abspath("out"))
    source = os.path.abspath("in/s-000.tar")
    assert [path for path, _ in outcome.errors] == [f"{source}/bad.jpg", f"{source}/0.png"]
    assert outcome.errors[1][1] == "the shard has 0.vqz already"
    assert (outcome.read, outcome.written) == (Path(source).stat().st_size, Path("out/s-000.tar").stat().st_size)
    made = members("out/s-000.tar")
    assert made == {**others, "0.png": pictures["0.png"], f"{long}.vqz": vqz(pictures[f"{long}.png"])}
    with tarfile.open("out/s-000.tar") as tar:
        assert {member.mtime for member in tar} == {1234}

    jobs, _ = plan("out", output="back", kind=Decompress)
    (outcome,) = make_here(jobs, DECOMPRESS, os.path.abspath("back"))
    assert [path for path, _ in outcome.errors] == [os.path.abspath("out/s-000.tar/0.vqz")]
    restored = image.save(codec.decode_picture(made[f"{long}.vqz"], weights=WEIGHTS), ".png")
    assert members("back/s-000.tar") == {**others, "0.png": pictures["0.png"], f"{long}.png": restored}


def test_links_in_a_shard_follow_their_pictures() -> None:
    Path("in").mkdir()
    with tarfile.open("in/s-000.tar", "w") as tar:
        picture = tarfile.TarInfo("a.png")
        picture.size = len(png(1))
        tar.addfile(picture, io.BytesIO(png(1)))
        for name, linkname in (("b.png", "a.png"), ("c.png", "elsewhere.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, linkname
            tar.addfile(link)
    (outcome,) = make_here(plan("in")[0], COMPRESS, os.path.abspath("out"))
    assert outcome.errors == []
    with tarfile.open("out/s-000.tar") as tar:
        assert [(member.name, member.linkname) for member in tar] == [
            ("a.vqz", ""),
            ("b.vqz", "a.vqz"),
            ("c.png", "elsewhere.png"),
        ]


def test_order_in_a_shard_of_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_PIXELS", 3 * 24 * 40)
    kinds = [".png", ".txt", ".png", ".jpg", ".png", ".png", ".json", ".png", ".png", ".png"]
    content = {f"{9 - n}{kind}": png(n) if kind == ".png" else b"no picture" for n, kind in enumerate(kinds)}
    shard("in/s.tar", content)
    calls: list[int] = []
    (outcome,) = make_here(plan("in")[0], partial(Recording, calls=calls), os.path.abspath("out"))
    assert calls == [4, 3, 1], "with the one that is no picture"
    assert [path for path, _ in outcome.errors] == [os.path.abspath("in/s.tar/6.jpg")]
    expected = {
        name.replace(".png", ".vqz"): vqz(data) if name.endswith(".png") else data for name, data in content.items()
    }
    assert list(members("out/s.tar").items()) == list(expected.items())


def test_actor_that_dies_does_its_group_again_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_PIXELS", 2 * 24 * 40)
    data = [png(seed) for seed in range(6)]
    for number, one in enumerate(data):
        write(f"in/{number}.png", one)
    shard("in/s.tar", {"0.png": data[0], "1.png": data[1]})
    table = pa.Table.from_pylist([vars(job) for job in plan("in")[0]])

    class Death(BaseException):
        pass

    class Deadly(Compress):
        def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
            if data[3] in files:
                raise Death
            return super().convert_many(files)

    with pytest.raises(Death):
        Files(partial(Deadly, weights=WEIGHTS), os.path.abspath("out"), False)(table)
    assert tree("out") == ["0.vqz", "1.vqz"]
    with pytest.raises(Death):
        Files(partial(Deadly, weights=WEIGHTS), os.path.abspath("out"), False, restarted=lambda: True)(table)
    assert tree("out") == ["0.vqz", "1.vqz", "2.vqz"], "also what lies beside the deadly one in its group"

    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in tree("out")}
    calls: list[int] = []
    actor = Files(partial(Recording, calls=calls), os.path.abspath("out"), False, restarted=lambda: True)
    outcomes = actor(table).to_pylist()
    assert calls == [1] * 5
    assert [len(outcome["notes"]) for outcome in outcomes] == [1, 1, 1, 0, 0, 0, 0]
    assert not any(outcome["errors"] for outcome in outcomes)
    assert {name: os.stat(f"out/{name}").st_mtime_ns for name in before} == before
    assert [Path(f"out/{number}.vqz").read_bytes() for number in range(6)] == [vqz(one) for one in data]
    assert list(members("out/s.tar")) == ["0.vqz", "1.vqz"]

    shutil.rmtree("out")
    calls.clear()
    actor(table)
    assert calls == [2, 2, 2, 2], "in groups again"


_MEMBER = 3 * 512  # bytes of a member in the next test: a header, and two blocks for its content


@pytest.mark.parametrize(
    ("start", "stop", "instead"),
    [
        (1000, None, b""),  # cut in a member
        (_MEMBER + 100, None, b""),  # in a header
        (2 * _MEMBER, None, b""),  # between two members
        (2 * _MEMBER + 512, None, b""),  # after a header
        (_MEMBER, _MEMBER + 512, b"?" * 512),  # no header any more
        (_MEMBER, _MEMBER + 512, bytes(512)),  # looks like the end
    ],
)
def test_damaged_shard_makes_no_file(start: int, stop: int | None, instead: bytes) -> None:
    shard("in/s.tar", {name: b"x" * 1000 for name in ("0.txt", "1.txt", "2.txt")})
    data = Path("in/s.tar").read_bytes()
    write("in/s.tar", data[:start] + instead + (data[stop:] if stop else b""))
    (outcome,) = make_here(plan("in")[0], COMPRESS, os.path.abspath("out"))
    ((path, message),) = outcome.errors
    assert path == os.path.abspath("in/s.tar") and message.startswith("ReadError: ")
    assert outcome.written == 0 and not os.path.exists("out")


# The command line


@pytest.mark.parametrize(
    "arguments", [("in", "--ray"), ("in", "-o", "-", "--ray"), ("-", "-o", "out", "--ray"), ("-", "--ray", "local")]
)
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_ray_needs_names(command: str, arguments: tuple[str, ...]) -> None:
    ran = run(command, *arguments)
    message = f"--ray works on files and folders, and needs a folder for -o. (see vqcodec {command} --help)"
    fails(ran, 2, f"vqcodec: {message}")


def test_nothing_to_do_starts_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cluster", None)
    touch("in/a.png", "out/a.vqz")
    ran = run("compress", "in", "-o", "out", "--ray")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert ran.stderr == "vqcodec: 1 of 1 files are there already and stay (-f makes them again)\n"
    assert run("compress", "in", "-o", "out", "--quiet", "--ray").output == ""
    fails(run("compress", "gone", "-o", "out", "--ray"), 1, "vqcodec: gone: No such file or directory")
    ran = run("compress", "out", "-o", "new", "--ray")
    assert ran.exit_code == 2 and ran.stderr.startswith("vqcodec: folder ")


# The benchmark


def test_scale_tells_speed_from_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "imagecodecs"):
        pytest.importorskip(package, reason="needs the extra 'bench': pip install -e '.[bench]'")
    from bench import scale

    monkeypatch.setattr(scale, "_plain", lambda jobs, _, most: [5 + 0.5 * (n // most + 1) for n in range(len(jobs))])

    def on_ray(jobs: list[Job], weights: str | None, actors: int) -> list[float]:
        """Two actors, each with four pictures at a time, of which each takes it 0.6 s."""
        assert (actors, len(jobs)) == (2, 32)
        return [7 + 2.4 * (n // 8 + 1) for n in range(32)]

    monkeypatch.setattr(scale, "_on_ray", on_ray)
    output = tmp_path / "scale.json"
    assert scale.main(["--actors", "2", "--pictures", "32", "--size", "24x16", "-o", str(output)]) == 0
    rows = json.loads(output.read_text())["measurements"]
    assert [row["run"] for row in rows] == ["one by one", "in groups", "2 actors"]
    assert [row["start"] for row in rows] == [pytest.approx(5), pytest.approx(5), pytest.approx(7)]
    assert [row["seconds"] for row in rows] == [pytest.approx(0.5), pytest.approx(0.5 / 16), pytest.approx(0.3)]


# On a cluster


@pytest.mark.slow
def test_only_our_own_messages() -> None:
    write("in/a.png", png(0))
    write("in/bad.png", b"no picture")
    arguments = ("compress", "in", "-o", "out", "--weights", WEIGHTS, "--ray", "local")
    out, err = process("-m", "vqcodec", *arguments, text=True).communicate(timeout=300)
    bad, total = err.splitlines()
    assert out == "" and bad.startswith(f"vqcodec: {os.path.abspath('in/bad.png')}: ")
    assert total.startswith("vqcodec: 1 of 2 files done, 1 failed; ")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two processors of this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def deadly(once: bytes, always: bytes, mark: Path) -> partial:
    """`COMPRESS` that kills its process the first time that it is given one picture, and every time for another."""

    class Deadly(Compress):  # in a function, so that workers get its code: they cannot import this module
        def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
            if always in files or (once in files and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().convert_many(files)

    return partial(Deadly, weights=WEIGHTS)


@pytest.mark.slow
def test_cluster_makes_the_same_files_once(cluster: None) -> None:
    pictures = {f"{folder}/{seed}": png(seed) for folder in ("a", "b") for seed in range(3)}
    for name, data in pictures.items():
        write(f"in/{name}.png", data)
    write("in/bad.png", b"no picture")
    shard("in/s.tar", {"0.png": png(7), "0.json": b"{}"})
    command = ("compress", "in", "-o", "out", "--weights", WEIGHTS, "--ray")
    ran = run(*command)
    assert (ran.exit_code, ran.stdout) == (1, "")
    bad, total = ran.stderr.splitlines()
    assert bad.startswith(f"vqcodec: {os.path.abspath('in/bad.png')}: ")
    assert total.startswith("vqcodec: 7 of 8 files done, 1 failed; ")
    assert tree("out") == ["a/0.vqz", "a/1.vqz", "a/2.vqz", "b/0.vqz", "b/1.vqz", "b/2.vqz", "s.tar"]
    for name, data in pictures.items():
        assert Path(f"out/{name}.vqz").read_bytes() == vqz(data)
    assert members("out/s.tar") == {"0.vqz": vqz(png(7)), "0.json": b"{}"}

    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in tree("out")}
    os.unlink("in/bad.png")
    ran = run(*command)
    assert ran.exit_code == 0
    assert ran.stderr == "vqcodec: 7 of 7 files are there already and stay (-f makes them again)\n"
    assert {name: os.stat(f"out/{name}").st_mtime_ns for name in tree("out")} == before

    ran = run("decompress", "out", "-o", "file://" + os.path.abspath("back"), "--weights", WEIGHTS, "--ray", "--quiet")
    assert (ran.exit_code, ran.output) == (0, "")
    for name, data in pictures.items():
        restored = codec.decode_picture(vqz(data), weights=WEIGHTS)
        assert Path(f"back/{name}.png").read_bytes() == image.save(restored, ".png")


@pytest.mark.slow
def test_killed_actor_costs_nothing_and_a_deadly_picture_only_itself(cluster: None, tmp_path: Path) -> None:
    data = [png(seed) for seed in range(10)]
    for number, one in enumerate(data):
        write(f"in/{number}.png", one)
    transcoder = deadly(once=data[2], always=data[5], mark=tmp_path / "mark")
    jobs, _ = plan("in")
    outcomes = list(distributed.make(jobs, transcoder, output="out", overwrite=False))
    assert ray.data.DataContext.get_current().max_errored_blocks == 0, "other datasets still stop at errors"
    assert (tmp_path / "mark").exists()
    assert sorted(outcome.source for outcome in outcomes) == [os.path.abspath(f"in/{n}.png") for n in range(10)]
    assert [outcome.errors for outcome in outcomes if outcome.errors] == [
        [
            [
                os.path.abspath("in/5.png"),
                "not finished: 4 workers died of it or of a file beside it (memory, or a crash)",
            ]
        ]
    ]
    for number in {*range(10)} - {5}:
        assert Path(f"out/{number}.vqz").read_bytes() == vqz(data[number])
    assert not os.path.exists("out/5.vqz")


@pytest.mark.slow
def test_files_of_a_task_before_a_deadly_one_are_made(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "files_of_task", lambda count, actors: count)
    data = [png(seed) for seed in range(6)]
    for number, one in enumerate(data):
        write(f"in/{number}.png", one)
    transcoder = deadly(once=data[1], always=data[4], mark=tmp_path / "mark")
    outcomes = list(distributed.make(plan("in")[0], transcoder, output="out", overwrite=False))
    assert len(outcomes) == 6 and all("4 workers died of it" in outcome.errors[0][1] for outcome in outcomes)
    assert tree("out") == ["0.vqz", "1.vqz", "2.vqz", "3.vqz"]


@pytest.mark.slow
def test_dataset_of_a_shard(cluster: None) -> None:
    shard("in.tar", {"0.png": png(0), "0.cls": b"5", "1.png": b"no picture", "1.cls": b"7"})
    dataset = ray.data.read_webdataset(os.path.abspath("in.tar"), decoder=None).map_batches(
        Compress,
        fn_constructor_kwargs={"column": "png", "weights": WEIGHTS},
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    dataset.rename_columns({"png": "vqz"}).write_parquet(os.path.abspath("out"))
    first, second = sorted(pyarrow.parquet.read_table("out").to_pylist(), key=lambda row: row["__key__"])
    assert (first["vqz"], first["cls"], first["error"]) == (vqz(png(0)), b"5", None)
    assert (second["vqz"], second["cls"]) == (None, b"7") and "picture" in second["error"]
