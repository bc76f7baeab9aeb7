"""Self-supervised Preference Optimization as it trains: beside any alignment loss, and leaving that as it is."""

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.degree_checks import require_metric
from prefopt_cli.training.guard import FiniteGuard, NotFiniteError
from prefopt_cli.training.head_optimizer import HEAD_FILE, saved_head
from prefopt_cli.training.objectives import Objective, find_objective
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import build_trainer
from prefopt_cli.training.self_supervised import SelfSupervisedTrainer
from tests.cli.conftest import Prefopt, prefopt  # noqa: F401 - a fixture
from tests.scoring.build import relative
from tests.tiny import write_pairs
from tests.training.conftest import LORA, RECIPE, MakeRecipe, Run
from tests.training.test_degree_batches import told
from tests.training.test_resume import SignalAt, assert_same

GPO = "{name: gpo, loss: logistic, beta: 0.1}"
SQUARED = "{name: gpo, loss: squared, beta: 0.1, length_normalize: true}"
SOFT = "{name: soft, alpha: 0.5, kl_coef: 0}"
WITH_KL = (
    "{name: soft, alpha: 0.5, kl_coef: 0.2, "
    "regularizer: {sample_every: 3, num_prompts: 5, max_new_tokens: 6}}"
)
ALIGNS = {"logistic": GPO, "squared": SQUARED, "soft": SOFT, "soft with KL": WITH_KL, "lists": SOFT}

WITHOUT_DROPOUT = LORA.replace("0.1}", "0.0}")


def beside(align: str, **settings: Any) -> str:
    """The method around an alignment loss; the head's learning rate suits the tiny model's 32 states."""
    given = {"head_learning_rate": 3e-3, **settings}
    inside = ", ".join(f"{name}: {value}" for name, value in given.items())
    return f"method={{name: self_supervised, align: {align}, {inside}}}"


def logged(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in metrics.read(run.metrics) if "loss" in record]


