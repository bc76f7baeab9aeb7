"""Bad input through the real command line: one message, the right exit code, nothing half-written."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, T5Config

from prefopt_cli.recipe.checks import EVAL_METRICS, METHOD_METRICS
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from tests.cli.conftest import Prefopt, Result, environment
from tests.tiny import write_pairs

COMMANDS = ("check", "train")
SHORT_SAMPLES = {"gpo": (), "soft": ("method.regularizer.max_new_tokens=4",)}
BEST = (
    "training.load_best_model_at_end=true",
    "training.metric_for_best_model=heldout_loss",
    "training.greater_is_better=false",
    "training.eval_strategy=steps",
    "training.eval_steps=1",
    "training.save_steps=1",
)


@pytest.fixture
def model(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return shutil.copytree(tiny_world / "model", tmp_path / "spoilt")


def refused(
    prefopt: Prefopt, recipe: Path | str, *overrides: str, commands: tuple[str, ...] = COMMANDS
) -> str:
    """The one message with which the commands refuse, the same from each; nothing is written."""
    messages = set()
    for command in commands:
        result = prefopt(command, str(recipe), *overrides)
        assert result.code == 2, (command, result)
        assert result.out == "", command
        messages.add(_message(result))
    assert not (Path(recipe).parent / "run").exists()
    (message,) = messages
    return message


def _message(result: Result) -> str:
    for noise in ("Traceback", "Unexpected", "This is a bug"):
        assert noise not in result.err, result.err
    _, marker, message = result.err.partition("prefopt: ")
    assert marker, result.err
    assert "prefopt: " not in message
    return message


def bomb(levels: int) -> str:
    """Aliases of aliases: a few hundred bytes that stand for 8 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: [\n", ["my.yaml:", "YAML syntax"]),
        (b"- a\n", ["my.yaml:1", "mapping", "a list"]),
        (b"", ["empty", "recipe new gpo"]),
        (b"# caf\xe9\n", ["my.yaml:1", "UTF-8", "0xe9"]),
        (bomb(9).encode(), ["my.yaml:", "aliases", "100,000"]),
        (b"a: &a [1]\nb: [" + b"*a, " * 2_500_000 + b"]\n", ["larger than 500 kB"]),
    ],
    ids=["syntax", "list", "empty", "latin-1", "billion laughs", "10 MB of aliases"],
)
def test_files_that_are_no_recipe(prefopt: Prefopt, recipe: Path, content: bytes, parts: list[str]) -> None:
    recipe.write_bytes(content)
    message = refused(prefopt, recipe)
    assert all(part in message for part in parts), message
    assert message.count("\n") == 1


def test_missing_recipe_and_standard_input(prefopt: Prefopt, tmp_path: Path) -> None:
    message = refused(prefopt, tmp_path / "nope.yaml")
    assert "nope.yaml does not exist" in message
    assert "prefopt recipe list" in message
    assert "/dev/stdin" in refused(prefopt, "-")


