"""The studio behind its server, with tiny weights."""

import copy
import socket
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
from commandline import fails, process, run
from PIL import Image

from vqcodec import codec, image, metrics, weights
from vqcodec.errors import VqcodecError
from vqcodec.studio import page, rivals, session
from vqcodec.studio.session import Studio
from vqcodec.studio.worker import SupersededError

for module, install in (("starlette", "'vqcodec[studio]'"), ("uvicorn", "'vqcodec[studio]'"), ("httpx2", "httpx2")):
    pytest.importorskip(module, reason=f"needs {module}: pip install {install}")

from starlette.testclient import TestClient

from vqcodec.studio import server

WEIGHTS = Path(__file__).parent / "golden" / "tiny.safetensors"
HOST = "127.0.0.1:8000"
SETTINGS = {"quality": 60, "effort": 1, "tune": "psnr", "look": "faithful"}


def client_of(studio) -> TestClient:
    return TestClient(server.application(studio, 8000), base_url=f"http://{HOST}", headers={"Origin": f"http://{HOST}"})


@pytest.fixture
def studio():
    return Studio(str(WEIGHTS))


@pytest.fixture
def client(studio):
    with client_of(studio) as client:
        yield client


@pytest.fixture(scope="module")
def photo():
    return models.picture(50, 75, seed=7)


def png_of(pixels, **options) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def opened(client, data: bytes, name: str = "photo.png") -> int:
    answer = client.post("/open", params={"name": name}, content=data)
    assert answer.status_code == 200, answer.text
    return answer.json()["number"]


