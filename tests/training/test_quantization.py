"""Adapters on weights that are quantised while they are loaded: trained by every method, saved, loaded, continued."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import QUANTIZATION_RECORD, PolicySource, find_policy, fingerprint
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import ModelSettings, QuantizationSettings
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.frozen_policies import score_policy
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from tests.training.conftest import MakeRecipe, Run

pytest.importorskip("bitsandbytes")

LORA = "adapter={type: lora, r: 4, lora_alpha: 8}"
DORA = "adapter={type: lora, r: 4, lora_alpha: 8, use_dora: true}"
FOUR, EIGHT = "quantization={bits: 4}", "quantization={bits: 8}"
SHORT = ("training.max_steps=3", "training.learning_rate=1.0e-2", "training.save_steps=3", "dataset.eval={}")
GPO = "{name: gpo, beta: 0.1}"
SAMPLES = "{sample_every: 2, num_prompts: 4, max_new_tokens: 8}"
METHODS = {
    "gpo": f"method={GPO}",
    "soft": f"method={{name: soft, alpha: 0.5, kl_coef: 0.2, regularizer: {SAMPLES}}}",
    "self_supervised": f"method={{name: self_supervised, align: {GPO}, ssl_coef: 0.5}}",
}


def after(*previous: RunFolder, kind: str = "continue") -> tuple[str, str]:
    """Overrides of a sequential stage after these."""
    names = [str(each.path) for each in previous]
    method = {"name": "sequential", "previous": names, "lambdas": 0.5, "adapter_per_stage": kind}
    return f"model.name_or_path={names[-1]}", f"method={json.dumps(method)}"


def records(run: RunFolder) -> list[dict[str, Any]]:
    return [each for each in metrics.read(run.metrics) if "loss" in each]


def trained(run: RunFolder) -> dict[str, torch.Tensor]:
    return dict(load_file(run.model / "adapter_model.safetensors"))


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_trains(shared_run: Run, method: str, bits: str) -> None:
    name = next(key for key, value in METHODS.items() if value == method)
    run = shared_run(f"{name}-{bits[-2]}", LORA, bits, method, *SHORT).run
    first, *_, last = records(run)
    if name != "soft":  # its reward is the log-probability itself
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)  # scored in other batches
    assert torch.isfinite(torch.tensor(last["loss"]))
    moved = [name for name, value in trained(run).items() if "lora_B" in name and value.any()]
    assert len(moved) == 14  # every linear layer of both blocks
    assert {value.dtype for value in trained(run).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["continue", "new"])
def test_stages_on_quantised_weights(shared_run: Run, kind: str) -> None:
    """Every reward is 0 at step 0: the policy and what it is compared with are computed in the same numbers."""
    options = (LORA, FOUR, *SHORT)
    first = shared_run("gpo-4", LORA, FOUR, METHODS["gpo"], *SHORT).run
    second = shared_run(f"second-{kind}", *options, *after(first, kind=kind)).run
    third = shared_run(f"third-{kind}", *options, *after(first, second, kind=kind)).run
    for stage in (second, third):
        assert records(stage)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert records(stage)[-1]["rewards/margins"] != 0
    ancestors = third.read_manifest()["lineage"]["ancestors"]
    assert [each["quantization"]["bits"] for each in ancestors] == [4, 4]


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_magnitudes_stay_exact(shared_run: Run, bits: str) -> None:
    run = shared_run(f"dora-{bits[-2]}", DORA, bits, *SHORT).run
    dtypes = {"magnitude" in name: value.dtype for name, value in trained(run).items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert records(run)[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    # Going on from it starts exactly where it ended.
    second = shared_run(f"dora-{bits[-2]}-on", DORA, bits, *SHORT, f"model.name_or_path={run.path}").run
    assert records(second)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_layers_that_are_computed_again_have_the_same_gradients(shared_run: Run, bits: str) -> None:
    runs = [
        shared_run(
            f"again-{again}-{bits[-2]}", LORA, bits, *SHORT, f"training.gradient_checkpointing={again}"
        ).run
        for again in ("false", "true")
    ]
    kept, computed_again = (trained(run) for run in runs)
    for name, value in kept.items():
        torch.testing.assert_close(computed_again[name], value, rtol=0, atol=0)
    assert [each["grad_norm"] for each in records(runs[0])] == [
        each["grad_norm"] for each in records(runs[1])
    ]


def run_scores(run: RunFolder, make_recipe: MakeRecipe, source: PolicySource) -> tuple[Any, torch.Tensor]:
    """The rows of the tiny world, and their log-probabilities under a policy as prefopt loads it."""
    recipe = load_recipe(run.recipe, ["dataset.train.0.limit=6"])
    rows = prepare(recipe.model_copy(update={"output_dir": str(run.path)}), Silent()).tokens.train
    args = training_arguments(recipe, run, evaluates=False)
    options = {"args": args, "padding_id": 0, "reporter": Silent(), "task": "scoring"}
    found = score_policy(source, recipe, {"train": rows}, **options)
    return rows, torch.tensor(found.logps["train"])


@pytest.mark.parametrize(("bits", "adapter"), [(FOUR, LORA), (FOUR, DORA), (EIGHT, LORA)])
def test_the_card_loads_the_policy_with_plain_peft(
    shared_run: Run, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, bits: str, adapter: str
) -> None:
    """The code in the model card does it, and finds the run's own log-probabilities."""
    name = "dora-" if adapter == DORA else "gpo-"
    method = () if adapter == DORA else (METHODS["gpo"],)
    run = shared_run(f"{name}{bits[-2]}", adapter, bits, *method, *SHORT).run
    rows, expected = run_scores(run, make_recipe, find_policy(ModelSettings(name_or_path=str(run.path))))
    code = re.search(r"```python\n(.*?)```", (run.model / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(run.model)
    found: dict[str, Any] = {}
    exec(code[1], found)
    policy = found["policy"]
    assert isinstance(policy, PeftModel)
    # bitsandbytes reorders weights for inference on some processors, and computes in bfloat16 with them.
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for row, own in zip(rows, expected, strict=True):
        for response, logp in zip(row["response_ids"], own, strict=True):
            with torch.no_grad():
                ids = torch.tensor([row["prompt_ids"] + response])
                logits = policy(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()
            plain = logits.log_softmax(-1)[torch.arange(len(response)), response].sum()
            # The run's adapter is computed in bfloat16, as it was trained; peft makes it float32.
            assert plain == pytest.approx(logp.item(), rel=2e-3 if bits == FOUR else 1e-2)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_the_reference_is_computed_in_the_same_numbers(run: Run, bits: str) -> None:
    """In the same batch the policy and its reference are exactly equal, one in training mode, one in eval mode."""
    outcome = run(
        "run", LORA, bits, *SHORT, "training.max_steps=1", "training.precompute_ref_log_probs=false"
    )
    (first,) = records(outcome.run)
    assert first["rewards/margins"] == 0.0
    assert first["gpo/squared_log_ratio"] == 0.0


def test_the_cache_keeps_bits_apart(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and 4-bit scores of one base are other scores, and each is found again."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))

    def computed(name: str, *options: str) -> int:
        scores = run(name, LORA, METHODS["gpo"], *SHORT, *options).run.read_manifest()["reference_scores"]
        return int(scores["computed"])

    full = computed("full")
    assert full > 0
    assert computed("four", FOUR) == full
    assert computed("eight", EIGHT) == full
    assert [computed("full2"), computed("four2", FOUR), computed("eight2", EIGHT)] == [0, 0, 0]


def test_the_policy_of_a_run_is_quantised_as_it_was_trained(shared_run: Run, tiny_world: Path) -> None:
    run = shared_run("gpo-4", LORA, FOUR, METHODS["gpo"], *SHORT).run
    lineage = run.read_manifest()["lineage"]
    assert lineage["quantization"]["bits"] == 4
    assert "quantised: 4-bit (nf4, double quantisation)" in lineage["reference"]
    for place in (run.path, run.model):  # the folder of the adapter alone knows it, too
        source = find_policy(ModelSettings(name_or_path=str(place)))
        assert source.quantization == QuantizationSettings.model_validate(lineage["quantization"])
    bare = PolicySource(str(tiny_world / "model"))
    assert lineage["fingerprint"] == fingerprint(
        PolicySource(bare.weights, quantization=source.quantization), None
    )
    assert lineage["fingerprint"] != fingerprint(bare, None)
    assert lineage["weights_fingerprint"] == fingerprint(bare, None)


def test_an_adapter_that_was_copied_out_of_its_run(shared_run: Run, run: Run, tmp_path: Path) -> None:
    first = shared_run("gpo-4", LORA, FOUR, METHODS["gpo"], *SHORT).run
    copy = shutil.copytree(first.model, tmp_path / "copy")
    source = find_policy(ModelSettings(name_or_path=str(copy)))
    assert source.quantization == find_policy(ModelSettings(name_or_path=str(first.path))).quantization
    with pytest.raises(UserError, match=r"was trained on 4-bit .* weights, and the recipe says unquantised"):
        run("second", LORA, *SHORT, f"model.name_or_path={copy}")
    (copy / QUANTIZATION_RECORD).write_text("{")
    with pytest.raises(UserError, match=r"prefopt_quantization\.json does not say how"):
        find_policy(ModelSettings(name_or_path=str(copy)))
    plain = shared_run("plain", LORA, METHODS["gpo"], *SHORT).run
    assert not (plain.model / QUANTIZATION_RECORD).exists()


def test_the_card_knows_what_was_left_alone(run: Run) -> None:
    """All that the library was told, whatever the model calls its head, trained whole or not."""
    adapter = "adapter={type: lora, r: 4, modules_to_save: [lm_head]}"
    few = "quantization={bits: 4, skip_modules: [o_proj]}"
    outcome = run("run", adapter, few, *SHORT, "training.max_steps=1")
    found = outcome.run.read_manifest()["lineage"]["kept_modules"]
    assert found == ["lm_head", "o_proj"]
    assert f"llm_int8_skip_modules={found})" in (outcome.run.model / "README.md").read_text()


OTHERS = {
    "other bits": (LORA, EIGHT),
    "other levels": (LORA, "quantization={bits: 4, quant_type: fp4}"),
    "none": (LORA,),
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_an_adapter_stays_on_its_weights(shared_run: Run, run: Run, options: tuple[str, ...]) -> None:
    first = shared_run("gpo-4", LORA, FOUR, METHODS["gpo"], *SHORT).run
    with pytest.raises(UserError) as refused:
        run("second", *SHORT, *options, f"model.name_or_path={first.path}")
    told = str(refused.value)
    assert "was trained on 4-bit (nf4, double quantisation) weights, and the recipe says" in told
    assert "Write quantization: {bits: 4}, or make one plain model of both with `prefopt merge`" in told
    assert "Write quantization: none" not in told


def test_an_adapter_on_full_weights_is_not_moved_to_few_bits(run: Run) -> None:
    first = run("first", LORA, *SHORT).run
    with pytest.raises(
        UserError, match=r"unquantised weights, and the recipe says 8-bit.*Write quantization: none"
    ):
        run("second", LORA, EIGHT, *SHORT, f"model.name_or_path={first.path}")


def test_all_weights_are_not_trained_on_few_bits(shared_run: Run, run: Run) -> None:
    first = shared_run("gpo-4", LORA, FOUR, METHODS["gpo"], *SHORT).run
    with pytest.raises(UserError, match=r"adapter: none: .* was loaded in 4 bits.*with `prefopt merge`"):
        run("second", *SHORT, f"model.name_or_path={first.path}")


FSDP = "launch={engine: fsdp, processes: 2}"


def test_a_folder_of_other_bits(
    run: Run, make_recipe: MakeRecipe, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base = tmp_path / "base"
    settings = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(tiny_world / "model", quantization_config=settings).save_pretrained(
        base
    )
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(base)
    start = partial(run, "run", *SHORT, f"model.name_or_path={base}")
    with pytest.raises(UserError, match="quantised to 8 bits already, and the recipe says bits: 4"):
        start(LORA, FOUR)
    with pytest.raises(UserError, match=r"adapter: none: the weights of .* are quantised"):
        start()
    told: list[str] = []

    class Told(Silent):
        def message(self, text: str) -> None:
            told.append(text)

    for launch in (FSDP, "launch={engine: deepspeed, zero_stage: 3, processes: 2}"):
        with pytest.raises(UserError, match=r"takes weights apart, which those of .*/base do not bear"):
            start(LORA, launch)
    launched = make_recipe("launched", LORA, f"model.name_or_path={base}")
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # by accelerate's launcher, unknown to the recipe
        with pytest.raises(UserError, match="kept in 8 bits"):
            prepare(launched, Silent())
    outcome = start(LORA, EIGHT, reporter=Told())
    assert any("are quantised already, and are used as they are" in each for each in told)
    assert outcome.run.read_manifest()["lineage"]["quantization"] is None


def test_going_on_bit_for_bit(run: Run) -> None:
    whole = run("whole", LORA, FOUR, *SHORT, "training.max_steps=4", "training.save_steps=2").run
    shutil.rmtree(whole.checkpoints / "checkpoint-4")
    before = trained(whole)
    shutil.rmtree(whole.model)
    whole.update_manifest(status="interrupted")
    again = run("whole", LORA, FOUR, *SHORT, "training.max_steps=4", "training.save_steps=2", resume=True).run
    for name, value in trained(again).items():
        assert torch.equal(value, before[name]), name
    whole.update_manifest(status="interrupted")
    with pytest.raises(UserError, match=r"quantization\.bits"):
        run("whole", LORA, EIGHT, *SHORT, "training.max_steps=4", "training.save_steps=2", resume=True)


def test_what_does_not_work_here_is_told_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe whose bits do not work here ends before its data is read."""
    from prefopt_cli.models import quantising

    def fails(bits: int, device: str) -> None:
        raise RuntimeError("no such kernel")

    quantising.require_working.cache_clear()
    monkeypatch.setattr(quantising, "_try_layer", fails)
    with pytest.raises(UserError, match="cannot train on weights of 4 bits on this machine's processor"):
        run("run", LORA, FOUR, "dataset.train=not-there.jsonl")