def test_a_recipe_from_a_pipe(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefopt_cli", "check", "/dev/stdin", "--json", "--pairs", "0"],
        input=recipe.read_text(),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6


RECIPE_MISTAKES = [
    ("method.loss=dop", ["method.loss", "logistic"]),
    ("method.beta=-1", ["method.beta", "greater than 0", "-1"]),
    ("adapter={type: lora, bias: all}", ["adapter.bias", "reference"]),
    ("adapter={type: lora, init_lora_weights: pissa}", ["adapter.init_lora_weights", "reference"]),
    ("training.train_sampling_strategy=group_by_length", ["train_sampling_strategy", "random or sequential"]),
    ("training.use_liger_kernel=true", ["use_liger_kernel", "head"]),
    ("training.include_num_input_tokens_seen=true", ["num_tokens"]),
    ("training.auto_find_batch_size=true", ["per_device_train_batch_size"]),
    ("training.report_to=wandbb", ["training.report_to", "'wandb'"]),
    ("training.nonsense=1", ["training.nonsense", "unknown key"]),
]


@pytest.mark.parametrize(("override", "parts"), RECIPE_MISTAKES, ids=[each[0] for each in RECIPE_MISTAKES])
def test_mistakes_in_a_recipe(prefopt: Prefopt, recipe: Path, override: str, parts: list[str]) -> None:
    message = refused(prefopt, recipe, override)
    assert "1 mistake" in message
    assert all(part in message for part in parts), message


def test_contradicting_precisions(prefopt: Prefopt, recipe: Path) -> None:
    assert "at most one" in refused(prefopt, recipe, "training.bf16=true", "training.fp16=true")
    message = refused(prefopt, recipe, "training.fp16=true", "model.dtype=float16")
    assert "cannot scale the gradients of float16 weights" in message


def test_the_best_model_needs_a_metric_that_exists(prefopt: Prefopt, recipe: Path) -> None:
    for metric in ("loss", "heldout_nonsense", "other_loss"):
        message = refused(prefopt, recipe, *BEST, f"training.metric_for_best_model={metric}")
        assert "heldout_loss" in message
        assert metric in message


LIBRARY_REFUSALS = [
    ("report_to=comet_ml", ["report_to", "pip install comet_ml", "none"]),
    ("report_to=[tensorboard, swanlab]", ["report_to", "pip install swanlab"]),
    ("deepspeed=ds.json", ["training.deepspeed", "sharded training is not available"]),
    ("fsdp=full_shard", ["training.fsdp", "sharded training is not available"]),
    ("optim=galore_adamw", ["galore_torch"]),
    ("activation_offloading=true", ["activation_offloading", "GPU"]),
    ("lr_scheduler_type=cosine_with_min_lr", ["min_lr", "lr_scheduler_kwargs"]),
    ("lr_scheduler_kwargs={nonsense: 1}", ["training", "nonsense"]),
]


@pytest.mark.parametrize(("field", "parts"), LIBRARY_REFUSALS, ids=[each[0] for each in LIBRARY_REFUSALS])
def test_training_fields_that_cannot_work_here(
    prefopt: Prefopt, recipe: Path, field: str, parts: list[str]
) -> None:
    message = refused(prefopt, recipe, f"training.{field}")
    assert all(part in message for part in parts), message


def test_batches_that_would_all_be_dropped(prefopt: Prefopt, recipe: Path) -> None:
    options = ("training.dataloader_drop_last=true", "training.per_device_train_batch_size=97")
    message = refused(prefopt, recipe, *options)
    assert "96 training rows" in message
    assert "batch of 97" in message


# --- data


def test_wrong_columns_are_answered_with_those_found(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    rows = [{"question": "q", "good": "a", "bad": "b"}]
    write_pairs(tmp_path / "odd.jsonl", rows)
    message = refused(prefopt, recipe, f"dataset.train={tmp_path}/odd.jsonl")
    assert "odd.jsonl" in message
    assert "columns found: question (text), good (text), bad (text)" in message


def test_nothing_left_after_filtering(prefopt: Prefopt, recipe: Path, tiny_world: Path) -> None:
    pairs = f"{tiny_world}/pairs.jsonl"
    message = refused(prefopt, recipe, f"dataset.train={{source: {pairs}, where: {{dimension: no}}}}")
    assert "pairs.jsonl is empty after filtering" in message
    assert "tone" in message
    message = refused(prefopt, recipe, "dataset.max_length=3")
    assert "no usable rows left (prompt too long 96)" in message


def test_damaged_data(prefopt: Prefopt, recipe: Path, tiny_world: Path, tmp_path: Path) -> None:
    zipped = gzip.compress((tiny_world / "pairs.jsonl").read_bytes())
    spoilt = {
        "cut.jsonl.gz": (zipped[:-200], "cut off"),
        "hit.jsonl.gz": (zipped[:500] + b"\0" * 9 + zipped[509:], "damaged"),
        "latin.jsonl": (b'{"prompt": "\xe9"}\n', "not UTF-8"),
    }
    for name, (content, part) in spoilt.items():
        (tmp_path / name).write_bytes(content)
        message = refused(prefopt, recipe, f"dataset.train={tmp_path / name}")
        assert str(tmp_path / name) in message
        assert part in message


LIST = {"prompt": "Human: Which?\nAssistant:", "responses": [" a", " b", " c"]}
BAD_LISTS = {
    "one response": (
        {"responses": [" a"], "ranking": [0]},
        "no usable rows left (fewer than two responses 3)",
    ),
    "all tied": ({"ranking": [1, 1, 1]}, "no usable rows left (all responses tied 3)"),
    "scores missing": ({"scores": None}, "scores is nothing, not a list of numbers"),
    "scores in words": ({"scores": ["good", "bad", "ugly"]}, "an entry of scores is text, not a number"),
    "a gap in the scores": ({"scores": [1.0, None, 2.0]}, "an entry of scores is nothing, not a number"),
    "too few scores": ({"scores": [1.0, 2.0]}, "scores has 2 entries, but there are 3 responses"),
    "infinite scores": ({"scores": [1.0, float("inf"), 2.0]}, "an entry of scores is not a finite number"),
    "best out of range": ({"best": 3}, "best is 3, but there are 3 responses"),
    "best below 0": ({"best": -1}, "best is -1, but there are 3 responses"),
    "best in letters": ({"best": "a"}, "best is text, not a whole number"),
    "no order": ({}, "no format fits its rows"),
}


@pytest.mark.parametrize("fault", BAD_LISTS)
@pytest.mark.parametrize("method", ["soft", "gpo"])
def test_lists_that_say_nothing(
    prefopt: Prefopt, recipe: Path, tmp_path: Path, fault: str, method: str
) -> None:
    """Where all rows are like that; some of many are left out and counted."""
    columns, reason = BAD_LISTS[fault]
    write_pairs(tmp_path / "lists.jsonl", [{**LIST, **columns}] * 3)
    data = (f"dataset.train={tmp_path}/lists.jsonl", "dataset.eval={}")
    message = refused(prefopt, recipe, f"method={{name: {method}}}", *data)
    assert reason in message


def test_some_lists_that_say_nothing_are_counted(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    odd = {
        "ranking": ["one response", "all tied"],
        "scores": ["a gap in the scores", "too few scores", "infinite scores"],
        "best": ["best out of range", "best below 0"],
    }
    counted = {}
    for column, faults in odd.items():
        sound = {"ranking": [0, 1, 2], "scores": [0.5, 2.0, 1.0], "best": 2}[column]
        rows = [{**LIST, **BAD_LISTS[fault][0]} for fault in faults]
        rows += [{**LIST, "prompt": f"Human: {n}?\nAssistant:", column: sound} for n in range(6)]
        write_pairs(tmp_path / f"{column}.jsonl", rows)
        data = (f"dataset.train={tmp_path}/{column}.jsonl", "dataset.eval={}")
        result = prefopt("check", str(recipe), "method={name: soft, kl_coef: 0}", *data, "--json")
        assert result.code == 0, result.err
        receipt = json.loads(result.out)["receipt"]["sets"]["train"]
        assert receipt["rows"] == 6, column
        counted[column] = receipt["sources"][0]["dropped"]
    assert counted == {
        "ranking": {"fewer than two responses": 1, "all responses tied": 1},
        "scores": {
            "malformed: an entry of scores is nothing, not a number": 1,
            "malformed: scores has 2 entries, but there are 3 responses": 1,
            "malformed: an entry of scores is not a finite number": 1,
        },
        "best": {
            "malformed: best is 3, but there are 3 responses": 1,
            "malformed: best is -1, but there are 3 responses": 1,
        },
    }


SOFT_MISTAKES = [
    ("alpha: 0", ["method.alpha", "greater than 0"]),
    ("alpha: .inf", ["method.alpha"]),
    ("kl_coef: -0.1", ["method.kl_coef", "at least 0", "-0.1"]),
    ("mu: {gamma: 0}", ["method.mu.gamma", "greater than 0"]),
    ("mu: {gamma: 1, strength: 1}", ["method.mu.strength", "unknown key"]),
    ("mu: 0.5", ["method.mu"]),
    ("mu_clamp: 0", ["method.mu_clamp", "greater than 0"]),
    ("regularizer: {estimator: tokens}", ["method.regularizer.estimator", "token"]),
    ("regularizer: {sample_every: 0}", ["method.regularizer.sample_every", "greater than 0"]),
    ("regularizer: {num_prompts: 0}", ["method.regularizer.num_prompts", "greater than 0"]),
    ("regularizer: {max_new_tokens: 0}", ["method.regularizer.max_new_tokens", "greater than 0"]),
    ("beta: 0.1", ["method.beta", "unknown key"]),
]


@pytest.mark.parametrize(("settings", "parts"), SOFT_MISTAKES, ids=[each[0] for each in SOFT_MISTAKES])
def test_mistakes_in_soft(prefopt: Prefopt, recipe: Path, settings: str, parts: list[str]) -> None:
    message = refused(prefopt, recipe, f"method={{name: soft, {settings}}}")
    assert "1 mistake" in message
    assert all(part in message for part in parts), message


def test_weights_are_for_pairs(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "lists.jsonl", [{**LIST, "ranking": [0, 1, 2]}] * 3)
    message = refused(
        prefopt,
        recipe,
        "method={name: soft, mu: {gamma: 0.1}}",
        f"dataset.train={tmp_path}/lists.jsonl",
        "dataset.eval={}",
    )
    assert message.startswith("method.mu: weights are defined for pairs, and the data has lists of up to 3")
    assert "dataset.lists: all_pairs" in message


def test_samples_without_room(prefopt: Prefopt, recipe: Path) -> None:
    message = refused(prefopt, recipe, "method={name: soft, regularizer: {max_new_tokens: 250}}")
    assert "method.regularizer.max_new_tokens: with 250 of them no prompt of dataset.train fits" in message
    assert "256 tokens (the shortest has " in message


def test_prompts_that_cannot_be_sampled_for(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    prompts = f"method={{name: soft, regularizer: {{prompts: {tmp_path}/prompts.jsonl}}}}"
    message = refused(prefopt, recipe, prompts)
    assert f"{tmp_path}/prompts.jsonl: no such file" in message
    write_pairs(tmp_path / "prompts.jsonl", [{"question": "q"}])
    message = refused(prefopt, recipe, prompts)
    assert "prompts.jsonl" in message
    assert "question (text)" in message
    write_pairs(tmp_path / "prompts.jsonl", [{"prompt": ""}])
    message = refused(prefopt, recipe, prompts)
    assert "no usable rows left (empty prompt 1)" in message
    (tmp_path / "prompts.jsonl").write_text("")
    assert "prompts.jsonl is empty" in refused(prefopt, recipe, prompts)


def test_unknown_names_of_the_hub_while_offline(prefopt: Prefopt, recipe: Path) -> None:
    message = refused(prefopt, recipe, "dataset.train=nobody/nothing")
    assert "nobody/nothing" in message
    assert "HF_HUB_OFFLINE" in message
    message = refused(prefopt, recipe, "model.name_or_path=nobody/nothing")
    assert "nobody/nothing" in message
    assert "offline" in message


# --- output folder


@pytest.mark.parametrize(
    "place",
    [
        "{tmp}/file",
        "{tmp}/file/run",
        "/dev/full",
        "/proc/run",
        "/sys/run",
        "{tmp}/dangling",
        "{tmp}/" + "x" * 300,
    ],
)
def test_output_that_cannot_be_written(prefopt: Prefopt, recipe: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = set(tmp_path.iterdir())
    message = refused(prefopt, recipe, f"output_dir={place.format(tmp=tmp_path)}")
    assert message.startswith("output_dir ")
    assert "Choose another output_dir" in message
    assert set(tmp_path.iterdir()) == before


# --- model


def _edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILT_MODELS = {
    "no config.json": (
        lambda m: (m / "config.json").unlink(),
        ["neither config.json nor adapter_config.json"],
    ),
    "broken config.json": (
        lambda m: (m / "config.json").write_text("{oops"),
        ["config.json", "not a valid JSON"],
    ),
    "unknown architecture": (lambda m: _edit_config(m, model_type="nonsense"), ["nonsense"]),
    "odd config.json": (lambda m: _edit_config(m, num_attention_heads=5), ["hidden size (32)", "(5)"]),
    "no language model": (T5Config().save_pretrained, ["no causal language model"]),
    "no tokenizer": (
        lambda m: (m / "tokenizer.json").unlink(),
        ["tokenizer", "Put the model's tokenizer.json"],
    ),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{oops"), ["the tokenizer of"]),
    "foreign tokenizer": (lambda m: _edit_config(m, vocab_size=300), ["token id 399", "300 entries"]),
}


@pytest.mark.parametrize("fault", SPOILT_MODELS)
def test_spoilt_model_folders(prefopt: Prefopt, recipe: Path, model: Path, fault: str) -> None:
    spoil, parts = SPOILT_MODELS[fault]
    spoil(model)
    message = refused(prefopt, recipe, f"model.name_or_path={model}")
    assert all(part in message for part in parts), message


def _pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def _cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


SPOILT_WEIGHTS = {
    "pickled": (_pickle, ["safetensors", "Convert"]),
    "cut off": (_cut, ["damaged or cut off", "Fetch them again"]),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), ["damaged or cut off"]),
    "of a wider model": (
        lambda m: _edit_config(m, hidden_size=64, head_dim=8),
        ["another shape", "embed_tokens"],
    ),
    # Without a refusal the third layer would be made up at random.
    "of fewer layers": (
        lambda m: _edit_config(m, num_hidden_layers=3),
        ["9 of the parameters", "model.layers.2"],
    ),
}


@pytest.mark.parametrize("fault", SPOILT_WEIGHTS)
def test_spoilt_weights(prefopt: Prefopt, recipe: Path, model: Path, fault: str) -> None:
    """`prefopt check` reads no weights, so only training can tell."""
    spoil, parts = SPOILT_WEIGHTS[fault]
    spoil(model)
    message = refused(prefopt, recipe, f"model.name_or_path={model}", commands=("train",))
    assert str(model) in message
    assert all(part in message for part in parts), message


ADAPTERS = [
    ("target_modules: [nope]", ["adapter.target_modules", "'nope'", "q_proj"]),
    ("target_modules: [q_proj, nope]", ["'nope'"]),  # peft would train q_proj alone
    ("target_modules: '(('", ["adapter", "unterminated"]),
    ("target_modules: [q_proj, lm_head]", ["adapter.target_modules", "head", "modules_to_save: [lm_head]"]),
    ("modules_to_save: [nope]", ["adapter.modules_to_save", "'nope'"]),  # peft would save nothing
    ("target_modules: [q_proj], layers_to_transform: [99]", ["adapter", "layers_to_transform", "99"]),
    ("r: 5, init_lora_weights: orthogonal", ["adapter", "even", "5"]),
]


@pytest.mark.parametrize(("settings", "parts"), ADAPTERS, ids=[each[0] for each in ADAPTERS])
def test_adapters_that_do_not_fit(prefopt: Prefopt, recipe: Path, settings: str, parts: list[str]) -> None:
    message = refused(prefopt, recipe, f"adapter={{type: lora, {settings}}}")
    assert all(part in message for part in parts), message


def test_unknown_attention(prefopt: Prefopt, recipe: Path) -> None:
    message = refused(prefopt, recipe, "model.attn_implementation=nonsense")
    assert "nonsense" in message
    assert "sdpa" in message


def test_broken_chat_template(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    template, data = tmp_path / "bad.jinja", tmp_path / "chat.jsonl"
    template.write_text("{% for m in %}")
    turn = {
        role: [{"role": who, "content": role}]
        for role, who in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    write_pairs(data, [turn] * 9)
    message = refused(prefopt, recipe, f"dataset.train={data}", f"model.chat_template={template}")
    assert "template" in message
    template.unlink()
    assert "bad.jinja cannot be read" in refused(prefopt, recipe, f"model.chat_template={template}")


# --- unusual, but sound


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(RunFolder(run).metrics) if "loss" in record]


def test_fields_that_change_no_figure(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    plain = prefopt("train", str(recipe))
    assert plain.code == 0, plain.err
    expected = _losses(tmp_path / "run")
    for number, field in enumerate(
        [
            "precompute_ref_log_probs=false",
            "attention_layout=padded",
            "prediction_loss_only=false",
            "dataloader_num_workers=2",
            "report_to=tensorboard",
            "full_determinism=true",
        ]
    ):
        out = tmp_path / f"run{number}"
        result = prefopt("train", str(recipe), f"training.{field}", f"output_dir={out}")
        assert result.code == 0, result.err
        assert _losses(out) == pytest.approx(expected, rel=1e-5), field
    assert list((tmp_path / "run4").rglob("events.out.tfevents*"))


def test_the_best_model_is_what_remains_also_after_resuming(
    prefopt: Prefopt, recipe: Path, tiny_world: Path, tmp_path: Path
) -> None:
    # The other way round, so that the best step is not the last one.
    options = [*BEST, "training.greater_is_better=true", f"dataset.eval.tone={tiny_world}/heldout.jsonl"]
    assert prefopt("train", str(recipe), *options).code == 0
    run = RunFolder(tmp_path / "run")
    losses = {
        r["step"]: r["eval_heldout_loss"] for r in metrics.read(run.metrics) if "eval_heldout_loss" in r
    }
    assert any("eval_tone_loss" in record for record in metrics.read(run.metrics))
    best = max(losses, key=losses.__getitem__)
    assert best < 5
    weights = (run.model / "model.safetensors").read_bytes()
    assert weights == (run.checkpoints / f"checkpoint-{best}" / "model.safetensors").read_bytes()

    # As if it had been killed after step 5.
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.model)
    run.update_manifest(status="running")
    resumed = prefopt("train", str(recipe), *options, "--resume")
    assert resumed.code == 0, resumed.err
    assert (run.model / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("method", ["gpo", "soft"])
def test_every_metric_of_an_evaluation_may_choose_the_best_model(
    prefopt: Prefopt, recipe: Path, method: str
) -> None:
    options = (f"method={{name: {method}}}", *SHORT_SAMPLES[method])
    summary = json.loads(prefopt("train", str(recipe), *options, "training.max_steps=1", "--json").out)
    counted = {"runtime", "samples_per_second", "steps_per_second"}
    names = {name.removeprefix("eval_heldout_") for name in summary["metrics"] if name.startswith("eval_")}
    assert names - counted == {*EVAL_METRICS, *METHOD_METRICS[method]}


def test_vocabularies_may_be_padded(prefopt: Prefopt, recipe: Path, model: Path) -> None:
    """More rows in the embedding than tokens is common (a multiple of 64) and sound."""
    size = LlamaConfig.from_pretrained(model).vocab_size
    _edit_config(model, vocab_size=size + 64)
    assert prefopt("check", str(recipe), f"model.name_or_path={model}", "--pairs", "0").code == 0
