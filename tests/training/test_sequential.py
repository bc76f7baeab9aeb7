"""A stage after others: what it starts from, what it is measured against, what it takes from the stages before."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.merge_check import MergeSettings, merge_run
from prefopt_cli.models.policy import find_policy
from prefopt_cli.recipe.schema import ModelSettings
from prefopt_cli.runs import metrics
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from tests.training.conftest import MakeRecipe, Run
from tests.training.test_resume import SignalAt, assert_same, figures, weights

LORA = "adapter={type: lora, r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}"
GENTLE = "training.learning_rate=1.0e-3"
WATCHED = ("training.eval_on_start=true", "training.eval_strategy=steps", "training.eval_steps=3")
KINDS = {
    "full": ((), "continue"),
    "adapter continued": ((LORA,), "continue"),
    "new adapter": ((LORA,), "new"),
}


def after(
    *previous: RunFolder, lambdas: Any = 0.5, kind: str = "continue", **settings: Any
) -> tuple[str, str]:
    """Overrides of a stage after these."""
    names = [str(each.path) for each in previous]
    method = {
        "name": "sequential", "loss": "logistic", "beta": 0.1, "previous": names, "lambdas": lambdas,
        "adapter_per_stage": kind, **settings,
    }  # fmt: skip
    return f"model.name_or_path={names[-1]}", f"method={json.dumps(method)}"


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def training_records(run: RunFolder) -> list[dict[str, Any]]:
    return [each for each in metrics.read(run.metrics) if "loss" in each]


def log_ratios(model: Any, rows: Any) -> Tensor:
    """(B,) Delta by plain transformers, one response at a time."""
    found = []
    for row in rows:
        sides = []
        for response in row["response_ids"][:2]:
            prompt = row["prompt_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            sides.append(logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
        found.append(sides[0] - sides[1])
    return torch.stack(found)


def plain_policy(folder: str | Path) -> Any:
    """As somebody without prefopt loads it."""
    if (Path(folder) / "adapter_config.json").is_file():
        return AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_0_is_naive_sequential_training_step_by_step(run: Run, kind: str) -> None:
    options, per_stage = KINDS[kind]
    first = run("first", *options).run
    naive = run("naive", *options, f"model.name_or_path={first.path}", *WATCHED).run
    own = run("own", *options, *WATCHED, *after(first, lambdas=0, kind=per_stage)).run
    if kind == "new adapter":  # gpo goes on with the adapter; only the start is the same
        assert training_records(own)[0]["loss"] == training_records(naive)[0]["loss"]
        return
    ours, theirs = weights(own), weights(naive)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    renamed = ("gpo/", "sequential/", "runtime", "per_second", "total_flos", "train_loss")
    for mine, other in zip(figures(own), figures(naive), strict=True):
        shared = [key for key in other if not any(word in key for word in renamed)]
        assert [mine[key] for key in shared] == [other[key] for key in shared]
        for key in (key for key in other if key.endswith("gpo/gradient_weight")):
            assert mine[key.replace("gpo/", "sequential/")] == other[key]


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_is_exactly_0_at_step_0(run: Run, kind: str) -> None:
    """The reference is the policy that the last stage exported, to the last bit."""
    options, per_stage = KINDS[kind]
    stages = [run("first", GENTLE, *options).run]
    for number in (2, 3):
        stages.append(run(f"stage{number}", GENTLE, *options, *WATCHED, *after(*stages, kind=per_stage)).run)
    for stage in stages[1:]:
        first = training_records(stage)[0]
        assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (0, 0, 0)
        assert training_records(stage)[-1]["rewards/margins"] != 0
        start = metrics.read(stage.metrics)[0]  # batches of an evaluation are laid out in another way
        assert start["eval_heldout_rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_margins_of_earlier_stages_are_those_of_the_policies_that_were_exported(
    run: Run, make_recipe: MakeRecipe, tiny_world: Path, kind: str
) -> None:
    options, per_stage = KINDS[kind]
    first = run("first", GENTLE, *options, "method.beta=0.3").run
    lambdas = {"first": 0.7}
    second = run("second", GENTLE, *options, *after(first, lambdas=lambdas, kind=per_stage, beta=0.2)).run
    chained = after(first, second, lambdas={"first": 0.4, "second": 0.9}, kind=per_stage)
    third = run("third", GENTLE, *options, *WATCHED, *chained).run
    rows = prepare(make_recipe("data"), Silent()).tokens.eval["heldout"]
    deltas = [
        log_ratios(plain_policy(each), rows) for each in (tiny_world / "model", first.model, second.model)
    ]
    margin_1 = 0.3 * (deltas[1] - deltas[0])
    margin_2 = 0.2 * (deltas[2] - deltas[1]) - 0.7 * margin_1
    start = metrics.read(third.metrics)[0]
    tolerance = {"abs": 1e-4}
    assert start["eval_heldout_sequential/previous_margin_first"] == pytest.approx(
        float(margin_1.mean()), **tolerance
    )
    assert start["eval_heldout_sequential/previous_margin_second"] == pytest.approx(
        float(margin_2.mean()), **tolerance
    )
    expected = torch.nn.functional.softplus(
        0.4 * margin_1 + 0.9 * margin_2
    )  # the policy is its reference yet
    assert start["eval_heldout_loss"] == pytest.approx(float(expected.mean()), **tolerance)


def test_margins_per_token_where_a_stage_was_trained_on_them(
    run: Run, make_recipe: MakeRecipe, tiny_world: Path
) -> None:
    first = run("first", GENTLE, "method.length_normalize=true").run
    second = run("second", *WATCHED, "training.max_steps=1", *after(first)).run
    rows = prepare(make_recipe("data"), Silent()).tokens.eval["heldout"]
    base, policy = (plain_policy(each) for each in (tiny_world / "model", first.model))
    margins = []
    for row in rows:
        sides = []
        for response in row["response_ids"]:
            only = {**row, "response_ids": [response, response[:0]]}
            sides.append((log_ratios(policy, [only]) - log_ratios(base, [only])) / len(response))
        margins.append(0.1 * (sides[0] - sides[1]))
    start = metrics.read(second.metrics)[0]
    expected = float(torch.cat(margins).mean())
    assert start["eval_heldout_sequential/previous_margin_first"] == pytest.approx(expected, abs=1e-5)


def test_no_other_model_is_in_memory_during_training_and_scores_are_computed_once(run: Run) -> None:
    first = run("first", GENTLE).run
    second = run("second", GENTLE, *after(first)).run

    class Counting(Told):
        models: set[int]

        def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
            gc.collect()  # runs before this one
            alive = [each for each in gc.get_objects() if isinstance(each, PreTrainedModel)]
            heads = [each.lm_head for each in alive if hasattr(each, "lm_head")]
            self.models = {id(each) for each in heads if each.weight.device.type != "meta"}

    reporter = Counting()
    third = run("third", GENTLE, *after(first, second), reporter=reporter).run
    assert len(reporter.models) == 1
    scored = [each for each in reporter.messages if "under the policy" in each]
    # The runs before have scored the same pairs with the base and with the first stage's policy.
    assert [each.split(":")[0].split()[-1] for each in scored] == ["base", "first"]
    assert all("all from the cache" in each for each in scored)
    assert third.read_manifest()["status"] == "finished"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_at", [2, 4])
def test_resuming_is_as_if_it_never_stopped(run: Run, kind: str, stop_at: int) -> None:
    options, per_stage = KINDS[kind]
    first = run("first", GENTLE, *options).run
    stage = (*options, *after(first, kind=per_stage))
    straight = run("straight", *stage).run
    stopped = run("stopped", *stage, reporter=SignalAt(stop_at))
    assert (stopped.status, stopped.step) == ("interrupted", stop_at)
    assert_same(run("stopped", *stage, resume=True).run, straight)


def test_going_on_after_an_earlier_stage_that_was_trained_anew_is_refused(run: Run) -> None:
    first = run("first", "training.max_steps=1").run
    second = run("second", "training.max_steps=1", *after(first)).run
    third = after(first, second)
    run("third", *third, reporter=SignalAt(2))
    shutil.rmtree(first.path)
    run("first", "training.max_steps=1", GENTLE)
    with pytest.raises(UserError, match="trained anew"):
        run("third", *third, resume=True)


def combined(run: Run, name: str, *options: str) -> tuple[RunFolder, RunFolder]:
    first = run("first", *options).run
    return first, run(name, *options, *after(first, kind="new")).run


@pytest.mark.parametrize("scaling", ["false", "true"], ids=["lora", "rslora"])
def test_a_new_adapter_and_the_earlier_one_are_exported_as_one(
    run: Run, make_recipe: MakeRecipe, tiny_world: Path, scaling: str
) -> None:
    adapter = f"adapter={{type: lora, r: 4, lora_alpha: 8, target_modules: [q_proj], use_rslora: {scaling}}}"
    first, second = combined(run, "second", adapter, *WATCHED)
    config = json.loads((second.model / "adapter_config.json").read_text())
    assert config["r"] == 8
    rows = prepare(make_recipe("data"), Silent()).tokens.eval["heldout"]
    exported = log_ratios(plain_policy(second.model), rows)
    earlier = log_ratios(plain_policy(first.model), rows)
    last = [each for each in metrics.read(second.metrics) if "eval_heldout_rewards/margins" in each][-1]
    assert last["eval_heldout_rewards/margins"] == pytest.approx(
        0.1 * float((exported - earlier).mean()), abs=1e-5
    )
    # A third stage on top: two adapters again, whatever the number of stages.
    third = run("third", adapter, GENTLE, *after(first, second, kind="new")).run
    assert json.loads((third.model / "adapter_config.json").read_text())["r"] == 12
    assert training_records(third)[0]["rewards/margins"] == 0


def test_a_new_adapter_may_be_of_another_shape(run: Run) -> None:
    first = run("first", GENTLE, LORA).run
    other = "adapter={type: lora, r: 2, lora_alpha: 2, target_modules: [q_proj, o_proj, down_proj]}"
    second = run("second", GENTLE, other, *after(first, kind="new")).run
    assert training_records(second)[0]["rewards/margins"] == 0
    third = run("third", GENTLE, LORA, *after(first, second, kind="new")).run
    assert training_records(third)[0]["rewards/margins"] == 0


def test_a_new_adapter_on_what_was_merged_of_the_stage_before(run: Run, tmp_path: Path) -> None:
    first = run("first", GENTLE, LORA).run
    merged = tmp_path / "merged"
    merge_run(str(first.path), merged, MergeSettings(pairs=4), Silent(), RunFinder())
    start = f"model.name_or_path={merged}"
    second = run("second", GENTLE, LORA, *after(first, kind="new"), start).run
    assert training_records(second)[0]["rewards/margins"] == 0
    assert training_records(second)[-1]["rewards/margins"] != 0
    lineage = second.read_manifest()["lineage"]
    assert (lineage["weights"], lineage["adapter"]) == (str(merged), None)
    config = json.loads((second.model / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(merged))
    third = run("third", GENTLE, LORA, *after(first, second, kind="new")).run
    assert training_records(third)[0]["rewards/margins"] == 0


def test_only_the_new_adapter_is_trained(run: Run) -> None:
    first, second = combined(run, "second", LORA)
    before, after_ = (load_file(each.model / "adapter_model.safetensors") for each in (first, second))
    for name, matrix in before.items():
        # The ranks of the earlier adapter come first; its scale is in the matrix that is multiplied last or first.
        rank = matrix.shape[0] if "lora_A" in name else matrix.shape[1]
        part = after_[name][:rank] if "lora_A" in name else after_[name][:, :rank]
        ratio = (part / matrix)[matrix != 0]
        assert torch.allclose(ratio, ratio.mean(), rtol=1e-4), name


@pytest.fixture(scope="module")
def quantised_base(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tiny world's tokenizer, saved in 4 bits; these are kept in blocks of 64."""
    folder = tmp_path_factory.mktemp("nf4")
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
    plain.save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, dtype=torch.float32
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("per_stage", ["continue", "new"])
def test_adapters_on_a_quantised_base(run: Run, quantised_base: Path, per_stage: str) -> None:
    first = run("first", GENTLE, LORA, f"model.name_or_path={quantised_base}").run
    second = run("second", GENTLE, LORA, *after(first, kind=per_stage)).run
    third = run("third", GENTLE, LORA, *WATCHED, *after(first, second, kind=per_stage)).run
    for stage in (second, third):
        assert training_records(stage)[0]["rewards/margins"] == 0
        assert training_records(stage)[-1]["rewards/margins"] != 0
    start = metrics.read(third.metrics)[0]
    assert start["eval_heldout_rewards/margins"] == pytest.approx(0, abs=1e-3)
    base = json.loads((third.model / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(quantised_base)


def test_degrees_beside_a_sequential_stage(run: Run) -> None:
    first = run("first", GENTLE).run
    start, method = after(first)
    align = json.loads(method.removeprefix("method="))
    beside = {"name": "self_supervised", "ssl_coef": 0.5, "align": align}
    second = run("second", GENTLE, start, f"method={json.dumps(beside)}").run
    record = training_records(second)[0]
    assert record["rewards/margins"] == 0
    assert {"ssl/loss", "sequential/previous_margin_first", "sequential/gradient_weight"} <= record.keys()
    # ... and such a run is an earlier stage of another.
    third = run("third", GENTLE, *after(first, second)).run
    stages = third.read_manifest()["method"]["previous_stages"]
    assert [each["dimension"] for each in stages] == ["first", "second"]


def test_stages_of_other_losses(run: Run) -> None:
    first = run("first", GENTLE, "method.loss=squared").run
    second = run("second", GENTLE, *after(first, loss="hinge")).run
    records = training_records(second)
    margin = records[0]["sequential/previous_margin_first"]
    assert records[0]["loss"] == pytest.approx(max(0.0, 1 + 0.5 * margin), abs=0.05)


def test_manifest_knows_the_whole_line(run: Run, tiny_world: Path) -> None:
    first = run("first", LORA, "dimension=helpful").run
    second = run("second", LORA, *after(first, lambdas={"helpful": 0.5}), "dimension=harmless").run
    third = run("third", LORA, *after(first, second, lambdas={"helpful": 0.1, "harmless": 0})).run
    manifests = [each.read_manifest() for each in (first, second, third)]
    assert [each["dimension"] for each in manifests] == ["helpful", "harmless", "third"]
    lineage = manifests[2]["lineage"]
    assert lineage["base"] == str(tiny_world / "model")
    assert lineage["adapters"] == [str(first.model), str(second.model)]
    assert str(second.path) in lineage["reference"]
    assert [each["dimension"] for each in lineage["ancestors"]] == ["helpful", "harmless"]
    for entry, manifest in zip(lineage["ancestors"], manifests, strict=False):
        assert entry["run_id"] == manifest["run_id"]
        assert entry["data"] == manifest["data"]
        assert entry["method"]["beta"] == 0.1
    assert lineage["ancestors"][0]["ended_with"] == lineage["ancestors"][1]["started_from"]
    assert lineage["ancestors"][1]["ended_with"] == lineage["fingerprint"]
    weighed = [(each["dimension"], each["lambda"]) for each in manifests[2]["method"]["previous_stages"]]
    assert weighed == [("helpful", 0.1), ("harmless", 0.0)]


def test_a_moved_stage_is_found_again_and_said(run: Run, tmp_path: Path) -> None:
    first = run("first", "training.max_steps=1").run
    second = run("second", "training.max_steps=1", *after(first)).run
    third = after(first, second)
    moved = tmp_path / "archive" / "renamed"
    moved.parent.mkdir()
    first.path.rename(moved)
    with pytest.raises(UserError, match=r"there is no run.*--runs-dir"):
        run("third", *third)
    told = Told()
    found = run("third", *third, runs=RunFinder(moved.parent), reporter=told).run
    assert f"The run {first.path} was found in {moved}." in told.messages
    assert found.read_manifest()["method"]["previous_stages"][0]["run"] == str(moved)


def test_an_earlier_stage_is_not_overwritten(run: Run) -> None:
    first = run("first", "training.max_steps=1").run
    second = run("second", "training.max_steps=1", *after(first)).run
    with pytest.raises(UserError, match="cannot come after itself"):
        run("first", *after(first, second), overwrite=True)


def test_another_tokenizer_is_refused(run: Run, tmp_path: Path) -> None:
    first = run("first", "training.max_steps=1").run
    second = run("second", "training.max_steps=1", *after(first)).run
    file = first.model / "tokenizer.json"
    changed = json.loads(file.read_text())
    vocabulary = changed["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"The policy first .* has another tokenizer"):
        run("third", *after(first, second))


@pytest.mark.parametrize("key", ["use_dora: true", "modules_to_save: [lm_head]"])
def test_adapters_that_have_no_sum_are_refused_before_anything_is_trained(run: Run, key: str) -> None:
    adapter = f"adapter={{type: lora, r: 4, target_modules: [q_proj], {key}}}"
    first = run("first", adapter, "training.max_steps=1").run
    with pytest.raises(UserError, match=r"adapter_per_stage: new needs plain LoRA.*prefopt merge"):
        run("second", LORA, *after(first, kind="new"))
    assert find_policy(ModelSettings(name_or_path=str(first.path))).adapter == first.model