def head_of(run: RunFolder, step: int = 6) -> dict[str, Tensor]:
    return saved_head(run.checkpoints / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of two to four responses, with ties; some have no key phrase."""
    rankings = [[0, 1, 2], [1, 0], [0, 0, 1, 2], [2, 1, 1, 0], [0, 1, 1], [3, 1, 0]]
    says = [
        " The cats and the dogs are at sea.",
        " Red tea with the big black bread.",
        " It is.",
        " No trains of",
    ]
    rows = [
        {
            "prompt": f"Human: Question {number}?\nAssistant:",
            "responses": [says[(n + number) % 4] + " snow" * n for n in range(len(ranking))],
            "ranking": ranking,
        }
        for number, ranking in enumerate(rankings * 4)
    ]
    path = tmp_path_factory.mktemp("lists") / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the alignment loss stays what it is


NOTHING = 1e-20
"""A weight with which all is computed and nothing changes: Adam's epsilon swallows the head's gradients."""


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ALIGNS)
def test_the_alignment_loss_is_what_it_is_alone(shared_run: Run, lists: Path, name: str, layout: str) -> None:
    """Every step's loss and the weights at the end, up to the rounding of sums over other batches of tokens."""
    align = ALIGNS[name]
    options = [
        f"training.attention_layout={layout}",
        "training.learning_rate=3e-4",
        "training.eval_on_start=true",
    ]
    if name == "lists":
        options += [f"dataset.train={lists}", f"dataset.eval.heldout={lists}"]
    alone = shared_run(f"{name}-{layout}-alone", f"method={align}", *options).run
    both = shared_run(f"{name}-{layout}", beside(align, ssl_coef=NOTHING), *options).run

    records = list(zip(logged(both), logged(alone), strict=True))
    assert len(records) == 6
    for ours, theirs in records:
        assert ours["align/loss"] == pytest.approx(theirs["loss"], abs=1e-6, rel=1e-6)
        assert ours["loss"] == ours["align/loss"]
        missing = theirs.keys() - ours.keys()
        assert not missing
        for key in theirs.keys() - {"num_tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
        assert ours["num_tokens"] > theirs["num_tokens"]
    assert records[0][0]["loss"] != pytest.approx(records[-1][0]["loss"], abs=1e-3), "nothing was learnt"

    evaluated = [
        [record for record in metrics.read(run.metrics) if "eval_heldout_loss" in record]
        for run in (both, alone)
    ]
    for ours, theirs in zip(*evaluated, strict=True):
        for key in theirs:
            if "runtime" not in key and "per_second" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
        assert "eval_heldout_ssl/accuracy" in ours

    ours, theirs = (load_file(run.model / "model.safetensors") for run in (both, alone))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert (ours[key] - theirs[key]).abs().max() < 1e-6, key
    assert all(weight.abs().max() < 1e-12 for weight in head_of(both).values())


def test_with_weight_zero_it_is_the_alignment_loss_to_the_bit(shared_run: Run) -> None:
    """Nothing is degraded, and there is no head."""
    options = [
        "training.attention_layout=packed",
        "training.learning_rate=3e-4",
        "training.eval_on_start=true",
    ]
    alone = shared_run("logistic-packed-alone", f"method={GPO}", *options).run
    without = shared_run("without", beside(GPO, ssl_coef=0), *options).run
    timing = ("runtime", "per_second")
    ours, theirs = (
        [
            {key: value for key, value in record.items() if not key.endswith(timing)}
            for record in metrics.read(run.metrics)
        ]
        for run in (without, alone)
    )
    assert ours == theirs
    weights, expected = (load_file(run.model / "model.safetensors") for run in (without, alone))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not list(without.checkpoints.glob(f"*/{HEAD_FILE}"))
    assert without.read_manifest()["receipt"]["sets"]["train"]["degrees"] is None


def test_with_weight_zero_the_head_has_no_gradient(make_recipe: MakeRecipe) -> None:
    """Of a trainer that was made with it all the same."""
    trainer = make_trainer(make_recipe("run", beside(GPO, ssl_coef=1.0)), layout=PIECES)
    trainer.degrees = trainer.degrees.model_copy(update={"ssl_coef": 0.0})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(not parameter.grad.any() for parameter in trainer.degree_head.parameters())


def test_the_heads_default_rate_goes_by_the_width_of_its_states(make_recipe: MakeRecipe) -> None:
    """1 / hidden size; the tiny model has 32 states."""
    trainer = make_trainer(make_recipe("run", beside(GPO, head_learning_rate="null")), layout=PIECES)
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    assert trainer.head_optimizer.learning_rate == pytest.approx(1 / 32)


def test_the_objective_is_the_sum(shared_run: Run) -> None:
    """Rows of this data all have degrees, so the mean over rows is that over the rows that have."""
    records = logged(shared_run("sum", beside(GPO, ssl_coef=0.5)).run)
    assert records[0]["ssl/loss"] == pytest.approx(math.log(4), abs=1e-6), "the head begins with zeros"
    assert records[-1]["ssl/loss"] != pytest.approx(math.log(4), abs=1e-4)
    for record in records:
        assert record["loss"] == pytest.approx(record["align/loss"] + 0.5 * record["ssl/loss"], rel=1e-6)
        levels = [record[key] for key in record if key.startswith("ssl/accuracy_level_")]
        assert min(levels) <= record["ssl/accuracy"] <= max(levels)


def test_rows_without_degrees_weigh_nothing(shared_run: Run, lists: Path, tmp_path: Path) -> None:
    """Half of the pairs have no key phrase: the degree loss in the objective is half of that of the others."""
    rows = [
        {"prompt": f"Human: {n}?\nAssistant:", "chosen": f" {kind}", "rejected": f" {kind} It is."}
        for n, kind in enumerate(
            " The cats and red dogs are at sea." if n % 2 else " It is of." for n in range(96)
        )
    ]
    write_pairs(tmp_path / "half.jsonl", rows)
    options = (f"dataset.train={tmp_path / 'half.jsonl'}", "training.per_device_train_batch_size=96")
    outcome = shared_run(
        "half", beside(GPO, ssl_coef=0.5), *options, "training.max_steps=1", "dataset.eval={}"
    )
    (record,) = logged(outcome.run)
    assert record["ssl/loss"] == pytest.approx(math.log(4), abs=1e-6)
    assert record["loss"] == pytest.approx(record["align/loss"] + 0.25 * record["ssl/loss"], rel=1e-6)
    receipt = outcome.run.read_manifest()["receipt"]["sets"]["train"]
    assert receipt["degrees"]["taking_part"] == 96
    assert receipt["sources"][0]["changed"] == {"response without degrees": 48}


# --- the degree loss, computed directly


def make_trainer(recipe: Recipe, *, layout: Layout | None = None, seed: int = 3) -> Any:
    """The trainer of a recipe before its first step, with a head and an adapter that are not zero."""
    prepared = prepare(recipe, Silent())
    args = training_arguments(
        recipe, RunFolder(Path(recipe.output_dir)), evaluates=bool(prepared.tokens.eval)
    )
    model = loading.load_model(prepared.source, recipe.model, recipe.adapter)
    objective = find_objective(recipe.method, Path(recipe.output_dir))
    trainer = build_trainer(recipe, prepared, model, args, objective, "", layout)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and then the other half has no gradient
            nn.init.normal_(parameter, std=0.1, generator=generator)
    if isinstance(trainer, SelfSupervisedTrainer):
        for parameter in trainer.degree_head.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
    trainer.model.train()
    return trainer


def plain_copy(trainer: Any, world: Path) -> Any:
    """The same policy as transformers loads it, with the same adapter."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    if hasattr(trainer.model, "peft_config"):
        model = get_peft_model(model, trainer.model.peft_config["default"])
    missing = model.load_state_dict(trainer.model.state_dict())
    assert not missing.missing_keys
    return model


def degree_loss(
    model: Any,
    head: tuple[Tensor, Tensor],
    batch: Mapping[str, Tensor],
    prompts: list[list[int]],
    pooling: str,
) -> Tensor:
    """Mean over all rows of the mean over a row's versions, each a forward pass of its own."""
    by_row: dict[int, list[Tensor]] = {}
    for index, level, tokens in told(dict(batch)):
        prompt = prompts[index]
        ids = torch.tensor([[*prompt, *tokens]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, len(prompt) :]
        assert len(states) == len(tokens)
        pooled = states[-1] if pooling == "last" else states.mean(0)
        loss = cross_entropy(linear(pooled, *head), torch.tensor(level))
        by_row.setdefault(index, []).append(loss)
    return torch.stack([torch.stack(each).mean() for each in by_row.values()]).sum() / len(batch["row_index"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("module.", ""): torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


PIECES, MASKS = Layout("pieces"), Layout("mask", width_cost=1.0)
BATCHES: dict[str, tuple[Layout, str, dict[str, Any], str]] = {
    "packed": (PIECES, GPO, {}, "none"),
    "packed, mean": (PIECES, GPO, {"pooling": "mean"}, "none"),
    "masks": (MASKS, GPO, {"levels_per_step": 2}, "none"),
    "masks, mean": (MASKS, GPO, {"pooling": "mean", "levels_per_step": 2}, "lora"),
    "padded": (Layout(), GPO, {}, "lora"),
    "padded, mean": (Layout(), GPO, {"pooling": "mean", "levels_per_step": 2}, "none"),
    "more than there are": (PIECES, GPO, {"levels": 8, "levels_per_step": 8}, "none"),
    "chosen": (PIECES, GPO, {"apply_to": "chosen", "levels_per_step": 2}, "none"),
    "rejected": (Layout(), GPO, {"apply_to": "rejected", "levels_per_step": 2}, "lora"),
    "soft on lists": (PIECES, SOFT, {"levels_per_step": 2}, "none"),
    "soft on lists, masks": (MASKS, SOFT, {"pooling": "mean"}, "lora"),
}


@pytest.mark.parametrize(
    ("layout", "align", "settings", "adapter"),
    [pytest.param(*case, id=name) for name, case in BATCHES.items()],
)
def test_a_batchs_loss_and_gradients_are_those_of_its_versions_one_by_one(
    make_recipe: MakeRecipe,
    tiny_world: Path,
    lists: Path,
    layout: Layout,
    align: str,
    settings: dict[str, Any],
    adapter: str,
) -> None:
    """The whole objective's, less those of the alignment loss alone."""
    options = [WITHOUT_DROPOUT if adapter == "lora" else "adapter=none"]
    if align == SOFT:
        options.append(f"dataset.train={lists}")
    method = beside(align, ssl_coef=2.0, **settings)
    trainer = make_trainer(make_recipe("both", *options, method), layout=layout)
    alone = make_trainer(make_recipe("alone", *options, f"method={align}"), layout=layout)
    rows = [trainer.train_dataset[index] for index in range(8)]
    trainer.data_collator.begin_epoch(1)
    batch, plain = (
        trainer.data_collator(rows),
        alone.data_collator([alone.train_dataset[i] for i in range(8)]),
    )

    loss, expected = trainer.compute_loss(trainer.model, batch), alone.compute_loss(alone.model, plain)
    loss.backward()
    expected.backward()
    head = tuple(p.detach().clone().requires_grad_() for p in trainer.degree_head.parameters())
    model = plain_copy(trainer, tiny_world)
    prompts = {row["row_index"]: row["prompt_ids"] for row in rows}
    direct = degree_loss(model, head, batch, prompts, settings.get("pooling", "last"))  # type: ignore[arg-type]
    (2.0 * direct).backward()

    assert direct.item() > 0.1
    assert loss.item() == pytest.approx(expected.item() + 2.0 * direct.item(), rel=1e-5)
    both, others, own = gradients(trainer.model), gradients(alone.model), gradients(model)
    assert both.keys() == others.keys() == own.keys()
    floor = 1e-3 * max(each.norm() for each in both.values())
    for name in both:
        total = others[name] + own[name]
        assert (both[name] - total).norm() < 1e-4 * torch.maximum(total.norm(), floor), name
    assert sum(each.norm() for each in own.values()) > 0
    for parameter, other in zip(trainer.degree_head.parameters(), head, strict=True):
        assert relative(parameter.grad, other.grad) < 1e-5


def test_gradient_checkpointing_changes_nothing(make_recipe: MakeRecipe) -> None:
    found = []
    for name, checkpointing in (("without", "false"), ("with", "true")):
        options = (beside(GPO, ssl_coef=1.0), f"training.gradient_checkpointing={checkpointing}")
        trainer = make_trainer(make_recipe(name, *options), layout=PIECES)
        if checkpointing == "true":
            trainer.model.gradient_checkpointing_enable()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        trainer.compute_loss(trainer.model, batch).backward()
        found.append((gradients(trainer.model), gradients(trainer.degree_head)))
    for without, with_checkpoints in zip(*found, strict=True):
        for key, gradient in without.items():
            torch.testing.assert_close(with_checkpoints[key], gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_degrees_trains_the_alignment_loss(make_recipe: MakeRecipe) -> None:
    trainer = make_trainer(make_recipe("run", beside(GPO, ssl_coef=3.0)), layout=PIECES)
    rows = [
        {**trainer.train_dataset[index], "degraded_ids": [[], []], "degraded_levels": [[], []]}
        for index in range(4)
    ]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5), "the policy is its reference"
    assert all(not p.grad.any() for p in trainer.degree_head.parameters())
    assert sum(each.norm() for each in gradients(trainer.model).values()) > 0


# --- evaluation


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_evaluation_is_exact_whatever_the_batches_and_the_seed(
    make_recipe: MakeRecipe, tiny_world: Path, pooling: str
) -> None:
    """All levels of all rows, against forward passes of each; 24 rows in batches of 7 leave a remainder."""
    found = []
    for name, seed, batch in (("one", 1, 7), ("two", 2, 24), ("three", 3, 1)):
        options = (f"training.seed={seed}", f"training.per_device_eval_batch_size={batch}")
        trainer = make_trainer(make_recipe(name, beside(GPO, pooling=pooling), *options), layout=PIECES)
        figures = trainer.evaluate()
        found.append({key: value for key, value in figures.items() if "ssl/" in key or key.endswith("_loss")})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    rows = list(trainer.eval_dataset["heldout"])
    collate = trainer.data_collator.of_all_levels()
    head = tuple(trainer.degree_head.parameters())
    prompts = [row["prompt_ids"] for row in rows]
    model = plain_copy(trainer, tiny_world)
    with torch.no_grad():
        direct = degree_loss(model, head, collate(rows), prompts, pooling)  # type: ignore[arg-type]
    assert len({len(row["degraded_levels"][0]) for row in rows}) > 1, "responses with merged levels"
    assert found[0]["eval_heldout_ssl/loss"] == pytest.approx(direct.item(), rel=1e-5)
    assert found[0]["eval_heldout_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {f"eval_heldout_ssl/accuracy_level_{level}" for level in range(4)} <= found[0].keys()


def test_an_evaluation_leaves_the_draws_of_training_alone(shared_run: Run) -> None:
    every = ("training.eval_strategy=steps", "training.eval_steps=1")
    plain, evaluated = (
        logged(shared_run(name, beside(GPO), *options).run)
        for name, options in (("never", ()), ("every", every))
    )
    drop = partial(_without, words=("runtime", "per_second", "total_flos", "train_loss"))
    assert [drop(each) for each in evaluated] == [drop(each) for each in plain]


def _without(record: dict[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(word in key for word in words)}


# --- draws over the epochs of a run

EPOCHS = ("training.max_steps=-1", "training.num_train_epochs=2", "training.per_device_train_batch_size=32")


def test_every_epoch_of_a_run_draws_anew_and_workers_change_nothing(shared_run: Run) -> None:
    """Tokens of an epoch are those of the batches that a collator draws for it."""
    alone = shared_run("epochs", beside(GPO), *EPOCHS)
    workers = shared_run("workers", beside(GPO), *EPOCHS, "training.dataloader_num_workers=2")
    assert_same(workers.run, alone.run)
    kept = head_of(alone.run, 6), head_of(workers.run, 6)
    assert all(kept[0][name].equal(kept[1][name]) for name in kept[0])

    prepared = prepare(load(alone), Silent()).tokens.train
    rows = [{**row, "row_index": index} for index, row in enumerate(prepared)]
    trainer = make_trainer(load(alone), layout=PIECES)
    expected = []
    for epoch in range(2):
        trainer.data_collator.begin_epoch(epoch)
        expected.append(int(trainer.data_collator(rows)["num_tokens"]))
    assert len(set(expected)) == 2
    totals = [record["num_tokens"] for record in logged(alone.run)][2::3]
    assert [after - before for before, after in zip([0, *totals], totals, strict=False)] == expected


def load(outcome: Any) -> Recipe:
    from prefopt_cli.recipe import load_recipe

    return load_recipe(outcome.run.recipe)


# --- going on


TWO_EPOCHS = (
    "training.per_device_train_batch_size=16",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=-1",
    "training.num_train_epochs=2",
    "training.save_steps=6",
    "training.logging_steps=2",
    "training.warmup_steps=2",
)
"""Two epochs of three steps, the last of each of which ends with the data."""

CASES: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "full": (GPO, (), (2,)),
    "lora with dropout": (GPO, (LORA,), (4,)),
    "soft with KL": (WITH_KL, (), (4,)),
    "soft with KL, lora": (WITH_KL, (LORA,), (2,)),
    "accumulation over epochs": (GPO, TWO_EPOCHS, (2, 3, 4)),
}


@pytest.mark.parametrize(
    ("name", "align", "options", "stop_at"),
    [
        pytest.param(name, align, options, stop, id=f"{name} at {stop}")
        for name, (align, options, stops) in CASES.items()
        for stop in stops
    ],
)
def test_resumed_run_equals_one_that_never_stopped(
    run: Run, shared_run: Run, name: str, align: str, options: tuple[str, ...], stop_at: int
) -> None:
    method = beside(align, ssl_coef=0.5)
    straight = shared_run(f"straight {name}", method, *options)
    stopped = run("stopped", method, *options, reporter=SignalAt(stop_at))
    assert (stopped.status, stopped.step) == ("interrupted", stop_at)
    resumed = run("stopped", method, *options, resume=True)
    assert_same(resumed.run, straight.run)
    ours, theirs = head_of(resumed.run), head_of(straight.run)
    assert any(weight.any() for weight in theirs.values())
    for key, weight in theirs.items():
        assert ours[key].equal(weight), key
    before = head_of(resumed.run, stop_at)
    assert not before["weight"].equal(ours["weight"]), "the head went on learning"


@pytest.mark.parametrize("adapter", ["adapter=none", LORA], ids=["full", "lora"])
def test_the_head_is_saved_in_checkpoints_and_nowhere_else(
    run: Run, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """What transformers or peft load is the policy as it was trained, and all of it."""
    trainers = keep_trainers(monkeypatch)
    outcome = run("run", beside(GPO, ssl_coef=1.0), adapter)
    assert not list(outcome.run.model.rglob("*head*"))
    (weights,) = outcome.run.model.glob("*.safetensors")
    assert not [name for name in load_file(weights) if "head" in name and "lm_head" not in name]
    for folder in outcome.run.checkpoints.glob("checkpoint-*"):
        head = saved_head(folder)
        assert {name: tuple(each.shape) for name, each in head.items()} == {"weight": (4, 32), "bias": (4,)}
        (policy,) = set(folder.glob("*.safetensors")) - {folder / HEAD_FILE}
        assert not [name for name in load_file(policy) if "degree" in name]

    if adapter == LORA:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(outcome.run.model)
    else:
        model, found = AutoModelForCausalLM.from_pretrained(outcome.run.model, output_loading_info=True)
        assert not any(found.values()), found
    ids = torch.arange(5, 45)[None]
    trained = trainers[0].model.eval()
    with torch.no_grad():
        ours, base = model.eval()(input_ids=ids).logits, None
        base = AutoModelForCausalLM.from_pretrained(tiny_world / "model").eval()(input_ids=ids).logits
        torch.testing.assert_close(ours, trained(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    assert (ours - base).abs().max() > 1e-2, "nothing was trained"


def keep_trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every trainer that is built from now on."""
    from prefopt_cli.training import run as module

    kept: list[Any] = []
    build = module.build_trainer

    def keep(*arguments: Any, **options: Any) -> Any:
        kept.append(build(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(module, "build_trainer", keep)
    return kept


# --- the head's own steps


def test_its_learning_rate_follows_the_schedule(make_recipe: MakeRecipe) -> None:
    schedule = ("training.learning_rate=1e-3", "training.warmup_steps=2", "training.lr_scheduler_type=cosine")
    trainer = make_trainer(make_recipe("run", beside(GPO, head_learning_rate=0.02), *schedule))
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    trainer.optimizer.step()  # which the schedule expects before it moves on
    rates = []
    for _ in range(6):
        rates.append(trainer.head_optimizer.learning_rate)
        assert rates[-1] == pytest.approx(20 * trainer.optimizer.param_groups[0]["lr"], rel=1e-9)
        trainer.lr_scheduler.step()
    assert rates[:3] == pytest.approx([0, 0.01, 0.02])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.01


def plain_steps(trainer: Any, rate: float, steps: int, rows_per_step: int) -> Iterator[dict[str, Tensor]]:
    """The head after each step of plain gradient descent on the states of a policy that stands still."""
    weight, bias = torch.zeros(4, 32), torch.zeros(4)
    batches = iter(trainer.get_train_dataloader())
    for _ in range(steps):
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        batch = next(batches)
        assert len(batch["row_index"]) == rows_per_step
        with torch.no_grad():
            states = trainer.score_policy(trainer.model, batch).states[batch["degree_passages"]]
        each = cross_entropy(linear(states, weight, bias), batch["degree_levels"], reduction="none")
        rows = [each[batch["degree_rows"] == row].mean() for row in range(rows_per_step)]
        slopes = torch.autograd.grad(torch.stack(rows).mean(), (weight, bias))
        weight, bias = (old.detach() - rate * new for old, new in zip((weight, bias), slopes, strict=True))
        yield {"weight": weight, "bias": bias}


STILL = (
    "dataset.eval={}",
    "training.learning_rate=0",
    "training.optim=sgd",
    "training.lr_scheduler_type=constant",
    "training.weight_decay=0",
    "training.save_steps=1",
)
"""Plain gradient descent on a policy that stands still, and every step's head on disk."""


@pytest.mark.parametrize("clip", [0, 1e-9])
def test_every_step_goes_down_its_own_gradient_unclipped(run: Run, clip: float) -> None:
    """The gradient of this step's batch alone; clipping is about the policy's gradient, whatever `max_grad_norm`."""
    outcome = run(
        "run",
        beside(GPO, ssl_coef=1.0, head_learning_rate=0.5),
        *STILL,
        "training.max_steps=4",
        f"training.max_grad_norm={clip}",
    )
    trainer = make_trainer(load(outcome), layout=PIECES)
    # As the run did before it made its order of the data.
    set_seed(trainer.args.seed)
    for step, expected in enumerate(plain_steps(trainer, 0.5, 4, 4), start=1):
        found = head_of(outcome.run, step)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-6, msg=f"{name} after step {step}"
            )


def test_accumulated_steps_are_those_of_one_batch(run: Run) -> None:
    """Micro-batches of 8, 4 and 2 rows to steps of 8 rows."""
    heads = []
    for micro_batches in (1, 2, 4):
        outcome = run(
            f"micro-{micro_batches}",
            beside(GPO, ssl_coef=1.0, head_learning_rate=0.5),
            *STILL,
            "training.max_steps=3",
            f"training.gradient_accumulation_steps={micro_batches}",
            f"training.per_device_train_batch_size={8 // micro_batches}",
        )
        heads.append(head_of(outcome.run, 3))
    for other in heads[1:]:
        for name in other:
            torch.testing.assert_close(other[name], heads[0][name], rtol=1e-4, atol=1e-6)


# --- bad input


def refusal(prefopt: Prefopt, folder: Path, world: Path, *overrides: str) -> str:  # noqa: F811
    """The one message with which `prefopt train` refuses a recipe whose run would be `run` in a folder."""
    path = folder / "my.yaml"
    path.write_text(RECIPE.format(world=world, out=folder / "run"))
    result = prefopt("train", str(path), *overrides)
    assert result.code == 2, result
    for noise in ("Traceback", "Unexpected", "This is a bug"):
        assert noise not in result.err, result.err
    assert result.err.count("prefopt: ") == 1, result.err
    return result.err.partition("prefopt: ")[2]


def test_data_without_key_phrases(prefopt: Prefopt, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [
        {"prompt": f"Human: {n}?\nAssistant:", "chosen": " It is of the.", "rejected": " And not."}
        for n in range(8)
    ]
    write_pairs(tmp_path / "bare.jsonl", rows)
    message = refusal(prefopt, tmp_path, tiny_world, beside(GPO), f"dataset.train={tmp_path / 'bare.jsonl'}")
    assert "dataset.train: none of the 16 responses has key phrases" in message
    assert "method.stopwords" in message
    assert not (tmp_path / "run").exists()


def test_a_best_model_by_a_figure_that_an_eval_set_does_not_have(
    make_recipe: MakeRecipe, run: Run, tmp_path: Path
) -> None:
    """What is refused is what an evaluation does not report. One phrase goes at level 3 of 4: no levels 1 and 2."""
    for name, response in (("few", " It is of the sea."), ("none", " It is of the.")):
        rows = [
            {"prompt": f"Human: {n}?\nAssistant:", "chosen": response, "rejected": f" It is.{' It is.' * n}"}
            for n in range(4)
        ]
        write_pairs(tmp_path / f"{name}.jsonl", rows)
    sets = [f"dataset.eval.{name}={tmp_path / name}.jsonl" for name in ("few", "none")]
    outcome = run("run", beside(GPO), *sets, "training.eval_on_start=true", "training.max_steps=1")
    reported = {key for record in metrics.read(outcome.run.metrics) for key in record}
    tokens = prepare(make_recipe("plain", beside(GPO), *sets), Silent()).tokens
    best = ("training.load_best_model_at_end=true", "training.save_strategy=epoch")
    refused = []
    for name in ("few", "none", "heldout"):
        for figure in ("loss", "ssl/loss", "ssl/accuracy", *(f"ssl/accuracy_level_{k}" for k in range(4))):
            chosen = f"training.metric_for_best_model=eval_{name}_{figure}"
            recipe = make_recipe("best", beside(GPO), *sets, *best, chosen)
            try:
                require_metric(recipe, tokens.receipt)
                assert f"eval_{name}_{figure}" in reported
            except UserError as error:
                assert f"eval_{name}_{figure}" not in reported
                refused.append(str(error))
    assert len(refused) == 2 + 6
    assert refused[0] == (
        "training.metric_for_best_model: there is no few_ssl/accuracy_level_1, as no response of few has that level, "
        "only 0, 3. Choose one of these, or few_ssl/accuracy."
    )
    assert "none of the 8 responses of none has degrees" in refused[2]


def watched(*batches: tuple[list[float], list[int], str]) -> str:
    """What the guard says before the step, of losses of rows and which losses they are."""
    guard = FiniteGuard(lambda indices: [f"row{index}" for index in indices])
    for losses, indices, what in batches:
        guard.watch(torch.tensor(losses), torch.tensor(indices), what=what)
    with pytest.raises(NotFiniteError) as caught:
        guard.on_pre_optimizer_step(
            TrainingArguments(use_cpu=True), TrainerState(), TrainerControl(), nn.Linear(1, 1)
        )
    return str(caught.value)


def test_the_guard_names_the_loss_and_each_row_once() -> None:
    inf, nan = math.inf, math.nan
    fine = ([1.0, 2.0], [7, 8], "loss")
    assert watched(fine, ([nan, 1.0], [7, 8], "degree loss")) == (
        "step 1: the degree loss is not finite. Rows: row7. The step was not taken. Look at these rows; a lower "
        "method.head_learning_rate or method.ssl_coef often helps."
    )
    both = watched(([inf, 2.0], [7, 8], "loss"), ([nan, nan], [7, 8], "degree loss"))
    assert "the loss and the degree loss are not finite. Rows: row7, row8. The" in both
    assert (
        "a lower training.learning_rate, training.max_grad_norm, method.head_learning_rate or method" in both
    )
    alone = watched(fine, ([inf, 2.0], [3, 4], "loss"), ([1.0, 1.0], [3, 4], "degree loss"))
    assert "the loss is not finite. Rows: row3. The" in alone
    assert "a lower training.learning_rate or training.max_grad_norm often" in alone


def test_a_head_that_runs_away_is_named(run: Run) -> None:
    """Its first step goes beyond what float32 holds; the alignment loss is still fine."""
    with pytest.raises(NotFiniteError, match="step 2: the degree loss is not finite") as caught:
        run("run", beside(GPO, head_learning_rate=3e38), "training.learning_rate=1e-6")
    assert str(caught.value).count("pairs.jsonl:") == 4
    assert "method.head_learning_rate" in str(caught.value)


def test_messages_name_the_key_where_the_alignment_loss_stands(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def objective(method: str) -> Objective:
        return find_objective(make_recipe("run", method).method, tmp_path)

    (tmp_path / "own_rising.py").write_text("def f(z):\n    return z\n\nnumber = 3\n")
    for loss in ("nowhere:f", "own_rising:g", "own_rising:number", "own_rising:f"):
        own = f"{{name: gpo, loss: '{loss}'}}"
        for method, key in ((f"method={own}", "method.loss: "), (beside(own), "method.align.loss: ")):
            with pytest.raises(UserError) as caught:
                objective(method)
            assert str(caught.value).startswith(key)
    assert "and method.regularizer is not used" in objective(f"method={SOFT}").description
    assert "and method.align.regularizer is not used" in objective(beside(SOFT)).description


def balanced_experts(folder: Path, world: Path) -> Path:
    """A tiny model whose experts are balanced by a loss, with the tiny world's tokenizer."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=256,
        router_aux_loss_coef=0.01,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_experts_that_are_balanced_by_a_loss(
    prefopt: Prefopt,  # noqa: F811
    run: Run,
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """Refused before anything is written, and before the reference policy scores the data, which may take hours."""
    model = f"model.name_or_path={balanced_experts(tmp_path / 'experts', tiny_world)}"
    message = refusal(prefopt, tmp_path, tiny_world, beside(GPO), model)
    assert "training.router_aux_loss_coef: 0" in message
    assert message.count("\n") == 1
    without = run("without", beside(GPO), model, "training.router_aux_loss_coef=0", "training.max_steps=2")
    assert "ssl/loss" in logged(without.run)[-1]
    assert not (tmp_path / "run").exists()
