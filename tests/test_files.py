import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vqcodec import files
from vqcodec.files import Job, check, find, plan, read, write


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())


def plan_compress(inputs: list[str], output: str | None = None) -> list[Job]:
    return plan(inputs, output, suffixes=files.PICTURE_SUFFIXES, new_suffix=".vqz")


# Folders


def test_folders_are_walked_in_order():
    touch("in/b.png", "in/a.JPG", "in/deep/er/c.webp", "in/notes.txt", "in/._a.jpg", "in/.hidden/d.png")
    assert find(["in"], files.PICTURE_SUFFIXES) == [
        ("in/a.JPG", "a.JPG"),
        ("in/b.png", "b.png"),
        ("in/deep/er/c.webp", "deep/er/c.webp"),
    ]


def test_named_files_are_taken_whatever_they_are_called():
    assert find(["x", ".y.png", "sub/z.txt"], (".vqz",)) == [("x", "x"), (".y.png", ".y.png"), ("sub/z.txt", "z.txt")]


def test_folder_without_files():
    touch("in/notes.txt")
    with pytest.raises(ValueError, match=r"folder in holds no files named \*\.vqz"):
        find(["in"], (".vqz",))


def test_folders_give_regular_files_only():
    touch("in/a.png", "elsewhere")
    os.mkfifo("in/pipe.png")
    os.symlink("../elsewhere", "in/link.png")
    os.symlink("nowhere", "in/lost.png")
    os.symlink(os.devnull, "in/null.png")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind("in/socket.png")
        assert [name for _, name in find(["in"], (".png",))] == ["a.png", "link.png", "lost.png"]


def test_folders_that_cannot_be_searched_are_listed(monkeypatch):
    touch("in/a.png", "in/closed/b.png", "in/open/c.png")
    scan = os.scandir

    def scandir(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [name for _, name in find(["in"], (".png",))] == ["a.png", "open/c.png", "closed"]
    assert find(["in/closed"], (".png",)) == [("in/closed", ".")]
    with pytest.raises(IsADirectoryError, match="'in/closed'"):
        read("in/closed")


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.mpo", "a.heic", "a.heif", "a.jxl"])
def test_names_of_pictures(name):
    touch(f"in/{name}")
    assert plan_compress(["in"]) == [Job(f"in/{name}", "in/a.vqz")]


# Names


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("photo.png", "photo.vqz"),
        ("dir.d/photo.JPEG", "dir.d/photo.vqz"),
        ("photo", "photo.vqz"),
        ("photo.2024", "photo.2024.vqz"),
        ("a.b.png", "a.b.vqz"),
        (".png", ".png.vqz"),
    ],
)
def test_derived_name(source, target):
    assert plan_compress([source]) == [Job(source, target)]


def test_derived_name_the_other_way():
    jobs = plan(["a/photo.vqz", "photo.bin"], None, suffixes=(".vqz",), new_suffix=".png")
    assert [job.target for job in jobs] == ["a/photo.png", "photo.bin.png"]


def test_named_output():
    assert plan_compress(["a.png"], "out.bin") == [Job("a.png", "out.bin")]
    assert plan_compress(["a.png"], "-") == [Job("a.png", "-")]


def test_folder_as_output():
    Path("out").mkdir()
    assert plan_compress(["in/a.png"], "out") == [Job("in/a.png", "out/a.vqz", "out")]
    touch("in/a.png", "in/sub/b.png")
    assert plan_compress(["in", "c.jpg"], "out") == [
        Job("in/a.png", "out/a.vqz", "out"),
        Job("in/sub/b.png", "out/sub/b.vqz", "out"),
        Job("c.jpg", "out/c.vqz", "out"),
    ]


def test_folder_without_output_stays_in_place():
    touch("in/a.png", "in/sub/b.png")
    assert [job.target for job in plan_compress(["in"])] == ["in/a.vqz", "in/sub/b.vqz"]


