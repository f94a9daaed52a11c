"""The files that describe .vqz files to desktops agree with the format and with the Pillow plugin."""

import configparser
import shlex
from xml.etree import ElementTree

from commandline import ROOT, process
from PIL import Image

from vqcodec import bitstream, files, pillow_plugin

FOLDER = ROOT / "docs" / "desktop"
PHOTO = ROOT / "tests" / "golden" / "photo" / "psnr.vqz"


def unescaped(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode("latin-1")


def test_mime_type() -> None:
    space = {"": "http://www.freedesktop.org/standards/shared-mime-info"}
    (kind,) = ElementTree.parse(FOLDER / "vqcodec.xml").getroot()
    match, glob = kind.find("magic/match", space), kind.find("glob", space)
    assert kind.get("type") == pillow_plugin.MIME_TYPE
    assert (unescaped(match.get("value")), match.get("offset"), match.get("type")) == (bitstream.MAGIC, "0", "string")
    assert (glob.get("pattern"),) == tuple("*" + suffix for suffix in files.VQZ_SUFFIXES)


def test_magic() -> None:
    lines = [line.split("\t") for line in (FOLDER / "vqcodec.magic").read_text().splitlines()]
    _, (offset, kind, value, _), mime, suffixes = lines[:4]
    assert (offset, kind, unescaped(value)) == ("0", "string", bitstream.MAGIC)
    assert mime == ["!:mime", pillow_plugin.MIME_TYPE]
    assert suffixes[1].split("/") == [suffix.lstrip(".") for suffix in files.VQZ_SUFFIXES]


def test_thumbnailer(tmp_path) -> None:
    parser = configparser.RawConfigParser()
    parser.read(FOLDER / "vqcodec.thumbnailer")
    entry = parser["Thumbnailer Entry"]
    assert entry["MimeType"] == pillow_plugin.MIME_TYPE + ";"
    values = {"%i": str(PHOTO), "%o": str(tmp_path / "thumbnail"), "%s": "64"}
    program, *arguments = (values.get(word, word) for word in shlex.split(entry["Exec"]))
    assert program == "python3"
    with process(*arguments) as ran:
        assert ran.communicate() == (b"", b"")
    with Image.open(tmp_path / "thumbnail") as thumbnail:
        assert (thumbnail.format, max(thumbnail.size)) == ("PNG", 64)
