"""The command line itself, and `kvstack doctor`."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstack.cli.main import COMMANDS, LAB_COMMANDS, app
from kvstack.environment import environment
from kvstack.errors import KVStackError

runner = CliRunner()


def command_in_a_module(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let `function` stand in for `kvstack doctor`."""
    module = ModuleType("kvstack.cli.doctor")
    module.__dict__.update(doctor=function, EXAMPLES="kvstack doctor [x]")
    monkeypatch.setitem(sys.modules, "kvstack.cli.doctor", module)


def test_help_names_every_command_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom kvstack.cli.main import app\n"
        "for args in (['--help'], ['lab', '--help'], ['--version']):\n"
        "    try: app(args, prog_name='kvstack')\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys(), 'a heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, line) in {**COMMANDS, **LAB_COMMANDS}.items():
        assert name in done.stdout and line in done.stdout
    assert f"kvstack {version('kvstack')}" in done.stdout
    assert "Examples" in done.stdout


def test_a_wrong_command_is_corrected() -> None:
    result = runner.invoke(app, ["doctr"])
    assert result.exit_code == 2 and "doctor" in result.stderr


def test_examples_end_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    command_in_a_module(monkeypatch, lambda: None)
    result = runner.invoke(app, ["doctor", "--help"])
    assert result.exit_code == 0 and "kvstack doctor [x]" in result.stdout


def test_user_errors_have_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> None:
        raise KVStackError("No [red]luck.\n    polar9\n    ^^^^^^\nTry again.")

    command_in_a_module(monkeypatch, doctor)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "Error: No [red]luck.\n    polar9\n    ^^^^^^\nTry again.\n"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> None:
        raise ValueError("a bug")

    command_in_a_module(monkeypatch, doctor)
    assert isinstance(runner.invoke(app, ["doctor"]).exception, ValueError)


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> None:
        raise KeyboardInterrupt

    command_in_a_module(monkeypatch, doctor)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code in (1, 130) and "Traceback" not in result.output


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "doctor", ("kvstack.no_such_module:y", ""))
    result = runner.invoke(app, ["doctor"])
    assert isinstance(result.exception, ModuleNotFoundError)  # one of ours is a bug
    monkeypatch.setitem(COMMANDS, "doctor", ("no_such_package.x:y", ""))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 2 and "needs the package no_such_package" in result.stderr


def test_a_table_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSTACK_MODELS", str(tmp_path))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert (
        environment()["torch"] in result.stdout
        and "reference: there is no kernel for cpu devices" in result.stdout
        and "lab train" in result.stdout
    )
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert found.keys() == environment().keys() | {"attention", "bundled_model"}
    assert found["bundled_model"] == "missing" and str(tmp_path) not in json.dumps(found)