def test_pictures_that_differ_in_the_suffix_alone():
    touch("in/a.gif", "in/a.jpg", "in/a.jpg.png", "in/a.png", "in/a.vqz")
    jobs = plan_compress(["in"], "out")
    assert [job.target for job in jobs] == ["out/a.vqz", "out/a.jpg.vqz", "out/a.jpg.png.vqz", "out/a.png.vqz"]
    assert jobs[0].note == ""
    assert jobs[3].note == "becomes out/a.png.vqz, because in/a.gif becomes out/a.vqz"
    assert [job.target for job in plan_compress(["a.png", "a.jpg"])] == ["a.vqz", "a.jpg.vqz"]
    touch("out/a.vqz", "out/a.png.vqz")
    os.remove("in/a.gif")
    os.remove("in/a.jpg")
    assert plan_compress(["in"], "out")[1].target == "out/a.png.vqz", (
        "as before, and not out/a.vqz, which is of another"
    )
    with pytest.raises(ValueError, match=r"a\.jpg\.png and a\.jpg would both become a\.jpg\.vqz"):
        plan_compress(["a.gif", "a.jpg.png", "a.jpg"])


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.lists(st.from_regex(r"([ab]{1,2}/)?[ab](\.png|\.JPG|\.vqz|\.txt|\.){1,3}", fullmatch=True), unique=True))
def test_plans_of_folders(names):
    """Every picture goes to a place of its own, which is not that of a picture."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, "in", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        pictures = {os.path.join(folder, "in", name) for name in names if name.lower().endswith((".png", ".jpg"))}
        assume(pictures)
        for output in (None, os.path.join(folder, "out")):
            jobs = plan_compress([os.path.join(folder, "in")], output)
            targets = [job.target for job in jobs]
            assert {job.source for job in jobs} == pictures and len(jobs) == len(pictures)
            assert len(set(targets)) == len(jobs) and pictures.isdisjoint(targets)
            assert all(target.startswith(os.path.join(folder, "out" if output else "in", "")) for target in targets)


def test_standard_input():
    assert plan_compress(["-"]) == [Job("-", "-")]
    assert plan_compress(["-"], "out.vqz") == [Job("-", "out.vqz")]


def test_arguments_that_make_no_sense():
    touch("in/a.png")
    Path("out").mkdir()
    Path("file").touch()
    for inputs, output, message in [
        (["-", "a.png"], None, "cannot be combined"),
        (["-"], "out", "no name"),
        (["a.png", "b.png"], "-", "cannot go to standard output"),
        (["in"], "-", "cannot go to standard output"),
        (["a.png", "b.png"], "file", "file is not a folder"),
        (["in"], "file", "file is not a folder"),
        (["a.png", "a.png"], None, "a.png and a.png would both become a.vqz"),
        (["a.png", "./a.png"], None, "a.png and ./a.png would both become ./a.vqz"),
        (["x/a.png", "y/a.png"], "out", "would both become out/a.vqz"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_compress(inputs, output)


def test_inputs_are_never_outputs():
    touch("a.png", "b.png")
    os.symlink("a.png", "soft.png")
    os.link("a.png", "hard.png")
    for output in ("a.png", "./a.png", "soft.png", "hard.png"):
        with pytest.raises(ValueError, match="would replace the input a.png"):
            plan_compress(["a.png"], output)
    touch("c.vqz")
    with pytest.raises(ValueError, match=r"the output c\.vqz would replace the input c\.vqz"):
        plan_compress(["c.png", "c.vqz"])


# Checks


def test_check_of_sources():
    with pytest.raises(FileNotFoundError) as caught:
        check(Job("a.png", "-"), overwrite=False)
    assert caught.value.filename == "a.png"
    touch("a.png")
    check(Job("a.png", "a.vqz"), overwrite=False)
    check(Job("-", "-"), overwrite=False)


def test_check_of_targets():
    touch("a.png", "there")
    Path("folder").mkdir()
    with pytest.raises(FileExistsError, match="-f would overwrite it: 'there'"):
        check(Job("a.png", "there"), overwrite=False)
    check(Job("a.png", "there"), overwrite=True)
    check(Job("a.png", os.devnull), overwrite=False)
    for target, error in [
        ("folder", IsADirectoryError),
        ("missing/x", FileNotFoundError),
        ("there/x", NotADirectoryError),
    ]:
        with pytest.raises(error):
            check(Job("a.png", target), overwrite=True)


def test_check_of_read_only_targets(monkeypatch):
    """os.replace could replace them, because only the folder's permissions count for that."""
    touch("a.png", "x")
    monkeypatch.setattr(os, "access", lambda path, mode: path != "x")
    with pytest.raises(PermissionError, match="'x'"):
        check(Job("a.png", "x"), overwrite=True)


