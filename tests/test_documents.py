"""Documents name files that exist, and the table of modules names all."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "bench", "docs", "docs/log", "weights") for path in ROOT.glob(f"{folder}/*.md")
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|^\[[^\]]+\]: ([^#\s]+)", re.MULTILINE)  # [text](path#part), [name]: path#part
MENTION = re.compile(r"\bdocs/[\w/-]+\.\w+")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    links = [document.parent / (a or b) for a, b in LINK.findall(text) if not (a or b).startswith("https:")]
    mentions = [ROOT / name for name in MENTION.findall(text)]
    assert [str(path) for path in links + mentions if not path.exists()] == []


def test_the_table_of_modules_is_complete() -> None:
    package = ROOT / "vqcodec"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("[!_]*.py")}
    table = [line for line in (ROOT / "docs/design.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    assert modules - {name for line in table for name in re.findall(r"`([\w/]+\.py)`", line)} == set()