def asked(client, path: str, **question):
    answer = client.post(path, json=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels_at(client, source: str):
    answer = client.get(source)
    assert answer.headers["content-type"] == "image/png"
    return image.load(answer.content, max_pixels=None).pixels


def test_a_picture_is_compressed_and_compared(client, photo):
    data = png_of(photo)
    number = opened(client, data)
    told = asked(client, "/render", number=number, **SETTINGS)
    expected = codec.compress(photo, quality=60, weights=WEIGHTS, tune="psnr")
    restored = codec.decode_picture(expected, weights=WEIGHTS).pixels
    original, result = told["pictures"]
    assert (told["quality"], told["bytes"]) == (60, len(expected))
    assert client.get(result["src"].replace(".png", ".vqz")).content == expected
    assert np.array_equal(pixels_at(client, original["src"]), photo)
    assert np.array_equal(pixels_at(client, result["src"]), restored)
    assert original["figures"] == {"Bytes": f"{len(data):,}", "Bits per pixel": f"{8 * len(data) / 3750:.4f}"}
    figures = result["figures"]
    assert figures["PSNR"] == f"{metrics.psnr(photo, restored):.2f} dB"
    assert figures["Bits per pixel"] == f"{8 * len(expected) / 3750:.4f}"
    assert list(figures)[3:] == ["SSIMULACRA2", "Compressed in", "Decompressed in"]
    assert (original["width"], original["height"]) == (result["width"], result["height"]) == (75, 50)

    rival = asked(client, "/compare", number=number, rival="AVIF")
    assert rival["name"] == "AVIF" and pixels_at(client, rival["src"]).shape == photo.shape
    assert 0.5 < int(rival["figures"]["Bytes"].replace(",", "")) / len(expected) < 2


def test_metadata_count_for_the_file_but_not_for_its_rival(client, photo):
    exif = Image.Exif()
    exif[0x010E] = "a description " * 300
    told = []
    for data in (png_of(photo), png_of(photo, exif=exif)):
        number = opened(client, data)
        size = asked(client, "/render", number=number, **SETTINGS)["bytes"]
        told.append((size, asked(client, "/compare", number=number, rival="AVIF")["figures"]["Bytes"]))
    (plain, rival), (described, same_rival) = told
    assert described > plain + 4000 and same_rival == rival


def test_a_grey_picture_with_notes(client, photo, recwarn):
    """A rival of it is grey as well, and what the page says of it is no warning."""
    number = opened(client, png_of((photo[:, :, 0].astype(np.uint16) << 8) + 7))
    asked(client, "/render", number=number, **SETTINGS)
    rival = asked(client, "/compare", number=number, rival="AVIF")
    assert Image.open(BytesIO(client.get(rival["src"]).content)).mode == "L"
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_a_rendering_that_fails_leaves_the_file_of_the_last_one(client, photo, monkeypatch):
    number = opened(client, png_of(photo))
    source = asked(client, "/render", number=number, **SETTINGS)["pictures"][1]["src"].replace(".png", ".vqz")
    before = client.get(source).content

    def fail(*arguments, **options):
        raise VqcodecError("no room")

    monkeypatch.setattr(codec, "decode_picture", fail)
    answer = client.post("/render", json={"number": number, **SETTINGS, "quality": 20})
    assert answer.status_code != 200 and client.get(source).content == before


def test_a_target_size(client, photo):
    number = opened(client, png_of(photo))
    size = asked(client, "/render", number=number, **SETTINGS)["bytes"]
    told = asked(client, "/render", number=number, **SETTINGS | {"quality": None, "size": 0.8 * size})
    assert told["bytes"] == pytest.approx(0.8 * size, rel=0.05) and told["quality"] < 60


def test_another_look_is_not_compressed_again(studio, client, photo, monkeypatch):
    number = opened(client, png_of(photo))
    first = asked(client, "/render", number=number, **SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(codec, "compress", None)
        again = asked(client, "/render", number=number, **SETTINGS)
    assert again["bytes"] == first["bytes"]
    assert again["pictures"][1]["src"] != first["pictures"][1]["src"], "or the browser would show the old one"
    assert asked(client, "/render", number=number, **SETTINGS | {"quality": 9})["bytes"] < first["bytes"]


def test_a_search_that_nobody_waits_for_ends(studio, photo):
    def check():
        raise SupersededError

    studio.open("photo.png", png_of(photo))
    with pytest.raises(SupersededError):
        studio.render(1, SETTINGS | {"effort": 3}, check)
    assert studio.file(1, "result.vqz") is None


def test_a_vqz_file_is_opened(client, photo):
    data = codec.compress(photo, quality=60, weights=WEIGHTS)
    number = opened(client, data, "photo.vqz")
    assert client.get("/state").json()["opened"] == {"number": number, "name": "photo.vqz", "vqz": True, "notes": []}
    (picture,) = asked(client, "/render", number=number)["pictures"]
    assert picture["name"] == "Faithful look"
    assert np.array_equal(pixels_at(client, picture["src"]), np.asarray(codec.decompress(data, weights=WEIGHTS)))


@pytest.fixture
def everything(tmp_path):
    """Weights with a visual tuning and a natural look."""
    path = models.tuned_weights(tmp_path)
    model = weights.load(path)
    vqvae = copy.deepcopy(model.vqvae)
    for part in vqvae.renderer().values():
        for parameter in part.parameters():
            parameter.mul_(0.9)
    weights.save_look(path.with_suffix(".natural.safetensors"), model.config, vqvae, model.id.hex(), {})
    return path


def test_a_vqz_file_is_opened_in_both_looks(everything, photo):
    data = codec.compress(photo, quality=10, weights=everything)
    with client_of(Studio(str(everything))) as client:
        opened(client, data, "photo.vqz")
        first, second = asked(client, "/render", number=1)["pictures"]
        assert (first["name"], second["name"]) == ("Faithful look", "Natural look")
        assert not np.array_equal(pixels_at(client, first["src"]), pixels_at(client, second["src"]))


def test_what_can_be_chosen(client, everything):
    told = client.get("/state").json()
    assert (told["tunes"], told["looks"], told["opened"]) == (["psnr"], ["faithful"], None)
    assert told["rivals"] == rivals.available()
    told = Studio(str(everything)).describe()
    assert (told["tunes"], told["looks"]) == (["visual", "psnr"], ["faithful", "natural"])


def test_names_and_metadata_of_files(client, photo):
    exif = Image.Exif()
    exif[0x010E] = "at home"
    answer = client.post("/open", params={"name": "../a/<b>.png"}, content=png_of(photo, exif=exif))
    assert answer.json() == {"number": 1, "name": "<b>.png", "vqz": False, "notes": []}
    assert b"at home" not in client.get("/files/1/original.png").content
    for gone in ("/files/2/original.png", "/files/1/result.png", "/files/1/..%2Fstudio.py", "/studio.py"):
        assert client.get(gone).status_code == 404


def test_files_that_cannot_be_opened(client, photo, monkeypatch):
    number = opened(client, png_of(photo))
    vqz = codec.compress(photo, weights=WEIGHTS)
    assert client.post("/open", params={"name": "x"}, content=vqz[:-1]).status_code == 422
    monkeypatch.setattr(session, "MAX_PIXELS", 3749)
    monkeypatch.setattr(server, "MAX_BYTES", 100_000)
    for data, status, line in (
        (b"nonsense", 422, "not a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM picture, or cut short"),
        (b"", 422, "not a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM picture, or cut short"),
        (png_of(photo), 422, "the picture has 75 x 50 = 3750 pixels, the limit is 3749"),
        (vqz, 422, "the picture has 75 x 50 = 3750 pixels, the limit is 3749"),
        (bytes(100_001), 413, "the file is larger than the limit of 100,000 bytes"),
    ):
        answer = client.post("/open", params={"name": "x"}, content=data)
        assert answer.status_code == status and answer.json()["error"].startswith(line), answer.text
    assert client.get("/state").json()["opened"]["number"] == number, "the last one stays open"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"quality": 0}, "the quality must be an integer from 1 to 100, got 0"),
        ({"quality": "50"}, "the quality must be an integer from 1 to 100, got '50'"),
        ({"quality": None}, "the size must be a number of bytes above 0, got None"),
        ({"quality": None, "size": 0}, "the size must be a number of bytes above 0, got 0"),
        ({"quality": None, "size": True}, "the size must be a number of bytes above 0, got True"),
        ({"effort": 10}, "the effort must be an integer from 1 to 9, got 10"),
        ({"tune": "pretty"}, "tune must be one of visual, psnr, got 'pretty'"),
        ({"look": ["x"]}, "look must be one of faithful, natural, got ['x']"),
        ({"look": "natural"}, "no natural look for the weights"),
        ({"tune": "visual"}, "these weights have no visual tuning"),
        ({"number": 5}, "another picture has been opened since"),
    ],
)
def test_settings_out_of_range(client, photo, change, line):
    number = opened(client, png_of(photo))
    answer = client.post("/render", json={"number": number} | SETTINGS | change)
    assert answer.status_code == 422 and answer.json()["error"].startswith(line), answer.text