def test_check_of_a_folder_to_be_filled():
    touch("a.png")
    Path("out").mkdir()
    check(Job("a.png", "out/new/a.vqz", "out"), overwrite=False)


def test_check_of_permissions(monkeypatch):
    touch("a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    with pytest.raises(PermissionError):
        check(Job("a.png", "a.vqz"), overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(PermissionError) as caught:
        check(Job("a.png", "a.vqz"), overwrite=False)
    assert caught.value.filename == "a.png"


@pytest.mark.parametrize(
    ("source", "target", "current"),
    [
        (5, 5, True),
        (5, 6, True),
        (5, 4, False),
        (3_999_999_999, 2_000_000_000, True),  # FAT keeps even seconds
        (4_000_000_000, 2_000_000_000, False),
        (3_999_999_999, 3_000_000_000, True),  # HFS+ keeps seconds
        (3_999_999_999, 3_990_000_000, True),  # exFAT
        (3_999_999_999, 3_999_999_900, True),  # NTFS
        (3_999_999_999, 3_999_999_998, False),
    ],
)
def test_targets_that_are_as_new_as_their_sources(source, target, current):
    touch("a.png", "a.vqz")
    os.utime("a.png", ns=(source, source))
    os.utime("a.vqz", ns=(target, target))
    assert files.is_current(Job("a.png", "a.vqz")) == current


def test_what_is_never_current():
    touch("a.png", "-")
    os.symlink("nowhere", "lost")
    for job in (Job("a.png", "b"), Job("b", "a.png"), Job("a.png", os.curdir), Job("a.png", "lost"), Job("a.png", "-")):
        assert not files.is_current(job)
    assert not files.is_current(Job("a.png", os.devnull))


# Writing


def test_write_and_read():
    write("new/folder/x", b"data", overwrite=False)
    assert read("new/folder/x") == b"data"
    assert os.listdir("new/folder") == ["x"]


def test_mode_is_what_the_umask_says():
    before = os.umask(0o027)
    try:
        write("x", b"data", overwrite=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("x").st_mode) == 0o640


def test_a_replaced_file_keeps_its_mode():
    touch("x")
    os.chmod("x", 0o600)
    write("x", b"data", overwrite=True)
    assert stat.S_IMODE(os.stat("x").st_mode) == 0o600 and read("x") == b"data"


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd, which Unix has")
def test_a_pipe_by_its_number():
    end, number = os.pipe()
    try:
        write(f"/dev/fd/{number}", b"data", overwrite=False)
        assert os.read(end, 9) == b"data"
    finally:
        os.close(end)
        os.close(number)


def test_existing_files_are_kept_unless_told():
    touch("x")
    with pytest.raises(FileExistsError):
        write("x", b"new", overwrite=False)
    assert read("x") == b"x"
    write("x", b"new", overwrite=True)
    assert read("x") == b"new"


def test_times_are_those_of_another_file(monkeypatch):
    touch("x")
    os.utime("x", ns=(10**18 + 1, 10**18 + 2))
    write("y", b"data", overwrite=False, like=files.status("x"))
    assert (os.stat("y").st_atime_ns, os.stat("y").st_mtime_ns) == (10**18 + 1, 10**18 + 2)
    assert files.status("-") is files.status(os.devnull) is None

    def utime(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", utime)
    write("z", b"data", overwrite=False, like=files.status("x"))
    assert read("z") == b"data"


def fail_with(error: BaseException):
    """A stand-in for os.replace or os.link that checks what it is given and fails."""

    def failing(source, target):
        assert Path(source).read_bytes() == b"new"
        assert os.path.dirname(source) == os.path.dirname(target)
        raise error

    return failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), OSError("odd")])
