"""Soft Preference Optimization as it trains: lists, the KL on the policy's own samples, going on bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.errors import UserError
from prefopt_cli.losses.soft import soft_best_of_n_loss, soft_pair_loss, soft_ranked_loss
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training import run as module
from tests.training.conftest import LORA, Run
from tests.training.test_resume import SignalAt, assert_same

SAMPLES = "{sample_every: 3, num_prompts: 5, max_new_tokens: 6}"
SOFT = f"method={{name: soft, alpha: 0.5, kl_coef: 0.2, regularizer: {SAMPLES}}}"
NO_KL = "method={name: soft, alpha: 0.5, kl_coef: 0}"
UNCHANGED = ("training.learning_rate=0", "training.max_steps=4", "training.save_steps=4")


def logged(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in metrics.read(run.metrics) if "loss" in record]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Lists of two to four responses, with ties."""
    rankings = [[0, 1, 2], [1, 0], [0, 0, 1, 2], [2, 1, 1, 0], [0, 1, 1], [3, 1, 0]]
    rows = [
        {
            "prompt": f"Human: Question {number}?\nAssistant:",
            "responses": [f" answer {n} " + "word " * (n + number % 3) for n in range(len(ranking))],
            "ranking": ranking,
        }
        for number, ranking in enumerate(rankings * 4)
    ]
    return write(tmp_path / "lists.jsonl", rows)


def logps(folder: Path, prompt: str, responses: list[str]) -> torch.Tensor:
    """(N,) summed log-probabilities of whole responses under a saved policy, one plain forward pass each."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for response in responses:
        context = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            each = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(each[len(context) - 1 :].sum())
    return torch.stack(found)


def expected(rows: list[dict[str, Any]], model: Path, alpha: float, kind: str) -> float:
    """The mean loss of lists, each computed on its own."""
    losses = []
    for row in rows:
        own = logps(model, row["prompt"], row["responses"])[None]
        there = torch.ones_like(own, dtype=torch.bool)
        if kind == "best":
            loss = soft_best_of_n_loss(own, torch.tensor([row["best"]]), there, alpha=alpha)
        else:
            loss = soft_ranked_loss(own, torch.tensor([row["ranking"]]), there, alpha=alpha)
        losses.append(loss)
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_ranked_lists_of_varying_length_train_on_the_loss_of_each(
    run: Run, lists: Path, tiny_world: Path, layout: str
) -> None:
    """Without a learning rate, an epoch's mean loss is that of the rows one by one."""
    outcome = run(
        "ranked",
        NO_KL,
        f"dataset.train={lists}",
        "dataset.eval={}",
        f"training.attention_layout={layout}",
        "training.learning_rate=0",
        "training.max_steps=6",
        "training.logging_steps=6",
    )
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    (record,) = logged(outcome.run)
    assert record["loss"] == pytest.approx(expected(rows, tiny_world / "model", 0.5, "ranked"), rel=1e-5)


