"""Adapters merged into the weights: the same policy, as one plain model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.models import loading, merging
from prefopt_cli.models.policy import MERGE_RECORD, PolicySource, fingerprint
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings, QuantizationSettings
from tests.tiny import build_model

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a module trained whole": {"modules_to_save": ["lm_head"]},
    "embeddings trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with the head tied to the embeddings or not."""
    folder = tmp_path_factory.mktemp("merging") / request.param
    build_model(folder)
    if request.param == "tied":
        config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained(
    world: Path, folder: Path, kind: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PolicySource:
    """The model with an adapter, all of whose parameters do something."""
    adapter = LoraAdapter(type="lora", r=4, lora_alpha=8, **kind)
    source = PolicySource(str(world))
    model = get_peft_model(
        loading.load_model(source, settings(world), adapter), loading.adapter_config(adapter)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.1)
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return PolicySource(str(world), folder)


def settings(place: Path) -> ModelSettings:
    return ModelSettings(name_or_path=str(place))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(5, 40)[None]).logits)


def record(source: PolicySource) -> dict[str, Any]:
    line = {
        "run": "runs/kind",
        "run_id": "12ab",
        "dimension": "kind",
        "base": source.weights,
        "adapters": [str(source.adapter)],
        "ancestors": [{"run": "runs/kind", "dimension": "kind", "method": {"name": "gpo"}}],
    }
    return merging.new_record(source, loading.load_config(source, settings(Path(source.weights))), line)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_saved_model_is_the_policy(kind: dict[str, Any], world: Path, tmp_path: Path) -> None:
    source = trained(world, tmp_path / "adapter", kind)
    own = merging.merge_settings(source, settings(world))
    before = logits(merging.unmerged_policy(source, own))
    folder = tmp_path / "merged"
    folder.mkdir()
    merging.write_model(
        merging.merged_policy(source, own),
        loading.load_tokenizer(source, own),
        folder,
        dtype="float32",
        record=record(source),
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(world)), before, atol=0.01)
    assert {file.name for file in folder.iterdir()} >= {"model.safetensors", "tokenizer.json", "README.md"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_unmerged_policy_keeps_its_adapter(kind: dict[str, Any], world: Path, tmp_path: Path) -> None:
    """Or the proof would compare the merged weights to themselves."""
    source = trained(world, tmp_path / "adapter", kind)
    model = merging.unmerged_policy(source, merging.merge_settings(source, settings(world)))
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


BITS = {
    "in its folder": ({"bnb_4bit_compute_dtype": torch.bfloat16}, None, {}),
    "while it is loaded": (None, {"bits": 4, "compute_dtype": "bfloat16"}, {"modules_to_save": ["lm_head"]}),
    "kept in bfloat16": (
        None,
        {"bits": 4, "compute_dtype": "bfloat16", "storage_dtype": "bfloat16"},
        {"modules_to_save": ["embed_tokens"]},
    ),
}


@pytest.mark.parametrize(("stored", "loaded", "kind"), BITS.values(), ids=BITS.keys())
def test_few_bits_are_compared_in_float32(
    stored: dict[str, Any] | None,
    loaded: dict[str, Any] | None,
    kind: dict[str, Any],
    world: Path,
    tmp_path: Path,
) -> None:
    """Whatever they are computed in elsewhere, and an adapter's whole modules too."""
    pytest.importorskip("bitsandbytes")
    base = world
    if stored is not None:
        base = tmp_path / "base"
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **stored)
        AutoModelForCausalLM.from_pretrained(world, quantization_config=bits).save_pretrained(base)
    source = trained(world, tmp_path / "adapter", kind, torch.bfloat16)  # as on such weights it is trained
    quantization = QuantizationSettings.model_validate(loaded) if loaded else None
    source = PolicySource(str(base), source.adapter, quantization=quantization)
    own = merging.merge_settings(source, settings(base))
    policy = merging.unmerged_policy(source, own)
    assert {each.dtype for each in policy.parameters() if type(each).__name__ != "Params4bit"} == {
        torch.float32
    }
    merged = logits(merging.merged_policy(source, own))
    torch.testing.assert_close(logits(policy), merged, rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once(world: Path, tmp_path: Path) -> None:
    """The merge happens in float32 also where the base is stored in bfloat16."""
    half = shutil.copytree(world, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(world, dtype=torch.bfloat16).save_pretrained(half)
    source = trained(half, tmp_path / "adapter", {})
    own = merging.merge_settings(source, settings(half))
    exact = merging.merged_policy(source, own)
    rounded = {name: value.to(torch.bfloat16) for name, value in exact.state_dict().items()}
    (tmp_path / "merged").mkdir()
    merging.write_model(
        exact,
        loading.load_tokenizer(source, own),
        tmp_path / "merged",
        dtype="bfloat16",
        record=record(source),
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    for name, value in saved.items():
        torch.testing.assert_close(value, rounded[name], rtol=0, atol=0)


def test_the_record_and_the_card(world: Path, tmp_path: Path) -> None:
    source = trained(world, tmp_path / "adapter", {})
    own = merging.merge_settings(source, settings(world))
    (tmp_path / "merged").mkdir()
    merging.write_model(
        merging.merged_policy(source, own),
        loading.load_tokenizer(source, own),
        tmp_path / "merged",
        dtype="float32",
        record=record(source),
    )
    written = json.loads((tmp_path / "merged" / MERGE_RECORD).read_text())
    assert written["fingerprint"] == fingerprint(source, None)
    assert written["ancestors"][-1]["ended_with"] == written["fingerprint"]
    assert written["adapters"] == [str(tmp_path / "adapter")]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# kind, merged" in card
    assert "1. kind, method gpo" in card
    assert str(tmp_path) not in card
    assert str(world.parent) not in card


def test_quantised_weights_that_cannot_be_undone_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained(world, tmp_path / "adapter", {})
    own = merging.merge_settings(source, settings(world))
    monkeypatch.setattr(merging, "stores_few_bits", lambda _: True)  # these have nothing to be dequantised
    with pytest.raises(
        UserError, match=r"The weights of .* are quantised, and transformers cannot dequantise"
    ):
        merging.merged_policy(source, own)


def test_only_merged_models_are_replaced(tmp_path: Path) -> None:
    merging.require_free(tmp_path / "new" / "folder", overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    merging.require_free(tmp_path / "empty", overwrite=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"mine exists and is no merged model .* never deleted"):
        merging.require_free(tmp_path / "mine", overwrite=True)
    (tmp_path / "mine" / MERGE_RECORD).write_text("{}")
    merging.require_free(tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match="--overwrite"):
        merging.require_free(tmp_path / "mine", overwrite=False)
    for place in (tmp_path / "mine" / "thesis.tex", tmp_path / "mine" / "thesis.tex" / "out"):
        with pytest.raises(UserError, match=r"thesis\.tex is a file, not a folder"):
            merging.require_free(place, overwrite=True)


def test_places_that_are_read(tmp_path: Path) -> None:
    run, data = tmp_path / "runs" / "kind", tmp_path / "data" / "pairs.jsonl"
    run.mkdir(parents=True)
    data.parent.mkdir()
    data.touch()
    merging.require_elsewhere(tmp_path / "out", run, [data, "hub/model", None])
    with pytest.raises(UserError, match="lies in the run"):
        merging.require_elsewhere(run / "merged", run, [])
    with pytest.raises(UserError, match=r"holds .*pairs\.jsonl, which the run needs"):
        merging.require_elsewhere(data.parent, run, [data])
    with pytest.raises(UserError, match=r"holds .*kind, which the run needs"):
        merging.require_elsewhere(tmp_path / "runs", run, [])


def test_a_full_disk_is_told(world: Path, tmp_path: Path) -> None:
    source = trained(world, tmp_path / "adapter", {})
    own = merging.merge_settings(source, settings(world))
    gone = tmp_path / "folder"
    gone.mkdir()
    (gone / "README.md").mkdir()  # cannot be written to
    with pytest.raises(PrefoptError, match="The merged model cannot be written"):
        merging.write_model(
            merging.merged_policy(source, own),
            loading.load_tokenizer(source, own),
            gone,
            dtype="float32",
            record=record(source),
        )