def test_failure_leaves_everything_as_it_was(monkeypatch, error):
    touch("x")
    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, fail_with(error))
    for path, overwrite in (("x", True), ("y", False)):
        with pytest.raises(type(error)) as caught:
            write(path, b"new", overwrite=overwrite)
        assert os.listdir() == ["x"]
        assert Path("x").read_bytes() == b"x"
        if isinstance(error, OSError) and error.errno:
            assert caught.value.filename == path


def test_file_that_appears_in_the_meantime_is_kept(monkeypatch):
    touch("x")
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # what was true before
    with pytest.raises(FileExistsError, match="-f would overwrite it: 'x'"):
        write("x", b"new", overwrite=False)
    monkeypatch.setattr(os, "link", fail_with(PermissionError(1, "Operation not permitted")))
    with pytest.raises(FileExistsError, match="-f would overwrite it: 'x'"):
        write("x", b"new", overwrite=False)
    assert os.listdir() == ["x"]
    assert read("x") == b"x"


def test_file_system_without_hard_links(monkeypatch):
    monkeypatch.setattr(os, "link", fail_with(PermissionError(1, "Operation not permitted")))
    write("x", b"new", overwrite=False)
    assert os.listdir() == ["x"]
    assert read("x") == b"new"


def test_file_that_takes_less_than_it_is_given(monkeypatch):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    monkeypatch.setattr(files, "open", lambda name, mode, **_: Slow(name, mode), raising=False)
    write("x", b"all of it", overwrite=True)
    assert read("x") == b"all of it"


def test_standard_output_that_takes_less_than_it_is_given():
    code = "import resource; from vqcodec import files; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
    code += "files.write('-', bytes(5000), overwrite=True)"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    for unbuffered in ("", "1"):
        environment["PYTHONUNBUFFERED"] = unbuffered
        with open("out", "wb") as out:
            command = [sys.executable, "-c", code]
            ran = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=environment, check=False)
        assert ran.returncode == 1 and b"OSError: [Errno 27] File too large" in ran.stderr


def test_full_disk_leaves_everything_as_it_was():
    touch("x")
    code = "import resource; from vqcodec import files; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
    code += "files.write('x', bytes(5000), overwrite=True)"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert ran.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large: 'x'"
    assert os.listdir() == ["x"]
    assert Path("x").read_bytes() == b"x"


def test_links_are_followed():
    touch("real/x")
    os.symlink("real/x", "link")
    write("link", b"new", overwrite=True)
    assert os.path.islink("link")
    assert read("real/x") == b"new"


def test_devices_are_written_to_in_place():
    write(os.devnull, b"data", overwrite=False)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_full_device():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write("/dev/full", b"data", overwrite=True)


def test_links_across_file_systems():
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(".").st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.symlink(os.path.join(folder, "x"), "link")  # there is no such file yet
        for data in (b"first", b"second"):
            write("link", data, overwrite=data == b"second")
            assert os.listdir(folder) == ["x"] and os.listdir() == ["link"]
            assert os.path.islink("link") and read("link") == data
        with pytest.raises(FileExistsError):
            write("link", b"third", overwrite=False)


def test_standard_streams():
    code = "import sys; from vqcodec import files; files.write('-', files.read('-')[::-1], overwrite=False)"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    out = subprocess.check_output([sys.executable, "-c", code], input=b"\r\n\0\xff", env=environment)
    assert out == b"\xff\0\n\r"


def test_files_needs_the_standard_library_only():
    code = "import sys, vqcodec; had = {*sys.modules}; import vqcodec.files; print(*({*sys.modules} - had))"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    others = {name.partition(".")[0] for name in ran.stdout.split()} - sys.stdlib_module_names
    assert others == {"vqcodec"}


def test_output_folder_that_is_not_there_yet() -> None:
    for inputs, output in ((["a.png", "b.png"], "new/deep"), (["a.png"], "new/deep/")):
        Path("a.png").touch()
        job = plan_compress(inputs, output)[0]
        assert os.path.normpath(job.target) == os.path.join("new", "deep", "a.vqz")
        check(job, overwrite=False)
        write(job.target, b"x", overwrite=False)
        assert Path("new/deep/a.vqz").read_bytes() == b"x"
        shutil.rmtree("new")
