"""The pages in a real browser, by mouse, wheel, keys and touch: what they show is read from screenshots."""

import re
import shutil
import signal
from io import BytesIO
from pathlib import Path

import models
import numpy as np
import pytest
from commandline import fails, process, run
from PIL import Image

from vqcodec import codec

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a Chromium on the path, the Debian package chromium for example", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WEIGHTS = Path(__file__).parent / "golden" / "tiny.safetensors"
RED, BLUE, MAT = (200, 30, 30), (30, 30, 200), (196, 196, 196)


@pytest.fixture(scope="module")
def browser():
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
    ):
        yield browser


@pytest.fixture
def tab(browser):
    """An empty page, in which errors of scripts and requests of other hosts fail the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, has_touch=True, color_scheme="light")
    context.set_default_timeout(60_000)
    tab, problems = context.new_page(), []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: problems.append("dialog"))
    tab.on("request", lambda request: problems.append(request.url) if foreign(request.url) else None)
    yield tab
    context.close()
    assert problems == []


def foreign(url: str) -> bool:
    return not re.match(r"file:|data:|blob:http://127\.0\.0\.1:|http://127\.0\.0\.1:", url)


def colours(tab, *shares: float, row: float = 0.5) -> list[tuple[int, ...]]:
    """The colours that the stage shows, at shares of its width and height."""
    with Image.open(BytesIO(tab.locator(".stage").screenshot())) as shot:
        rgb = shot.convert("RGB")
        return [rgb.getpixel((int(share * rgb.width), int(row * rgb.height))) for share in shares]


def drag(tab, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press the mouse at one place of the stage and release it at another, both as shares of its sides."""
    box = tab.locator(".stage").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    tab.mouse.move(*points[0])
    tab.mouse.down()
    tab.mouse.move(*points[1], steps=3)
    tab.mouse.up()


def zoom_of(tab) -> int:
    return int(tab.locator(".zoom output").inner_text().split()[0])


def split_of(tab) -> int:
    return int(tab.locator(".handle").get_attribute("aria-valuenow"))


