"""`prefopt check`: what it says, and that it reads no weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Prefopt, on_a_terminal
from tests.tiny import write_pairs
from tests.training.conftest import LORA

SOFT = "method={name: soft, kl_coef: 0.2, regularizer: {sample_every: 3, num_prompts: 5, max_new_tokens: 40}}"
NO_KL = "method={name: soft, kl_coef: 0}"

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(prefopt: Prefopt, recipe: Path) -> Check:
    """`check("method.beta=1", "--pairs", "0")` -> the object that --json prints."""

    def run(*arguments: str) -> dict[str, Any]:
        result = prefopt("check", str(recipe), *arguments, "--json")
        assert result.code == 0, result.err
        assert result.err == ""
        return json.loads(result.out)

    return run


def test_sections_in_their_order(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    result = prefopt("check", str(recipe))
    assert result.code == 0
    places = [
        result.out.index(part)
        for part in (
            f"{recipe}: the recipe is sound.",
            "pairs.jsonl (standard)",
            "train: 96 pairs, 96 prompts",
            "max_length: 256 tokens; longer rows: drop",
            "What is trained (marked)",
            "Loss: logistic: f'(0) = -0.5",
            "model, as it is at the start; ",
            "scored once before training.",
            "Steps: 6 of 4 pairs per process.",
            "Layout: packed",
            "a batch of 4 pairs (mean of 24)",
            "tokens through the model",
            "Predicted from the arithmetic: ",
            "are trained.",
            "peak memory per process on cpu",
            "ddp on 1 process",
            "LM head",
            "heaviest batch of an epoch",
            "Before training, while the reference scores the data, it is ",
        )
    ]
    assert places == sorted(places)
    assert "\x1b[" not in result.out
    assert result.err == ""
    assert not (tmp_path / "run").exists()


def test_json_holds_everything(check: Check) -> None:
    found = check()
    assert set(found) == {
        "method", "reference", "receipt", "masks", "degrees", "packing", "memory", "sampling", "device",
        "processes", "rows_per_step", "steps", "notes", "fit",
    }  # fmt: skip
    assert found["fit"] is None, "no budget was given"
    assert found["processes"] == 1
    assert found["degrees"] is None, "the method has none"
    assert found["receipt"]["sets"]["train"]["rows"] == 96
    assert found["receipt"]["sets"]["heldout"]["rows"] == 24
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values()) > 0
    assert found["memory"]["parameters"] == found["memory"]["trainable_parameters"]
    assert [mask["side"] for mask in found["masks"]] == ["chosen", "rejected"] * 2


def test_the_mask_is_the_response_and_its_end(check: Check, tiny_world: Path) -> None:
    rows = [json.loads(line) for line in (tiny_world / "pairs.jsonl").read_text().splitlines()]
    found = check("dataset.shuffle=false")
    for number, mask in enumerate(found["masks"]):
        row = rows[number // 2]
        assert "".join(mask["context"]) == "<s>" + row["prompt"]
        assert "".join(mask["trained"]) == row[mask["side"]] + "</s>"


def test_the_mask_in_plain_letters(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "one.jsonl", [{"prompt": "a\nb", "chosen": " yes", "rejected": " " + "no " * 60}])
    result = prefopt("check", str(recipe), f"dataset.train={tmp_path}/one.jsonl", "dataset.eval={}")
    chosen, rejected = (line for line in result.out.splitlines() if "»" in line)
    assert chosen.endswith("«")
    before, trained = chosen.split("»")
    assert before.endswith("<s>|a|\\n|b ")
    assert trained.replace("|", "") == " yes</s>«"
    assert re.search(r"\(\d+ more\)", rejected.split("»")[1])


def test_the_mask_in_colour(recipe: Path) -> None:
    shown = on_a_terminal("check", str(recipe), "--pairs", "1")
    assert "»" not in shown
    assert "\x1b[2m" in shown, "what is only read is dim"
    assert "\x1b[1;32m" in shown, "chosen in green"
    assert "\x1b[1;31m" in shown, "rejected in red"


def test_no_pairs(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    assert check("--pairs", "0")["masks"] == []
    assert "What is trained" not in prefopt("check", str(recipe), "--pairs", "0").out


def test_more_pairs_than_there_are(check: Check) -> None:
    assert len(check("--pairs", "500")["masks"]) == 2 * 96


def test_a_cut_response_has_no_end_in_the_mask(check: Check, tmp_path: Path) -> None:
    write_pairs(tmp_path / "long.jsonl", [{"prompt": "a", "chosen": " tea" * 90, "rejected": " no"}])
    found = check(
        f"dataset.train={tmp_path}/long.jsonl",
        "dataset.eval={}",
        "dataset.max_length=32",
        "dataset.on_overflow=truncate_response",
        "training.eval_strategy=no",
    )
    chosen, rejected = found["masks"][:2]
    assert len(chosen["context"]) + len(chosen["trained"]) == 32
    assert chosen["trained"][-1] != "</s>"
    assert rejected["trained"][-1] == "</s>"
    (source,) = found["receipt"]["sets"]["train"]["sources"]
    assert list(source["changed"].values()) == [1]


def test_another_device_is_only_estimated(check: Check) -> None:
    """The laptop on which a recipe is checked need not have the GPU on which it will run."""
    found = check("--device", "cuda", "training.use_cpu=false")
    assert found["device"] == "cuda"
    assert found["memory"]["total"] > 0
    assert check("--device", "cuda", "training.use_cpu=false", "training.tf32=true")["device"] == "cuda"


def test_what_packing_saves(check: Check) -> None:
    found = check("--pairs", "0")["packing"]
    assert (found["packed"], found["reason"], found["reference"]) == (True, None, "cached")
    assert (found["batches"], found["rows"]) == (24, 4)
    assert found["response_tokens"] < found["packed_tokens"] < found["padded_tokens"]
    assert 0 < found["padding_share"] < 1
    assert found["packed_tokens"] <= found["heaviest_tokens"] < 1.5 * found["packed_tokens"]
    assert found["speedup"] > found["speedup_precomputed"] > found["padded_tokens"] / found["packed_tokens"]


def test_a_padded_layout_and_its_reason(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    padded = "training.attention_layout=padded"
    packed, found = check("--pairs", "0"), check(padded, "--pairs", "0")
    assert found["packing"]["packed"] is False
    assert 1 < found["packing"]["speedup"] < packed["packing"]["speedup"]
    assert found["memory"]["total"] > packed["memory"]["total"]
    shown = prefopt("check", str(recipe), padded, "--pairs", "0").out
    assert "Layout: padded rows, because the recipe asks for them." in shown


def test_a_model_that_cannot_be_packed(
    prefopt: Prefopt, recipe: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """A window of 8 tokens, which counts tokens of other responses as well."""
    model = shutil.copytree(tiny_world / "model", tmp_path / "windowed")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    (model / "config.json").write_text(json.dumps(config))
    name = f"model.name_or_path={model}"
    shown = prefopt("check", str(recipe), name, "--pairs", "0")
    assert "Layout: padded rows, because the model sees 8 tokens back" in shown.out, shown.err
    insists = prefopt("check", str(recipe), name, "training.attention_layout=packed")
    assert insists.code == 2
    assert "packed is not possible, because the model sees 8 tokens back" in insists.err


def test_a_reference_pass_in_every_step(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    each = "training.precompute_ref_log_probs=false"
    cached, found = check("--pairs", "0"), check(each, "--pairs", "0")
    assert "frozen policy" not in cached["memory"]["parts"]
    assert found["memory"]["parts"]["frozen policy"] == found["memory"]["parts"]["weights"]
    assert found["packing"]["speedup"] < cached["packing"]["speedup"]
    assert "; run in every step." in prefopt("check", str(recipe), each, "--pairs", "0").out


def test_unknown_device(prefopt: Prefopt, recipe: Path) -> None:
    result = prefopt("check", str(recipe), "--device", "tpu")
    assert result.code == 2
    assert "expected auto, cpu or cuda, found 'tpu'" in result.err


def test_the_reference_of_every_kind_of_run(
    prefopt: Prefopt, recipe: Path, check: Check, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    done = prefopt("train", str(recipe), LORA, f"output_dir={first}", "training.max_steps=1")
    assert done.code == 0, done.err
    again = f"model.name_or_path={first}"
    assert re.fullmatch(r"\S+/model, as it is at the start", check()["reference"])
    assert check(LORA)["reference"].endswith("computed with the new adapter switched off")
    for adapter, ending in {
        LORA: "that adapter as it is at the start",
        "adapter=none": "merged into the weights, as it is at the start",
    }.items():
        reference = check(again, adapter)["reference"]
        assert f"(run {first})" in reference
        assert ending in reference
    other = prefopt("check", str(recipe), again, "adapter={type: lora, r: 8}")
    assert other.code == 2
    assert "r is 4, not 8" in other.err


@pytest.mark.parametrize(
    ("fields", "steps", "pairs"),
    [
        (["max_steps=7"], 7, 4),
        (["max_steps=-1", "num_train_epochs=1"], 24, 4),
        (["max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=36"], 6, 36),
        (
            [
                "max_steps=-1",
                "num_train_epochs=2",
                "per_device_train_batch_size=36",
                "dataloader_drop_last=true",
            ],
            4,
            36,
        ),
        (["max_steps=-1", "num_train_epochs=1", "gradient_accumulation_steps=5"], 5, 20),
        (["max_steps=-1", "num_train_epochs=0.5"], 12, 4),
        (["max_steps=-1", "num_train_epochs=1", "gradient_accumulation_steps=99"], 1, 396),
    ],
)
def test_steps_are_those_that_training_takes(
    prefopt: Prefopt, recipe: Path, check: Check, fields: list[str], steps: int, pairs: int
) -> None:
    options = [f"training.{field}" for field in (*fields, "save_strategy=no", "eval_strategy=no")]
    found = check(*options, "--pairs", "0")
    assert (found["steps"], found["rows_per_step"]) == (steps, pairs)
    trained = json.loads(prefopt("train", str(recipe), *options, "--json").out)
    assert trained["steps"] == steps


def test_an_output_folder_that_holds_a_run_is_noted(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    assert check()["notes"] == []
    assert prefopt("train", str(recipe), "training.max_steps=1").code == 0
    (note,) = check()["notes"]
    assert "already holds a run" in note
    assert "--resume" in note
    assert f"Note: {note}" in prefopt("check", str(recipe)).out


def test_no_weights_are_read(check: Check, tiny_world: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_world / "model", tmp_path / "hollow")
    (model / "model.safetensors").unlink()
    for adapter in ("adapter=none", LORA):
        assert check(f"model.name_or_path={model}", adapter)["memory"]["total"] > 0


def test_own_loss_is_probed(prefopt: Prefopt, recipe: Path, check: Check, tmp_path: Path) -> None:
    (tmp_path / "checked_losses.py").write_text(
        "def steep(z):\n    return (1 - z).clamp(min=0) ** 3\n\ndef wrong(z):\n    return z\n"
    )
    assert "f'(0) = -3" in check("method.loss=checked_losses:steep")["method"]
    result = prefopt("check", str(recipe), "method.loss=checked_losses:wrong")
    assert result.code == 2
    assert "must be negative" in result.err
    assert "not convex" in check("method.loss=savage")["method"]


def test_a_gpu_recipe_on_a_laptop(prefopt: Prefopt, recipe: Path) -> None:
    """What is meant for a GPU is not refused as if it were wrong; the message names both ways on."""
    if torch.cuda.is_available():
        return
    here = prefopt("check", str(recipe), "training.use_cpu=false", "training.bf16=true")
    assert here.code == 2
    assert "training.bf16=false" in here.err
    assert "--device cuda" in here.err
    there = prefopt("check", str(recipe), "training.use_cpu=false", "training.bf16=true", "--device", "cuda")
    assert there.code == 0
    assert "peak memory per process on cuda" in there.out


# --- the policy's own samples, and lists


@pytest.fixture
def lists(tmp_path: Path) -> str:
    """A set of eight lists of three or four responses, with ties, as `dataset.train`."""
    rankings = [[2, 0, 1], [0, 1, 1, 2]]
    rows = [
        {
            "prompt": f"Human: Question {number}?\nAssistant:",
            "responses": [f" place {rank}, {n}" for n, rank in enumerate(rankings[number % 2])],
            "ranking": rankings[number % 2],
        }
        for number in range(8)
    ]
    write_pairs(tmp_path / "lists.jsonl", rows)
    return f"dataset.train={tmp_path}/lists.jsonl"


def test_samples_and_their_memory(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    shown = prefopt("check", str(recipe), SOFT, "--pairs", "0")
    assert shown.code == 0, shown.err
    assert "Sampling prompts: 96 of dataset.train, to be answered in at most 40 tokens." in shown.err
    found = check(SOFT, "--pairs", "0")
    plan, parts = found["sampling"], found["memory"]["parts"]
    assert (plan["prompts"], plan["per_draw"], plan["every"], plan["max_new_tokens"]) == (96, 5, 3, 40)
    assert found["packing"]["reference"] == "samples"
    assert parts["frozen policy"] == parts["weights"]
    assert parts["reference states"] == 4 * 32 * 5 * 40, "floats, width, samples, tokens"
    assert plan["extra_memory"] == found["memory"]["total"] - check(NO_KL, "--pairs", "0")["memory"]["total"]
    for line in (
        "Loss: soft: ",
        "as it is at the start; compared with the policy on the policy's own samples.",
        "Steps: 6 of 4 pairs per process.",
        "Samples: 5 responses per process, drawn 2 times, every 3 steps; each of at most 40 tokens, to one of 96 "
        "prompts. With the frozen policy they add at most ",
        "times as fast as on padded rows, the samples not counted.",
        "activations of samples",
        "tokens through the model, and of samples as long as they may become.",
    ):
        assert line in shown.out, line
    assert "scored once" not in shown.out
    assert "TRL's step as it comes" not in shown.out


def test_samples_of_an_adapter_need_no_second_model(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    found = check(SOFT, LORA, "--pairs", "0")
    assert "frozen policy" not in found["memory"]["parts"]
    shown = prefopt("check", str(recipe), SOFT, LORA, "training.max_steps=1", "--pairs", "0").out
    assert "drawn 1 time, every 3 steps" in shown
    assert "prompts. They add at most " in shown
    assert "the new adapter switched off; compared with the policy" in shown


def test_drawing_many_samples_may_take_most_memory(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    """Hundreds of short samples at once: one row of logits for each, but few tokens in each of 100 micro-batches."""
    many = ("method.regularizer.num_prompts=2000", "method.regularizer.max_new_tokens=1")
    options = (SOFT, *many, "training.gradient_accumulation_steps=100", "--pairs", "0")
    assert check(*options)["memory"]["phase"] == "sampling"
    shown = prefopt("check", str(recipe), *options).out
    assert "peak memory per process on cpu, sampling" in shown
    assert "It is there while samples are drawn" in shown


def test_without_a_kl_there_is_no_reference(prefopt: Prefopt, recipe: Path, check: Check) -> None:
    found = check(NO_KL, "--pairs", "0")
    assert (found["reference"], found["sampling"], found["packing"]["reference"]) == (None, None, "none")
    assert "frozen policy" not in found["memory"]["parts"]
    shown = prefopt("check", str(recipe), NO_KL, "--pairs", "0").out
    assert "kl_coef is 0, so there is no KL to the reference" in shown
    assert "Reference policy" not in shown
    assert "amples" not in shown.partition("Loss:")[2]
    assert "times as fast as on padded rows." in shown


@pytest.mark.parametrize("method", [SOFT, NO_KL])
def test_lists_are_shown_response_by_response(
    prefopt: Prefopt, recipe: Path, check: Check, lists: str, method: str
) -> None:
    options = (method, lists, "dataset.eval={}", "dataset.shuffle=false")
    found = check(*options)
    sides = ["response 1", "response 2", "response 3"]
    tied = ["response 1", "response 2 (tied)", "response 3 (tied)", "response 4"]
    assert [mask["side"] for mask in found["masks"]] == sides + tied
    assert [mask["rank"] for mask in found["masks"]] == [0, 1, 2, 0, 1, 1, 2]
    for mask in found["masks"]:
        assert "".join(mask["trained"]).startswith(f" place {mask['rank']}, ")
    assert (found["packing"]["rows"], found["rows_per_step"]) == (4, 4)
    shown = prefopt("check", str(recipe), *options).out
    assert "lists.jsonl:1 response 3 (tied): " in shown
    assert "Steps: 6 of 4 lists per process." in shown
    assert "a batch of 4 lists (mean of 2)" in shown
    assert "pairs" not in shown.partition("prompts")[2]


def test_lists_as_pairs_are_pairs(prefopt: Prefopt, recipe: Path, check: Check, lists: str) -> None:
    """4 lists of 3 comparisons and 4 of 5."""
    options = (lists, "dataset.eval={}", "--pairs", "1")
    for method in ((), (SOFT, "dataset.lists=all_pairs")):
        found = check(*method, *options)
        assert [mask["side"] for mask in found["masks"]] == ["chosen", "rejected"]
        shown = prefopt("check", str(recipe), *method, *options).out
        assert "8 lists made into 32 pairs" in shown
        assert "a batch of 4 pairs (mean of 8)" in shown


def test_colours_of_a_list(recipe: Path, lists: str) -> None:
    shown = on_a_terminal("check", str(recipe), NO_KL, lists, "dataset.eval={}", "--pairs", "1")
    assert "\x1b[1;32m" in shown, "the best in green"
    assert "\x1b[1;31m" in shown, "the others in red"
