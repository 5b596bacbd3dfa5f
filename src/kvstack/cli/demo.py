"""`kvstack demo`: in one or two minutes on two cores, what a compressed cache saves and what it costs.

It is `kvstack compare` on the bundled model with recipes and sizes chosen for a first look; the intervals are wide because the samples
are few. It writes `demo.json`, `demo.png` and `demo.html`.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvstack import artefact
from kvstack.cli.compare import measure, show
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.registry import load, load_profile
from kvstack.lab.text import held_out_text
from kvstack.recipe import Recipe

EXAMPLES = """
kvstack demo
kvstack demo --out out/first-look
"""

RECIPES = ("fp8", "polar4", "polar4(window=128, sinks=4)", "polar3(window=128, sinks=4)", "int4")
SUITE = SuiteConfig(length=1024, text_sequences=4, task_samples=2, batch=4)


def demo(out: Annotated[Path, typer.Option(help="Folder for the table as JSON and the plot.")] = Path("out")) -> None:
    """See what a compressed cache saves and what it costs."""
    artefact.check_folder(out)
    model, tokenizer = load("bundled", device="cpu")
    rows = measure(model, tokenizer, [Recipe.parse(r) for r in RECIPES], SUITE, held_out_text(), load_profile("bundled"))
    show(rows, "The bundled 6 M model, 1024 tokens of held-out Python and five tasks", out / "demo.json", out / "demo")