def test_the_page_of_compare(tab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stripes = np.where(np.arange(300) % 2, 0, 255)[None, :, None]
    hostile = "<script>alert(1)<!--.png"
    Image.new("RGB", (300, 200), RED).save("red.png")
    Image.new("RGB", (300, 200), BLUE).save("blue.png")
    Image.fromarray(np.broadcast_to(stripes, (200, 300, 3)).astype(np.uint8)).save(hostile)
    fails(run("compare", "red.png", "blue.png", hostile, "--html", "out.html"), 0)
    tab.goto((tmp_path / "out.html").as_uri())

    assert tab.locator(".stage .name").all_inner_texts() == ["red.png", "blue.png"]
    assert tab.locator("td").first.inner_text() == "red.png" and tab.locator("tr").count() == 4
    assert colours(tab, 0.01, 0.45, 0.55) == [MAT, RED, BLUE]
    drag(tab, (0.5, 0.2), (0.6, 0.2))  # the handle
    assert split_of(tab) == 60 and colours(tab, 0.55, 0.65) == [RED, BLUE]
    tab.locator(".handle").focus()
    for key in ["ArrowLeft"] * 15:
        tab.keyboard.press(key)
    assert split_of(tab) == 30 and colours(tab, 0.35) == [BLUE]

    whole = zoom_of(tab)
    tab.locator(".stage").hover(position={"x": 600, "y": 200})
    tab.mouse.wheel(0, -600)
    tab.locator(".stage.magnified").wait_for()
    assert zoom_of(tab) > 2 * whole
    tab.keyboard.press("1")
    assert zoom_of(tab) == 100
    tab.keyboard.press("+")
    assert zoom_of(tab) == 125
    tab.keyboard.press("0")
    assert zoom_of(tab) == whole
    tab.click("button.actual")
    assert zoom_of(tab) == 100

    touch = tab.context.new_cdp_session(tab)
    box = tab.locator(".stage").bounding_box()
    x, y = box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2
    for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 160), ("touchEnd", None)):
        points = [] if apart is None else [{"x": x + side * apart, "y": y, "id": side + 1} for side in (-1, 1)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert 350 < zoom_of(tab) < 450, "two fingers four times as far apart"

    tab.select_option("select.right", hostile)
    assert tab.locator(".stage .name").all_inner_texts() == ["red.png", hostile]
    for _ in range(4):
        tab.click("button.in")
    with Image.open(BytesIO(tab.locator(".stage").screenshot())) as shot:
        shown = np.asarray(shot.convert("RGB"))[shot.height // 2, -300:-100]
    assert set(map(tuple, shown.tolist())) == {(0, 0, 0), (255, 255, 255)}, "pixels are not smoothed"

    tab.select_option("select.right", "blue.png")
    for _ in range(6):
        drag(tab, (0.8, 0.5), (0.35, 0.5))
    assert colours(tab, 0.98) == [BLUE], "the picture does not leave the stage"


def png_of(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def address():
    """That of a studio with tiny weights, which Ctrl-C ends in the end."""
    for module in ("starlette", "uvicorn"):
        pytest.importorskip(module, reason="needs pip install 'vqcodec[studio]'")
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # which background jobs lack
    code += "from vqcodec.cli import main; main()"
    ran = process("-c", code, "studio", "--no-browser", "--weights", str(WEIGHTS))
    found = re.search(rb"http://127\.0\.0\.1:\d+", ran.stderr.readline())
    yield found[0].decode()
    ran.send_signal(signal.SIGINT)
    assert ran.communicate(timeout=60) == (b"", b"") and ran.returncode == 0


def results(tab) -> dict[str, list[str]]:
    """The table, once nothing is being worked on."""
    tab.locator("#busy").wait_for(state="hidden")
    rows = [row.locator("td").all_inner_texts() for row in tab.locator("tr").all()[1:]]
    return {name: figures for name, *figures in rows}


def move_quality(tab, *qualities: int) -> None:
    for quality in qualities:
        tab.fill("#quality", str(quality))
    tab.wait_for_timeout(300)  # it waits for the last move


def test_the_studio(tab, address):
    asked = []
    tab.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    photo = models.picture(50, 75, seed=7)
    tab.goto(address)
    tab.locator("#tune option").wait_for(state="attached")
    picture = {"name": "photo.png", "mimeType": "image/png", "buffer": png_of(photo)}
    tab.set_input_files("#file", picture)
    tab.locator("#download").wait_for()
    shown = results(tab)
    expected = codec.compress(photo, quality=50, tune="psnr", weights=WEIGHTS)
    assert list(shown) == ["Original", "vqcodec", "AVIF"]
    assert shown["vqcodec"][0] == f"{len(expected):,}" and re.fullmatch(r"\d\d\.\d\d dB", shown["vqcodec"][2])
    assert float(shown["AVIF"][3]) <= 100

    asked.clear()
    move_quality(tab, 60, 70, 80, 90)
    assert results(tab)["vqcodec"][0] == f"{len(codec.compress(photo, quality=90, tune='psnr', weights=WEIGHTS)):,}"
    assert asked.count("render") < 4, "not every move of the slider is compressed"
    with tab.expect_download() as downloading:
        tab.click("#download")
    data = Path(downloading.value.path()).read_bytes()
    assert downloading.value.suggested_filename == "photo.vqz"
    assert data == codec.compress(photo, quality=90, tune="psnr", weights=WEIGHTS)

    tab.locator(".handle").focus()
    tab.keyboard.press("End")
    assert split_of(tab) == 100
    tab.select_option("select.left", "AVIF")
    assert tab.locator(".stage .name").all_inner_texts() == ["AVIF", "vqcodec"]

    tab.check("input[value=size]")
    tab.fill("#size", "0.6")
    tab.wait_for_timeout(300)
    assert abs(int(results(tab)["vqcodec"][0]) - 600) < 60
    assert tab.locator(".stage .name").all_inner_texts() == ["AVIF", "vqcodec"], "what was chosen stays"

    bad = {"name": "bad.png", "mimeType": "image/png", "buffer": b"nonsense"}
    tab.set_input_files("#file", bad)
    tab.locator("#problem").wait_for()
    assert tab.locator("#problem").inner_text().startswith("bad.png: not a PNG, JPEG,")

    # Dropped, not picked: a .vqz file.
    dropped = """async bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'photo.vqz'));
        document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));
    }"""
    tab.evaluate(dropped, list(data))
    tab.locator(".stage .name.left", has_text="Faithful look").wait_for()
    assert list(results(tab)) == ["Faithful look"] and not tab.locator("#problem").is_visible()
