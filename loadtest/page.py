"""An HTML page without links: style and charts are in it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --bg: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --bg: #111827 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--bg);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p, li { max-width: 46rem } .soft, .empty { color: var(--soft) }
.warning { border-left: 3px solid #d97706; padding-left: .7rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
th { color: var(--soft); font-weight: 600 }
td.good { background: #05966933 } td.bad { background: #dc262622 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg text.title { fill: var(--ink); font-weight: 600; font-size: 12px }
svg .grid { stroke: var(--line) } svg polyline { stroke-width: 1.8 }
svg line.mark { stroke: #dc2626; stroke-dasharray: 3 3 } svg text.mark { fill: #dc2626 }
"""


def page(title: str, *parts: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>{''.join(parts)}"


def charts(*drawn: str) -> str:
    return f'<div class="charts">{"".join(f"<div>{one}</div>" for one in drawn)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def coloured_table(
    head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]
) -> str:
    """Rows of a name and cells, each with its class: good, bad, or none."""
    lines = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in cells)
        + "</tr>"
        for name, cells in rows
    )
    named = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><thead><tr>{named}</tr></thead><tbody>{lines}</tbody></table>"


def facts(pairs: dict[str, str]) -> str:
    """Names and values, one line each."""
    items = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in pairs.items())
    return f"<table><tbody>{items}</tbody></table>"


def paragraphs(lines: Sequence[str], kind: str = "soft") -> str:
    return "".join(f'<p class="{kind}">{escape(line)}</p>' for line in lines)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: the first column to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
