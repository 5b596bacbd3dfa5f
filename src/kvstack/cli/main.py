"""The `kvstack` command: which commands there are, and how their errors reach the user.

A command is a function in a module of its own, named in a table here and imported only when it is called, so that `kvstack --help` does
not wait for torch. Its annotations are typer's; its docstring is its help; the module's `EXAMPLES`, shell lines, end the help, and a
module may have a `CONTEXT` of click settings.

A `KVStackError` is printed without a traceback and exits with 2, as bad options do. Any other exception is a bug and keeps its
traceback. This module knows nothing of what the commands do.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from kvstack.errors import KVStackError

# name: where the function is, and the line that `kvstack --help` shows.
COMMANDS = {
    "demo": ("kvstack.cli.demo:demo", "See what a compressed cache saves and what it costs."),
    "run": ("kvstack.cli.run:run", "Generate text with a compressed cache."),
    "compare": ("kvstack.cli.compare:compare", "Measure recipes side by side: bytes, quality, speed."),
    "calibrate": ("kvstack.cli.calibrate:calibrate", "Calibrate a profile of a model on text."),
    "convert": ("kvstack.cli.convert:convert", "Turn a pretrained MHA model into LRKV or GQA, which cache less."),
    "inspect": ("kvstack.cli.inspect:inspect", "Show what a profile says of a model's queries."),
    "qjl": ("kvstack.cli.qjl:qjl", "Show why a sign sketch of the residual does not pay."),
    "serve": ("kvstack.cli.serve:serve", "Start vLLM's OpenAI-compatible server with a compressed cache."),
    "doctor": ("kvstack.cli.doctor:doctor", "Say what this machine can do, and why."),
}
LAB_COMMANDS = {
    "train": ("kvstack.cli.lab:train", "Train a reference model from scratch."),
    "eval": ("kvstack.cli.lab:evaluate", "Judge a model on the synthetic tasks."),
    "corpus": ("kvstack.cli.pretrain:corpus", "Tokenise this machine's Python sources for pretraining."),
    "pretrain": ("kvstack.cli.pretrain:pretraining", "Pretrain a decoder whose attention you choose."),
    "architectures": ("kvstack.cli.architectures:architectures", "Compare pretrained decoders."),
    "rates": ("kvstack.cli.architectures:rates", "Compare the learning rates of pretrained decoders."),
}
BENCH_COMMANDS = {
    "decode": ("kvstack.cli.bench:decode", "Time attention of a decode step, ours and other libraries'."),
    "prefill": ("kvstack.cli.bench:prefill", "Time attention of a prompt's chunk over a compressed past."),
    "encode": ("kvstack.cli.bench:encode", "Time new tokens on their way into pages."),
    "lowrank": ("kvstack.cli.bench:lowrank", "Time attention of a decode step over low-rank records (LRKV)."),
    "error": ("kvstack.cli.bench:error", "How exact decode attention is, up to a million tokens."),
    "long": ("kvstack.cli.bench:long", "A long generation with eviction: tokens per second and memory."),
    "generate": ("kvstack.cli.bench:generate", "A model's decode loop: tokens per second of recipes."),
    "serve": ("kvstack.cli.bench_serve:serve", "Engines of vLLM: tokens that fit and tokens per second, its caches and ours."),
    "churn": ("kvstack.cli.bench_churn:churn", "An engine of vLLM under random requests and aborts: is anything left, or wrong?"),
}
EXAMPLES = """
kvstack doctor
kvstack run bundled --recipe polar4 --prompt "def main():"
kvstack run --help
"""


def examples(lines: str) -> str:
    """The part of a help page that shows `lines`."""
    return "[bold]Examples[/bold]\n\n" + escape("\n".join(f"  {line}" for line in lines.strip().splitlines()))


class LazyCommand(TyperCommand):
    """A command known by its name and one line until `load` imports it."""

    def __init__(self, name: str, target: str, line: str) -> None:
        super().__init__(name, help=line)
        self.target = target

    def load(self) -> TyperCommand:
        """The real command. Raises KVStackError when a package that it needs is not installed."""
        module_name, _, function = self.target.partition(":")
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as e:
            if not e.name or e.name.partition(".")[0] == "kvstack":
                raise
            remedy = "Install everything with `pip install 'kvstack[hf,cli]'`."
            raise KVStackError(f"`kvstack {self.name}` needs the package {e.name}. {remedy}") from e
        only = typer.Typer(add_completion=False, rich_markup_mode="rich")
        context = getattr(module, "CONTEXT", None)
        only.command(self.name, epilog=examples(module.EXAMPLES), context_settings=context)(getattr(module, function))
        command = typer.main.get_command(only)
        assert isinstance(command, TyperCommand)
        return command


class LazyGroup(TyperGroup):
    """A group whose commands are those of `table`; it turns a KVStackError into a message and exit code 2."""

    table: ClassVar[Mapping[str, tuple[str, str]]] = COMMANDS

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        lazy = {name: LazyCommand(name, target, line) for name, (target, line) in self.table.items()}
        self.commands = {**lazy, **self.commands}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that `args` name, and load it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, LazyCommand) else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KVStackError as e:
            Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error: ", "bold red"), (str(e), "red")))
            raise typer.Exit(2) from e


class LabGroup(LazyGroup):
    """`kvstack lab`."""

    table = LAB_COMMANDS


class BenchGroup(LazyGroup):
    """`kvstack bench`."""

    table = BENCH_COMMANDS


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvstack {version('kvstack')}")
        raise typer.Exit


def _main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A KV cache for large language models that is several times smaller, in measured bytes."""


_OPTIONS: dict[str, Any] = {
    "add_completion": False,
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
}
app = typer.Typer(cls=LazyGroup, callback=_main, epilog=examples(EXAMPLES), **_OPTIONS)
app.add_typer(typer.Typer(cls=LabGroup, **_OPTIONS), name="lab", help="Train and judge small reference models of your own.")
app.add_typer(typer.Typer(cls=BenchGroup, **_OPTIONS), name="bench", help="Measure speed on this machine's GPU.")

if __name__ == "__main__":
    app()
