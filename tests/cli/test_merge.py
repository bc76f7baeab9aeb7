"""`prefopt merge`: one plain model of a run, with the proof."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.models.policy import MERGE_RECORD
from tests.cli.conftest import Prefopt
from tests.training.conftest import (
    LORA,
    Run,
    make_recipe,  # noqa: F401  (a fixture, as is the next)
    run,  # noqa: F401
)

SHORT = "training.max_steps=2"
IDS = torch.arange(5, 40)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(IDS).logits)


def policy(world: Path, run: Path) -> torch.nn.Module:  # noqa: F811
    """A run's policy, with nothing but transformers and peft."""
    if not (run / "model" / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(run / "model")
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world / "model"), str(run / "model")
    )


@pytest.mark.parametrize("way", ["all weights", "adapter", "adapter continued", "adapters stacked"])
def test_the_merged_model_is_the_policy(
    way: str,
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    adapter = [] if way == "all weights" else [LORA]
    run("kind", *adapter)
    last = "kind"
    if way in ("adapter continued", "adapters stacked"):
        each = "continue" if way == "adapter continued" else "new"
        method = f"method={{name: sequential, previous: [{tmp_path}/kind], lambdas: 0.5, adapter_per_stage: {each}}}"
        run("calm", LORA, f"model.name_or_path={tmp_path}/kind", method)
        last = "calm"
    out = tmp_path / "new" / "merged"
    result = prefopt("merge", str(tmp_path / last), str(out), "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["difference"]["pairs"] == 24
    assert told["difference"]["responses"] == 48
    assert told["difference"]["mean"] <= told["difference"]["max"] < 1e-3
    assert told["adapters"] == [
        str(tmp_path / name / "model") for name in ("kind", last)[last == "kind" :] if adapter
    ]
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        logits(merged), logits(policy(tiny_world, tmp_path / last)), rtol=1e-4, atol=1e-4
    )
    assert AutoTokenizer.from_pretrained(out).chat_template is not None
    assert [each.name for each in out.parent.iterdir()] == ["merged"]


def test_what_is_printed_and_what_a_later_run_makes_of_it(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    run("kind", SHORT, LORA)
    result = prefopt("merge", str(tmp_path / "kind"), str(tmp_path / "out"), "--pairs", "5")
    assert result.code == 0, result.err
    first, second, third = result.out.splitlines()
    assert first.startswith("Equal within 0.01 nats: over 10 responses (")
    assert "the log-probabilities differ by at most" in first
    assert second.startswith("Per token: at most ")
    assert third == f"Model: {tmp_path}/out (float32)"
    run("calm", SHORT, f"model.name_or_path={tmp_path}/out")
    lineage = json.loads((tmp_path / "calm" / "manifest.json").read_text())["lineage"]
    record = json.loads((tmp_path / "out" / MERGE_RECORD).read_text())
    assert lineage["merged_from"] == record["fingerprint"]
    assert lineage["ancestors"] == record["ancestors"]


def test_half_precision_above_the_tolerance_is_refused(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Nothing is left behind, and what was in OUT before still is."""
    run("kind", SHORT, LORA)
    arguments = ("merge", str(tmp_path / "kind"), str(tmp_path / "out" / "half"), "--dtype", "bfloat16")
    result = prefopt(*arguments, "--tolerance", "1e-6")
    assert result.code == 1
    assert "The merged model is not the run's policy: over 48 responses" in result.err
    assert "Nothing was written. bfloat16 rounds every weight" in result.err
    assert "raise --tolerance, or export float32" in result.err
    assert not list((tmp_path / "out").iterdir())
    assert prefopt(*arguments, "--tolerance", "5").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert prefopt(*arguments, "--tolerance", "1e-6", "--overwrite").code == 1
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["half"]
    assert (tmp_path / "out" / "half" / "model.safetensors").is_file()


def test_a_policy_that_differs_is_found_out(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault in the merge itself must not get through: here one weight comes out a little different."""
    from prefopt_cli.models import merging

    exact = merging.merged_policy

    def faulty(*arguments: object) -> torch.nn.Module:
        model = exact(*arguments)
        with torch.no_grad():
            model.lm_head.weight[7:9] += 0.1
        return model

    run("kind", SHORT, LORA)
    monkeypatch.setattr(merging, "merged_policy", faulty)
    result = prefopt("merge", str(tmp_path / "kind"), str(tmp_path / "out"))
    assert result.code == 1
    assert "The merged model is not the run's policy" in result.err
    assert not (tmp_path / "out").exists()


def test_data_that_is_gone(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    own = shutil.copy(tiny_world / "pairs.jsonl", tmp_path / "mine.jsonl")
    run("kind", SHORT, LORA, f"dataset.train={own}", "dataset.eval={}")
    arguments = ("merge", str(tmp_path / "kind"), str(tmp_path / "out"))
    Path(own).unlink()
    result = prefopt(*arguments)
    assert result.code == 2
    assert "The run's own pairs, which the merged model is compared on, cannot be read" in result.err
    assert "Name other preferences with --data FILE" in result.err
    result = prefopt(*arguments, "--data", str(tmp_path / "none.jsonl"))
    assert result.code == 2
    assert "--data FILE" not in result.err
    assert prefopt(*arguments, "--data", str(tiny_world / "heldout.jsonl")).code == 0


def test_places_that_are_refused(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    run("kind", SHORT, LORA)
    source = str(tmp_path / "kind")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for out, told in (
        (tmp_path / "kind" / "merged", "lies in the run"),
        (tiny_world, "which the run needs"),
        (tmp_path / "mine", "is no merged model"),
    ):
        result = prefopt("merge", source, str(out), "--overwrite")
        assert result.code == 2
        assert told in result.err
    assert prefopt("merge", source, str(tmp_path / "out")).code == 0
    result = prefopt("merge", source, str(tmp_path / "out"))
    assert result.code == 2
    assert "already holds a merged model" in result.err
    assert prefopt("merge", source, str(tmp_path / "out"), "--overwrite").code == 0
    result = prefopt("merge", str(tmp_path / "out"), str(tmp_path / "again"))
    assert result.code == 2
    assert "is a merged model already" in result.err
    # A model that a later run started from is not replaced by that run's.
    run("calm", SHORT, f"model.name_or_path={tmp_path}/out")
    result = prefopt("merge", str(tmp_path / "calm"), str(tmp_path / "out"), "--overwrite")
    assert result.code == 2
    assert "out, which the run needs" in result.err


def test_runs_that_cannot_be_merged(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    result = prefopt("merge", str(tmp_path / "none"), str(tmp_path / "out"))
    assert result.code == 2
    assert "RUN: there is no run in" in result.err
    run("kind", SHORT, LORA)
    (tmp_path / "away").mkdir()
    (tmp_path / "kind").rename(tmp_path / "away" / "kind")
    found = prefopt(
        "merge", str(tmp_path / "kind"), str(tmp_path / "out"), "--runs-dir", str(tmp_path / "away")
    )
    assert found.code == 0, found.err
    manifest = tmp_path / "away" / "kind" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "interrupted"}))
    result = prefopt("merge", str(tmp_path / "away" / "kind"), str(tmp_path / "second"))
    assert result.code == 2
    assert "has no finished policy (its status is 'interrupted')" in result.err


def test_one_process_merges(prefopt: Prefopt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = prefopt("merge", str(tmp_path / "kind"), str(tmp_path / "out"))
    assert result.code == 2
    assert "the work of one process" in result.err


def test_a_quantised_base(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """Dequantised before the adapter is merged in; what is saved is a plain model."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(
        tiny_world / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(base)
    run("kind", SHORT, LORA, f"model.name_or_path={base}")
    result = prefopt("merge", str(tmp_path / "kind"), str(tmp_path / "out"), "--tolerance", "0.1", "--json")
    assert result.code == 0, result.err
    assert 0 < json.loads(result.out)["difference"]["max"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.fixture
def few_bits(run: Run) -> Run:  # noqa: F811
    """Trains an adapter on weights that are quantised while they are loaded."""
    pytest.importorskip("bitsandbytes")

    def start(bits: int) -> Any:
        return run("kind", SHORT, LORA, f"quantization.bits={bits}", "training.learning_rate=0.03")

    return start


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_that_were_trained_on(few_bits: Run, prefopt: Prefopt, tmp_path: Path, bits: int) -> None:
    """Dequantised they make the very policy; the original ones make another, which is measured and said."""
    few_bits(bits)
    told = {}
    for base in ("dequantized", "original"):
        result = prefopt("merge", str(tmp_path / "kind"), str(tmp_path / base), "--base", base, "--json")
        assert result.code == 0, result.err
        told[base] = json.loads(result.out)
        assert (told[base]["merged_into"], told[base]["quantization"]["bits"]) == (base, bits)
        record = json.loads((tmp_path / base / MERGE_RECORD).read_text())
        assert record["difference"] == told[base]["difference"]
        assert "quantization_config" not in json.loads((tmp_path / base / "config.json").read_text())
        AutoModelForCausalLM.from_pretrained(tmp_path / base)
    same, other = (told[base]["difference"]["mean"] for base in ("dequantized", "original"))
    assert same < 1e-3
    assert other > 10 * same
    assert (told["dequantized"]["tolerance"], told["original"]["tolerance"]) == (0.01, None)
    card = (tmp_path / "original" / "README.md").read_text()
    assert f"trained on {bits}-bit" in card
    assert "another policy than the one that was trained" in card
    assert f"{told['original']['difference']['mean']:.2g} nats on average" in card
    # The merged policy is a start like any other, and knows its line.
    assert "kind" in prefopt("lineage", str(tmp_path / "dequantized")).out


def test_what_the_user_is_told(few_bits: Run, prefopt: Prefopt, run: Run, tmp_path: Path) -> None:  # noqa: F811
    few_bits(4)
    place, out = str(tmp_path / "kind"), str(tmp_path / "out")
    result = prefopt("merge", place, out, "--base", "original", "--tolerance", "1e-9")
    assert result.code == 1
    assert "others than the quantised ones that it was trained on; leave --base out" in result.err
    assert not Path(out).exists()
    assert "Equal within 0.01 nats" in prefopt("merge", place, out).out
    merged = prefopt("merge", place, out, "--base", "original", "--overwrite").out
    assert "Merged into the original weights: another policy" in merged
    assert "Measured: over 48 responses" in merged
    run("plain", SHORT, LORA)
    result = prefopt("merge", str(tmp_path / "plain"), str(tmp_path / "new"), "--base", "dequantized")
    assert result.code == 2
    assert "--base: the run was not trained on quantised weights" in result.err


def test_a_run_on_few_bits_is_evaluated_and_gone_on_from(
    few_bits: Run, prefopt: Prefopt, tmp_path: Path
) -> None:
    """By its own weights, and its reference by the same."""
    few_bits(4)
    result = prefopt("eval", str(tmp_path / "kind"), "--json")
    assert result.code == 0, result.err
    assert "quantised: 4-bit" in result.out
    refused = prefopt("eval", str(tmp_path / "kind"), "quantization.bits=8")
    assert refused.code == 2
    assert "the run has settled quantization" in refused.err
    lineage = prefopt("lineage", str(tmp_path / "kind"))
    assert lineage.code == 0, lineage.err
    assert "changed" not in lineage.out
