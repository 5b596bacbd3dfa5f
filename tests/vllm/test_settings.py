"""What a server can be asked to do, from where, and what it refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODEL, engine
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname

from kvstack.bench.engine_process import Served
from kvstack.codecs import Fp8
from kvstack.errors import ArtefactError, KVStackError, RecipeError, UnsupportedModelError
from kvstack.recipe import Recipe
from kvstack.vllm import choice
from kvstack.vllm.backend import Backend
from kvstack.vllm.choice import wanted
from kvstack.vllm.profiles import profile_of
from kvstack.vllm.selection import Plan
from kvstack.vllm.settings import Settings, layout, read


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KVSTACK_RECIPE", raising=False)
    yield


def test_the_first_of_three_places_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read({}, str(tmp_path)) is None and read(None, "org/name") is None
    (tmp_path / "kvstack.json").write_text(json.dumps({"recipe": "polar3", "layers": {"1": "fp8"}, "profile": "p.safetensors"}))
    found = read({}, str(tmp_path))
    assert found is not None and str(found.recipe) == "polar3" and found.profile == str(tmp_path / "p.safetensors")
    assert found.precision(1) == Fp8() and found.precision(0) == found.recipe.precision
    assert str(read({"kvstack": "polar2"}, str(tmp_path)).recipe) == "polar2"  # type: ignore[union-attr]
    assert str(read({"kvstack": {"recipe": "k4v2"}}, str(tmp_path)).recipe) == "k4v2"  # type: ignore[union-attr]
    for text in ("polar4", '{"recipe": "polar4"}'):
        monkeypatch.setenv("KVSTACK_RECIPE", text)
        assert str(read({"kvstack": "polar2"}, str(tmp_path)).recipe) == "polar4"  # type: ignore[union-attr]
    monkeypatch.setenv("KVSTACK_RECIPE", str(tmp_path / "kvstack.json"))
    assert read({}, "org/name") == Settings(found.recipe, found.layers, found.profile, found.source)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("balanced", "one format for all of its tokens. Use `polar4`"),
        ("polar4(window=128)", "Use `polar4`"),
        ("polr4", "There is no word"),
        ("tri(3000)+polar4", "multiples of 128, such as 2944"),
        ("tri(256, heads=union)+polar4", "heads=separate"),
        ("tri(256)+polar4", "needs a profile"),
        ("tri(256)+polar4(centre=on)", "Leave out `centre`"),
        ("forecast(256, heads=separate)+polar4", "needs forecast"),
        ("{", "is no JSON"),
        ('{"recipes": "polar4"}', "no mapping with a `recipe`"),
        ('{"recipe": "polar4", "layers": {"first": "fp8"}}', "numbers of layers"),
        ("/nowhere/kvstack.json", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(asked: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTACK_RECIPE", asked)
    with pytest.raises(RecipeError, match=r"KVSTACK_RECIPE|nowhere") as e:
        read(None, MODEL)
    assert says in str(e.value)


def config(**arguments: Any) -> Any:
    plain = dict(model=MODEL, max_model_len=1024, additional_config={"kvstack": "polar4"})
    return EngineArgs(**plain | arguments).create_engine_config()


def test_other_versions_models_and_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(config(additional_config={})) is None and wanted(None) is None
    assert str(wanted(config()).recipe) == "polar4"  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="--kv-cache-dtype fp8"):
        wanted(config(kv_cache_dtype="fp8"))
    with pytest.raises(UnsupportedModelError, match="--block-size 64, and pages hold 128 tokens"):
        wanted(config(block_size=64))
    evicting = {"kvstack": {"recipe": "tri(256)+polar4", "profile": f"{MODEL}/profile/profile.safetensors"}}
    with pytest.raises(UnsupportedModelError, match="--no-enable-prefix-caching"):
        wanted(config(additional_config=evicting))
    assert wanted(config(additional_config=evicting, enable_prefix_caching=False)) is not None
    monkeypatch.setattr(choice, "VERSIONS", ("0.31.",))
    with pytest.raises(KVStackError, match=r"works with vLLM 0\.31\.x, and this is 0\.32"):
        wanted(config())


@pytest.mark.parametrize("asked", [{"backend": "TRITON_ATTN"}, {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}])
def test_a_backend_that_would_leave_it_out_is_refused(asked: dict[str, Any]) -> None:
    with set_current_vllm_config(config(attention_config=asked)):
        assert issubclass(choice.FLASH_ATTN, Backend)
        assert resolve_obj_by_qualname(".".join(choice.FLASH_ATTN.full_cls_name())) is choice.FLASH_ATTN  # as it does on GPUs
        with pytest.raises(UnsupportedModelError, match="--attention-backend TRITON_ATTN leaves kvstack out"):
            _ = choice.TRITON_ATTN
    with set_current_vllm_config(config(attention_config=asked, additional_config={})):
        assert choice.TRITON_ATTN.get_name() == "TRITON_ATTN"
    with set_current_vllm_config(config()):
        assert choice.TRITON_ATTN.get_name() == "TRITON_ATTN", "layers with sliding windows may have it"


def test_a_profile_of_another_size_is_refused(tmp_path: Path) -> None:
    model, recipe = config().model_config, Recipe.parse("polar4(centre=on)")
    found = profile_of(Settings(recipe, profile=f"{MODEL}/profile/profile.safetensors"), model)
    assert found is not None and found.key_centre.shape == (6, 2, 128) and profile_of(Settings(recipe), model) is None
    other = Served.of("small", None, tmp_path).profile
    with pytest.raises(ArtefactError, match=r"\(4, 2, 128\), and this one has \(6, 2, 128\)"):
        profile_of(Settings(recipe, profile=str(other)), model)


def test_an_engine_does_not_start_with_what_cannot_be() -> None:
    with pytest.raises(RecipeError, match=r"no page format|Pages hold"), engine("int4"):
        pass
    with pytest.raises(RecipeError, match=r"no full-attention layers \[6\]"), engine({"recipe": "polar4", "layers": {"6": "fp8"}}):
        pass
    assert "KVSTACK_RECIPE" not in os.environ


def test_a_record_is_a_page_over_its_tokens() -> None:
    assert layout(Fp8(), 128, torch.bfloat16).nbytes == 128 * (128 + 128 + 4)


@pytest.mark.parametrize(("budget", "interval"), [(128, 128), (256, 128), (128, 384), (3072, 512)])
def test_a_plan_never_loses_a_token_that_should_be_there(budget: int, interval: int) -> None:
    """By counting tokens one by one, as pages see them."""
    plan, held = Plan(budget, interval), 0
    for came in range(1, 3 * (budget + interval)):
        held += 1
        if held == budget + interval:
            held = budget
        assert came - plan.gone(came) == held
    came = torch.arange(1, 3 * (budget + interval), dtype=torch.int32)
    assert plan.gone(came).tolist() == [plan.gone(int(n)) for n in came]


def test_the_pages_of_a_row_skip_what_is_gone() -> None:
    plan, table = Plan(256, 128), torch.arange(10, 20, dtype=torch.int32)[None].repeat(2, 1)
    found = plan.table(table, torch.tensor([0, 384], dtype=torch.int32), 5)
    assert found.tolist() == [[10, 11, 12, 13, 14], [10, 11, 15, 16, 17]]
    assert found.dtype == torch.int32