def test_questions_that_make_no_sense(client, photo):
    for body in (b"", b"{", b"[1]", b'{"number": "1"}', b"\xff"):
        assert client.post("/render", content=body).status_code == 400
    assert client.post("/render", content=bytes(10_001)).status_code == 413
    number = opened(client, png_of(photo))
    assert client.post("/compare", json={"number": number, "rival": "AVIF"}).status_code == 422, "nothing compressed"
    asked(client, "/render", number=number, **SETTINGS)
    for rival in ("JPEG", None, ["AVIF"], {}):
        assert client.post("/compare", json={"number": number, "rival": rival}).status_code == 422
    assert client.get("/open").status_code == 405


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SupersededError(), 409, "a newer request has come"),
        (MemoryError(), 507, "not enough memory"),
        (VqcodecError("one\ntwo"), 422, "one"),
    ],
)
def test_errors_are_told_in_a_line(error, status, line):
    def render(number, asked, check):
        raise error

    with client_of(SimpleNamespace(render=render)) as client:
        answer = client.post("/render", json={"number": 1})
    assert (answer.status_code, answer.json()) == (status, {"error": line})


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 200),
        ("GET", {"Host": "localhost:8000"}, 200),
        ("GET", {"Host": "evil.example:8000"}, 403),
        ("GET", {"Host": "127.0.0.1"}, 403),
        ("GET", {"Host": "127.0.0.1:8001"}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
        ("GET", {"Origin": f"http://{HOST}"}, 200),
        ("POST", {}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "http://127.0.0.1:8001"}, 403),
        ("POST", {"Origin": f"https://{HOST}"}, 403),
        ("POST", {"Origin": "http://localhost:8000"}, 403),
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ("POST", {"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 422),
        ("POST", {"Origin": f"http://{HOST}"}, 422),
    ],
    ids=str,
)
def test_only_the_page_itself_is_answered(studio, method, headers, status):
    with TestClient(server.application(studio, 8000), base_url=f"http://{HOST}") as client:
        answer = client.request(method, "/state" if method == "GET" else "/open", headers=headers, content=b"x")
    assert answer.status_code == status
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["studio.html", "studio.js", "studio.css", "viewer.js", "viewer.css"])
def test_the_page_comes_from_here_alone(client, name):
    answer = client.get("/" if name == "studio.html" else f"/{name}")
    assert answer.status_code == 200 and answer.text == page.asset(name)
    assert "://" not in answer.text and "@import" not in answer.text


def test_the_command_without_the_extra():
    code = "import sys; sys.modules['uvicorn'] = None; from vqcodec.cli import main; main()"
    ran = process("-c", code, "studio")
    line = b"vqcodec: studio: uvicorn is not installed (pip install 'vqcodec[studio]')\n"
    assert ran.communicate() == (b"", line) and ran.returncode == 1


def test_the_command_serves_a_picture(photo, tmp_path, monkeypatch):
    (tmp_path / "photo.png").write_bytes(png_of(photo))
    seen = []
    monkeypatch.setattr(
        server, "serve", lambda studio, port, on_start: seen.append((studio.describe()["opened"], port))
    )
    fails(run("studio", str(tmp_path / "photo.png"), "--weights", str(WEIGHTS), "--port", "8000"), 0)
    assert seen == [({"number": 1, "name": "photo.png", "vqz": False, "notes": ()}, 8000)]
    fails(run("studio", "no.png", "--weights", str(WEIGHTS)), 1, "vqcodec: no.png: No such file or directory")
    assert len(seen) == 1


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run("studio", "--no-browser", "--weights", str(WEIGHTS), "--port", str(port))
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"vqcodec: port {port}: Address already in use") and ran.stderr.count("\n") == 1
