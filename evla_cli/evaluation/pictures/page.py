"""One HTML page that needs nothing but itself: no network, no script, every picture inside."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape

from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table

# A browser that obeys this loads nothing from anywhere, whatever else the page says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem;
  border-top: 1px solid #ccc; padding-top: 1rem; }
p { margin: .5rem 0; } img { display: block; width: 100%; height: auto; margin: 1rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #444; padding-bottom: .25rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
th { font-weight: 600; } td { overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; background: #f4f4f4; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.missing, .warning { border-left: .3rem solid #D55E00; padding-left: .8rem; }
@media print { body { max-width: none; margin: 0; font-size: 11pt; } h2 { break-after: avoid; }
  img, tr { break-inside: avoid; } .table { overflow: visible; } }
"""


def page(
    title: str,
    intro: Sequence[str],
    warnings: Sequence[str],
    summary: Table | None,
    sections: Sequence[Section],
    pngs: Mapping[str, bytes],
    provenance: Sequence[Table],
    command: str,
) -> str:
    """
    Args:
        pngs: by the picture's name.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in intro)]
    parts += [f'<p class="warning">{escape(text)}</p>' for text in warnings]
    if summary is not None:
        parts.append(_table(summary))
    for section in sections:
        parts.append(f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>')
        parts += _missing(section) if isinstance(section, Missing) else _picture(section, pngs[section.name])
        parts.append("</section>")
    parts += ['<section id="provenance">\n<h2>Where this comes from</h2>', f"<pre>{escape(command)}</pre>"]
    parts += [*map(_table, provenance), "</section>"]
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def _picture(picture: Picture, png: bytes) -> list[str]:
    data = base64.b64encode(png).decode()
    return [
        *(f"<p>{escape(text)}</p>" for text in picture.caption),
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">',
        *map(_table, picture.tables),
    ]


def _missing(missing: Missing) -> list[str]:
    return [
        f'<p class="missing">Not drawn. {escape(missing.why)} What makes it:</p>',
        f"<pre>{escape(chr(10).join(missing.commands))}</pre>",
    ]


def _table(table: Table) -> str:
    """Columns of words to the left, those that are mostly numbers to the right."""
    columns = [[row[column] for row in table.rows] for column in range(len(table.header))]
    words = [table.words or 2 * sum(map(_is_number, cells)) < sum(map(bool, cells)) for cells in columns]

    def cells(kind: str, row: Sequence[str]) -> str:
        each = zip(row, words, strict=True)
        return f"<tr>{''.join(f'<{kind}{_TEXT[text]}>{escape(cell)}</{kind}>' for cell, text in each)}</tr>"

    head = f"<thead>{cells('th', table.header)}</thead>\n" if any(table.header) else ""
    rows = "\n".join(cells("td", row) for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>\n"
    return f'<div class="table"><table>\n{caption}{head}<tbody>\n{rows}\n</tbody>\n</table></div>'


_TEXT = {True: ' class="text"', False: ""}


def _is_number(cell: str) -> bool:
    """With a unit or an interval, perhaps."""
    return re.fullmatch(r"[-+]?\d[\d,.]*(%| [A-Za-z]+|/\d+)?( \[[^\]]*\])?", cell) is not None
