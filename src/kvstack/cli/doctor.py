"""`kvstack doctor`: what is installed, which attention path will run and why, and whether the bundled model is there.

It only looks; it changes and downloads nothing.
"""

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstack.environment import environment
from kvstack.errors import KVStackError
from kvstack.kernels.decode import choose
from kvstack.lab.registry import bundled_model

EXAMPLES = """
kvstack doctor
kvstack doctor --json > environment.json    # to attach to a bug report
"""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what this machine can do, and why."""
    path = choose(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = environment() | {"attention": f"{path.name}: {path.reason}", "bundled_model": "present"}
    remedy = ""
    try:
        bundled_model()
    except KVStackError as e:
        found["bundled_model"], remedy = "missing", str(e)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), Text(_say(value)))
    console = Console()
    console.print(table)
    if remedy:
        console.print(Text(remedy, style="yellow"), soft_wrap=True)


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "-" if value is None else str(value)
