"""The card of a lab model: what it was trained on, how it went, and what it can do, as `README.md` and `curve.png` in its folder.

Everything comes from `training.json`, which training wrote, and from the rows that an evaluation measured. It measures nothing itself.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstack.attention import words
from kvstack.errors import BadInputError
from kvstack.lab.text import HELD_OUT, TUNING


def write_card(folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the card of the lab model in `folder`; rows: compare rows of the full cache, one per length.

    Raises BadInputError when the folder is not that of a lab model.
    """
    facts_file = folder / "training.json"
    if not facts_file.is_file():
        raise BadInputError(f"{folder} is not the folder of a lab model: it has no training.json. Leave --card away.")
    facts = json.loads(facts_file.read_text("utf-8"))
    _draw_curve(facts["curve"], folder / "curve.png")
    (folder / "README.md").write_text(_text(folder.name, facts, rows), "utf-8")


def _text(name: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    cfg = facts["config"]
    accuracy = "Not measured yet: `kvstack lab eval FOLDER --card`."
    if rows:
        tasks = list(rows[0]["tasks"])
        lines = [f"| tokens | bits per byte | {' | '.join(tasks)} |", "|---" * (len(tasks) + 2) + "|"]
        for row in rows:
            cells = (f"{100 * e['accuracy']:.1f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]" for e in row["tasks"].values())
            lines.append(f"| {row['tokens']} | {row['bits_per_byte']:.4f} | {' | '.join(cells)} |")
        n = next(iter(rows[0]["tasks"].values()))["n"]
        lines += [
            "",
            f"Answers that are right to the token, in per cent; {n} fresh samples a task and length; 95 % intervals that count",
            "a sample as one trial. Text: held-out modules of the standard library.",
        ]
        accuracy = "\n".join(lines)
    data = textwrap.fill(
        f"* Data: {facts['text_tokens']:,} tokens of Python sources (digest `{facts['text_digest']}`) from the standard library and "
        f"installed packages; never the modules {', '.join(HELD_OUT)} (reported on) and {', '.join(TUNING)} (settings chosen on; the "
        "profile is of these); and the tasks of `kvstack.lab.tasks`, generated without end.",
        width=128,
        subsequent_indent="  ",
    )
    attention = cfg.get("attention")
    kind = "Qwen3 of transformers" if attention is None else "the decoder of `kvstack.attention`"
    shared = f"{cfg['kv_heads']} KV heads" if attention is None else f"attention `{words.name(attention)}`"
    note = textwrap.fill(f"* Note: {facts['note']}", width=128, subsequent_indent="  ") + "\n" if "note" in facts else ""
    return f"""# {name}

A decoder of {facts["parameters"]:,} parameters for measuring what KV-cache compression does to text and to long-context tasks. It is a
laboratory model: it knows Python sources and five synthetic tasks, and nothing else.

* Architecture: {kind}, {cfg["layers"]} layers, width {cfg["width"]}, {cfg["heads"]} query heads,
  {shared}, head size {cfg["head_dim"]}, RoPE base {cfg["rope_theta"]:,.0f}, context {cfg["context"]},
  tied embeddings, float16 weights.
* Tokenizer: byte-level BPE of 4096 tokens, trained on the same text.
{data}
* Training: {facts["steps"]:,} steps, {facts["tokens"] / 1e6:,.0f} M tokens, {facts["seconds"] / 60:.1f} minutes on one GPU,
  seed {cfg["seed"]}; Muon for the matrices, AdamW for the rest. All settings and the curve are in
  `training.json`; `kvstack lab train` repeats it.
{note}
![curve](curve.png)

## Accuracy with a full cache

{accuracy}

Licence: Apache-2.0, as kvstack.
"""


def _draw_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    fig: Any = Figure(figsize=(8, 3), layout="constrained")
    loss, answers = fig.subplots(1, 2)
    minutes = [row["seconds"] / 60 for row in curve]
    points = loss.scatter(minutes, [row["loss"] for row in curve], c=[row["length"] for row in curve], s=8, cmap="viridis_r")
    fig.colorbar(points, ax=loss, label="length")
    answers.scatter(minutes, [100 * (1 - row["answers"]) for row in curve], c=[row["length"] for row in curve], s=8, cmap="viridis_r")
    loss.set_title("training loss", loc="left", fontsize=10)
    answers.set_title("wrong answer tokens (%)", loc="left", fontsize=10)
    answers.set_yscale("symlog", linthresh=0.1)
    for ax in (loss, answers):
        ax.set_xlabel("minutes")
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=80)