def test_best_of_n(run: Run, lists: Path, tiny_world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    for row in rows:
        row["best"] = row.pop("ranking").index(0)
    best = write(tmp_path / "best.jsonl", rows)
    outcome = run(
        "best", NO_KL, f"dataset.train={best}", "dataset.eval={}", *UNCHANGED[:1], "training.logging_steps=6"
    )
    (record,) = logged(outcome.run)
    assert record["loss"] == pytest.approx(expected(rows, tiny_world / "model", 0.5, "best"), rel=1e-5)


@pytest.mark.parametrize(
    ("lists_as", "pairs"), [("auto", 3 + 1 + 5 + 5 + 2 + 3), ("adjacent_pairs", 2 + 1 + 3 + 4 + 2 + 2)]
)
def test_pairwise_methods_take_lists_as_pairs(run: Run, lists: Path, lists_as: str, pairs: int) -> None:
    """One epoch in batches of four; every ranking comes four times."""
    epoch = ("training.max_steps=-1", "training.num_train_epochs=1", "dataset.eval={}")
    outcome = run("pairs", f"dataset.train={lists}", f"dataset.lists={lists_as}", *epoch)
    assert outcome.step == pairs


def test_the_first_steps_loss_of_pairs(run: Run, tiny_world: Path) -> None:
    outcome = run(
        "first",
        NO_KL,
        "dataset.eval={}",
        "training.learning_rate=0",
        "training.max_steps=24",
        "training.logging_steps=24",
    )
    losses = []
    for line in (tiny_world / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        chosen, rejected = logps(
            tiny_world / "model", row["prompt"], [row["chosen"], row["rejected"]]
        ).unbind()
        losses.append(soft_pair_loss(chosen[None], rejected[None], alpha=0.5))
    (record,) = logged(outcome.run)
    assert record["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert record["rewards/margins"] == pytest.approx(
        0.5 * (record["logps/chosen"] - record["logps/rejected"]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("adapter", "method", "copies"), [("none", NO_KL, False), ("none", SOFT, True), (LORA, SOFT, False)]
)
def test_a_second_model_is_in_memory_only_where_the_kl_needs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, adapter: str, method: str, copies: bool
) -> None:
    trainers: list[Any] = []
    build = module.build_trainer

    def keep(*arguments: Any, **options: Any) -> Any:
        trainers.append(build(*arguments, **options))
        return trainers[-1]

    monkeypatch.setattr(module, "build_trainer", keep)
    outcome = run("memory", method, adapter if "=" in adapter else "adapter=none", "training.max_steps=1")
    assert (trainers[0].ref_model is not None) == copies
    assert outcome.run.samples.exists() == ("kl/ref" in logged(outcome.run)[-1]) == (method == SOFT)


@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=["full", "lora"])
def test_kl_starts_at_zero_and_is_part_of_the_loss(run: Run, overrides: tuple[str, ...]) -> None:
    """The policy begins as its reference; later the objective is the preference term and the weighted KL."""
    first, *later = logged(run("kl", SOFT, *overrides).run)
    # An adapter begins as the reference, and LoRA dropout alone tells them apart.
    assert first["kl/ref"] == pytest.approx(0, abs=1e-5 if not overrides else 0.05)
    assert later[-1]["kl/ref"] > 1e-3
    for record in later:
        total = record["soft/preference_loss"] + 0.2 * record["kl/ref"]
        assert record["loss"] == pytest.approx(total, rel=1e-6)


def test_kl_pulls_towards_the_reference(run: Run) -> None:
    weak = logged(
        run("weak", SOFT, "method.kl_coef=1e-6", "training.max_steps=30", "training.save_steps=30").run
    )
    strong = logged(
        run("strong", SOFT, "method.kl_coef=20", "training.max_steps=30", "training.save_steps=30").run
    )
    assert strong[-1]["kl/ref"] < 0.2 * weak[-1]["kl/ref"]
    assert strong[-1]["rewards/margins"] < weak[-1]["rewards/margins"]


def test_samples_are_drawn_on_time_and_kept_for_reading(run: Run, tiny_world: Path) -> None:
    outcome = run("kept", SOFT, "training.max_steps=7", "training.save_steps=7")
    kept = metrics.read(outcome.run.samples)
    assert [record["step"] for record in kept] == [1, 1, 1, 4, 4, 4, 7, 7, 7]
    prompts = {json.loads(line)["prompt"] for line in (tiny_world / "pairs.jsonl").read_text().splitlines()}
    assert all(record["prompt"].removeprefix("<s>") in prompts for record in kept)
    assert all(1 <= record["tokens"] <= 6 for record in kept)
    assert all(record["ended"] == record["response"].endswith("</s>") for record in kept)
    # Other prompts and other texts each time.
    assert len({record["row_id"] for record in kept}) == len(kept)


CASES = {
    "full": (),
    "lora with dropout": (LORA,),
    "accumulation": ("training.gradient_accumulation_steps=2", "training.logging_steps=4"),
    "sequence": ("method.regularizer.estimator=sequence",),
    "weighted": ("method.mu={gamma: 0.5}",),
}


@pytest.mark.parametrize("overrides", [pytest.param(case, id=name) for name, case in CASES.items()])
@pytest.mark.parametrize("stop_at", [3, 4])
def test_resumed_run_equals_one_that_never_stopped(
    run: Run, overrides: tuple[str, ...], stop_at: int
) -> None:
    """Between two draws, when the samples in use are of older weights, and where a draw is due at once."""
    straight = run("straight", SOFT, *overrides)
    run("stopped", SOFT, *overrides, reporter=SignalAt(stop_at))
    resumed = run("stopped", SOFT, *overrides, resume=True)
    assert_same(resumed.run, straight.run)
    assert metrics.read(resumed.run.samples) == metrics.read(straight.run.samples)


def test_sampling_leaves_the_order_of_the_data_and_dropout_alone(run: Run) -> None:
    """With a KL that weighs nothing, training is what it is without sampling."""
    dropout = "adapter={type: lora, r: 4, lora_dropout: 0.1}"
    without, with_samples = (
        logged(run(name, SOFT, dropout, f"method.kl_coef={weight}").run)
        for name, weight in (("without", 0), ("with", 1e-30))
    )
    # Dropout in the KL's own forward pass takes random numbers; the first step has not seen its effect yet.
    assert without[0]["loss"] == pytest.approx(with_samples[0]["loss"], rel=1e-6)
    plain = "adapter=none"
    without, with_samples = (
        logged(run(f"{name}-plain", SOFT, plain, f"method.kl_coef={weight}").run)
        for name, weight in (("without", 0), ("with", 1e-30))
    )
    for one, other in zip(without, with_samples, strict=True):
        assert one["loss"] == pytest.approx(other["soft/preference_loss"], rel=1e-5)


def test_accumulation_takes_every_sample_once(run: Run) -> None:
    """5 samples over micro-batches of 2 x 2, 4 x 1 (and 5 samples in 7 groups at most) weigh as in one batch."""
    unchanged = (
        "training.learning_rate=0",
        "training.logging_steps=1",
        "training.max_steps=2",
        "training.save_steps=2",
    )
    found = []
    for micro_batches in (1, 2, 4, 8):
        outcome = run(
            f"micro-{micro_batches}",
            SOFT,
            *unchanged,
            f"training.gradient_accumulation_steps={micro_batches}",
            f"training.per_device_train_batch_size={8 // micro_batches}",
        )
        record = logged(outcome.run)[0]
        found.append((record["entropy/sampled"], record["sample/length"], record["grad_norm"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_separate_prompts(run: Run, tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt": f"Human: Other {n}?\nAssistant:"} for n in range(4)]
    )
    outcome = run("separate", SOFT, f"method.regularizer.prompts={prompts}")
    kept = metrics.read(outcome.run.samples)
    assert {record["prompt"][:14] for record in kept} == {"<s>Human: Othe"}
    receipt = outcome.run.read_manifest()["receipt"]["sets"]["prompts"]
    assert receipt["rows"] == 4


def test_prompts_without_room_are_counted_and_none_is_an_error(run: Run, tmp_path: Path) -> None:
    class Messages(SignalAt):
        def __init__(self) -> None:
            super().__init__(-1)
            self.texts: list[str] = []

        def message(self, text: str) -> None:
            self.texts.append(text)

    rows = [{"prompt": "Human: short?\nAssistant:"}, {"prompt": "Human: " + "what " * 20 + "?\nAssistant:"}]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    listener = Messages()
    room = ("dataset.max_length=200", f"method.regularizer.prompts={prompts}")
    run(
        "room",
        SOFT,
        *room,
        "method.regularizer.max_new_tokens=200",
        "training.max_steps=1",
        reporter=listener,
    )
    assert any("1 are left out" in text and "200 new tokens" in text for text in listener.texts)
    with pytest.raises(UserError, match=r"max_new_tokens.*no prompt of dataset.train fits"):
        run("none", SOFT, "method.regularizer.max_new_tokens=4000")


def test_weights_are_for_pairs(run: Run, lists: Path) -> None:
    with pytest.raises(UserError, match=r"method\.mu.*dataset\.lists: all_pairs"):
        run("weighted", NO_KL, "method.mu={gamma: 1.0}", f"dataset.train={lists}")
    run(
        "as-pairs",
        NO_KL,
        "method.mu={gamma: 1.0}",
        f"dataset.train={lists}",
        "dataset.lists=all_pairs",
        "dataset.eval={}",
    )


def test_a_kl_that_is_not_finite_stops_with_the_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt_cli.errors import PrefoptError
    from prefopt_cli.training import soft

    real = soft.sampled_kl
    monkeypatch.setattr(soft, "sampled_kl", lambda *args, **options: real(*args, **options) * float("nan"))
    with pytest.raises(PrefoptError, match=r"step 1: the KL to the reference.*samples\.jsonl"):
        run("nan", SOFT)


def changed_model(tiny_world: Path, folder: Path, tokens: list[str], **generation: Any) -> Path:
    """The tiny model with a tokenizer that has more tokens than it, and generation settings of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokens:
        tokenizer.add_special_tokens({"pad_token": tokens[0], "additional_special_tokens": tokens[1:]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_padding_token_that_the_model_does_not_have(
    run: Run, tiny_world: Path, tmp_path: Path, layout: str
) -> None:
    folder = changed_model(tiny_world, tmp_path / "model", ["[PAD]"])
    plain = run("plain", SOFT, f"training.attention_layout={layout}")
    padded = run("pad", SOFT, f"training.attention_layout={layout}", f"model.name_or_path={folder}")
    assert [record["loss"] for record in logged(padded.run)] == [
        record["loss"] for record in logged(plain.run)
    ]


def test_prompts_of_tokens_that_the_model_does_not_have(run: Run, tiny_world: Path, tmp_path: Path) -> None:
    folder = changed_model(tiny_world, tmp_path / "model", ["[PAD]", "<|extra|>"])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Human: <|extra|>?\nAssistant:"}])
    with pytest.raises(UserError, match=r"dataset \(prompts\): the tokenizer gives the token id"):
        run("extra", SOFT, f"model.name_or_path={folder}", f"method.regularizer.prompts={prompts}")
    assert not (tmp_path / "extra").exists()


def test_generation_settings_that_cannot_be_saved_do_not_end_the_run(
    run: Run, tiny_world: Path, tmp_path: Path
) -> None:
    """As older models have them: sampling settings without do_sample."""
    folder = changed_model(tiny_world, tmp_path / "model", [], top_k=20, top_p=0.8, repetition_penalty=1.1)
    plain, own = run("plain", SOFT), run("own", SOFT, f"model.name_or_path={folder}")
    assert own.status == "finished"
    # Samples are the policy's, whatever its settings.
    assert metrics.read(own.run.samples) == metrics.read(plain.run.samples)


def test_the_start_is_evaluated_once_however_often_a_run_goes_on(run: Run) -> None:
    start = (SOFT, "training.eval_on_start=true")
    straight = run("straight", *start)
    run("stopped", *start, reporter=SignalAt(4))
    assert_same(run("stopped", *start, resume=True).run, straight.run)


def test_the_longest_sample_follows_from_the_context(run: Run) -> None:
    """256 tokens, or half of a context of less than twice as many: the tiny model's holds 256."""
    outcome = run("default", "method={name: soft, regularizer: {num_prompts: 2}}", "training.max_steps=1")
    assert logged(outcome.run)[0]["sample/length"] <= 128


def test_an_evaluation_does_not_depend_on_how_pairs_are_batched(run: Run) -> None:
    """Weights would: their mean is over the batch."""
    losses = []
    for size in (1, 5, 24):
        outcome = run(
            f"batch-{size}",
            NO_KL,
            "method.mu={gamma: 0.5}",
            f"training.per_device_eval_batch_size={size}",
            "training.max_steps=2",
        )
        losses.append(outcome.metrics["eval_heldout_loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
