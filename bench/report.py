"""One self-contained HTML page: every picture is inside the file, nothing is loaded from elsewhere."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --rule: #d9dee3; --paper: #fbfbfa; --accent: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 5rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0 .9rem; }
p.lead, figcaption, .note { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); display: block; font-size: .76rem; }
tr.own td { color: var(--accent); font-weight: 600; }
tr.own td small { font-weight: 400; }
table.text td { text-align: left; white-space: normal; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
figure { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
.plots img { width: 100%; height: auto; display: block; background: #fff; border: 1px solid var(--rule); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem;
       width: min(110rem, calc(100vw - 3rem)); margin-left: calc((100% - min(110rem, calc(100vw - 3rem))) / 2); }
.row img { width: 100%; height: auto; display: block; object-fit: contain; background: #eceeef; touch-action: pan-y; }
.row figcaption { font-size: .85rem; padding: .3rem 0 .6rem; font-variant-numeric: tabular-nums; }
.row figcaption b { color: var(--ink); }
"""

# Pointing at a picture shows the same place of all pictures of the row, pixel for pixel.
SCRIPT = """
for (const row of document.querySelectorAll('.row')) {
  const images = row.querySelectorAll('img');
  row.addEventListener('pointermove', event => {
    if (event.target.tagName !== 'IMG') return;
    const box = event.target.getBoundingClientRect();
    const x = 100 * (event.clientX - box.left) / box.width, y = 100 * (event.clientY - box.top) / box.height;
    for (const image of images) { image.style.objectFit = 'none'; image.style.objectPosition = `${x}% ${y}%`; }
  });
  row.addEventListener('pointerleave', () => { for (const image of images) image.style.objectFit = ''; });
}
"""


@dataclass(frozen=True)
class Cell:
    """A table cell with a smaller second line."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the rows in `own` (by their first cell) are set off, `text` sets running text instead of figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    own: frozenset[str] = frozenset()
    text: bool = False


@dataclass(frozen=True)
class Shot:
    """One picture of a comparison: file bytes that a browser can show, and what to say of it."""

    title: str
    caption: str
    media_type: str
    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out.

    Attributes:
        title: the heading.
        paragraphs: plain text.
        tables: (heading, table); with `folded`, each is closed until clicked.
        plots: (title, PNG bytes).
        rows: (heading, pictures to compare).
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[tuple[str, Table]] = ()
    plots: Sequence[tuple[str, bytes]] = ()
    rows: Sequence[tuple[str, Sequence[Shot]]] = ()
    folded: bool = False


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML text."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    if section.plots:
        figures = (
            f'<figure><img alt="{escape(name)} over bits per pixel" src="{_uri("image/png", data)}"></figure>'
            for name, data in section.plots
        )
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    for heading, table in section.tables:
        if section.folded:
            parts.append(f"<details><summary>{escape(heading)}</summary>{_table(table)}</details>")
        else:
            parts.append((f"<h3>{escape(heading)}</h3>" if heading else "") + _table(table))
    for heading, shots in section.rows:
        parts.append(f'<h3>{escape(heading)}</h3>\n<div class="row">{"".join(map(_shot, shots))}</div>')
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = []
    for row in table.rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        small = [f"<small>{escape(cell.small)}</small>" if cell.small else "" for cell in cells]
        mark = ' class="own"' if cells[0].text in table.own else ""
        rows.append(
            f"<tr{mark}>"
            + "".join(f"<td>{escape(c.text)}{s}</td>" for c, s in zip(cells, small, strict=True))
            + "</tr>"
        )
    kind = ' class="text"' if table.text else ""
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _shot(shot: Shot) -> str:
    return (
        f'<figure><img alt="{escape(shot.title)}" width="{shot.width}" height="{shot.height}" '
        f'style="aspect-ratio: {shot.width} / {shot.height}" src="{_uri(shot.media_type, shot.data)}">'
        f"<figcaption><b>{escape(shot.title)}</b> {escape(shot.caption)}</figcaption></figure>"
    )


def _uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
