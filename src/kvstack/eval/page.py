"""Pictures and tables as files: every figure as PNG, and all of them with their tables in one HTML page that needs nothing else."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.table

STYLE = """body{font:15px system-ui,sans-serif;margin:2em;color:#222} h2{font-size:1.1em;margin-top:2em}
svg{max-width:100%;height:auto} table{border-collapse:collapse;margin-top:1.5em}
td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;font-family:monospace}"""


class Table(NamedTuple):
    """A table of text for people; no title where the page says it all."""

    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]

    def terminal(self) -> rich.table.Table:
        """The table as rich prints it."""
        out = rich.table.Table(title=self.title or None, title_justify="left", min_width=len(self.title))
        for i, name in enumerate(self.head):
            out.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for cells in self.cells:
            out.add_row(*cells)
        return out


def write(stem: Path, title: str, figures: Mapping[str, Any], tables: Sequence[Table], note: str) -> list[Path]:
    """Write the matplotlib `figures` to PNG, their names added to `stem`, and the page to `stem.html`; return the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths, pictures = [], []
    for name, fig in figures.items():
        paths.append(stem.with_name(f"{stem.stem}{name}.png"))
        fig.savefig(paths[-1], dpi=130)
        svg = io.StringIO()
        fig.savefig(svg, format="svg")
        pictures.append(svg.getvalue()[svg.getvalue().index("<svg") :])
    paths.append(stem.with_suffix(".html"))
    parts = [f"<h1>{html.escape(title)}</h1>", *pictures, *map(_table, tables), f"<p>{html.escape(note)}</p>"]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    paths[-1].write_text("\n".join([head, *parts]) + "\n", encoding="utf-8")
    return paths


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.head)
    lines = ("".join(f"<td>{html.escape(c)}</td>" for c in cells) for cells in table.cells)
    body = "\n".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return (f"<h2>{html.escape(table.title)}</h2>\n" if table.title else "") + f"<table>{body}</table>"
