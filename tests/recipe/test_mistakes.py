"""Every mistake is told, at once, with line, key path and the nearest valid name."""

import re

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.training_settings import GOVERNED

# (what to replace, by what, the line told, parts of the message)
MISTAKES = [
    ("beta: 0.1", "betta: 0.1", 13, ["method.betta", "unknown key", "'beta'"]),
    ("beta: 0.1", "beta: '0.1'", 13, ["method.beta", "a number", "without quotes"]),
    ("beta: 0.1", "beta: 0", 13, ["method.beta", "greater than 0", "found 0"]),
    ("beta: 0.1", "beta: .nan", 13, ["method.beta", "finite"]),
    ("beta: 0.1", "loss_type: x", 13, ["method.loss_type", "method.loss"]),
    ("beta: 0.1", "max_steps: 3", 13, ["method.max_steps", "training.max_steps"]),
    ("loss: logistic", "loss: logistik", 12, ["method.loss", "'logistic'", "package.module:function"]),
    ("loss: logistic", "loss: dpo", 12, ["method.loss", "'logistic'"]),
    ("loss: logistic", "loss: ipo", 12, ["'squared'", "length_normalize"]),
    ("loss: logistic", "loss: mine.py:f", 12, ["method.loss", "package.module:function"]),
    ("name: gpo", "name: gop", 11, ["method.name", "'gpo'"]),
    ("  name: gpo\n", "", 10, ["method.name", "missing", "gpo"]),
    ("model: {name_or_path: some/model}", "model: some/model", 1, ["model", "a mapping", "name_or_path"]),
    ("some/model}", "some/model, torch_dtype: auto}", 1, ["model.torch_dtype", "model.dtype"]),
    ("some/model}", "some/model, dtype: bfloat}", 1, ["model.dtype", "float32", "'bfloat16'"]),
    ("some/model}", "'', revision: 3}", 1, ["model.revision", "a string", "quotes"]),
    ("adapter: none", "adapter: lora", 2, ["adapter", "none", "{type: lora"]),
    ("adapter: none", "adapter: {r: 8}", 2, ["adapter.type", "missing", "lora"]),
    ("adapter: none", "adapter: {type: lora, r: 8.0}", 2, ["adapter.r", "an integer", "write 8"]),
    ("adapter: none", "adapter: {type: lora, lora_r: 8}", 2, ["adapter.lora_r", "adapter.r"]),
    (
        "adapter: none",
        "adapter: {type: lora, target_modules: [1]}",
        2,
        ["adapter.target_modules.0", "a string"],
    ),
    ("limit: 10", "limit: '10'", 6, ["dataset.train.0.limit", "an integer", "write 10"]),
    ("limit: 10", "splitt: x", 6, ["dataset.train.0.splitt", "'split'"]),
    ("limit: 10", "columns: {promt: x}", 6, ["dataset.train.0.columns.promt", "'prompt'"]),
    ("limit: 10", "where: {dimension: [a, {}]}", 6, ["dataset.train.0.where.dimension.1", "a string"]),
    ("limit: 10", "format: conversation", 6, ["dataset.train.0.format", "'conversational'"]),
    ("max_length: 512", "max_length: 1_000", 9, ["dataset.max_length", "without underscores"]),
    ("max_length: 512", "shuffle: yes", 9, ["dataset.shuffle", "write true"]),
    ("helpful: {", "a/b: {", 7, ["dataset.eval", "'a/b'"]),
    ("learning_rate: 1e-6", "learning_rat: 1", 15, ["training.learning_rat", "'learning_rate'"]),
    ("learning_rate: 1e-6", "learning_rate: -1", 15, ["training.learning_rate", "at least 0", "found -1"]),
    ("learning_rate: 1e-6", "lr: 1", 15, ["training.lr", "training.learning_rate"]),
    ("learning_rate: 1e-6", "warmup_ratio: 0.1", 15, ["training.warmup_ratio", "training.warmup_steps"]),
    ("learning_rate: 1e-6", "optim: adamw_toch", 15, ["training.optim", "'adamw_torch'"]),
    ("learning_rate: 1e-6", "optim: adamw", 15, ["training.optim", "did you mean 'adamw_torch'"]),
    ("learning_rate: 1e-6", "lr_scheduler_type: cosin", 15, ["training.lr_scheduler_type", "'cosine'"]),
    ("learning_rate: 1e-6", "save_strategy: never", 15, ["training.save_strategy", "epoch", "best"]),
    ("learning_rate: 1e-6", "report_to: [wandb, tensorbord]", 15, ["found 'tensorbord'", "'tensorboard'"]),
    ("learning_rate: 1e-6", "bf16: on", 15, ["training.bf16", "true, false or null", "write true"]),
    ("learning_rate: 1e-6", "save_total_limit: None", 15, ["training.save_total_limit", "null"]),
    ("batch_size: 4", "batch_size: 4.0", 16, ["training.per_device_train_batch_size", "integer", "write 4"]),
    ("batch_size: 4", "batch_size: 0", 16, ["at least 1"]),
    ("output_dir: runs/x", "outptu_dir: runs/x", 17, ["outptu_dir", "'output_dir'"]),
    ("output_dir: runs/x", "learning_rate: 1", 17, ["learning_rate", "training.learning_rate"]),
    ("output_dir: runs/x", "seed: 1", 17, ["dataset.seed", "training.seed"]),
    ("output_dir: runs/x", "launch: {processes: 0}", 17, ["launch.processes", "at least 1, or auto"]),
    ("output_dir: runs/x", "launch: {engine: fsdp2}", 17, ["launch.engine", "'fsdp'"]),
    ("output_dir: runs/x", "launch: {rendezvous: here}", 17, ["launch.rendezvous", "host:port"]),
]


# (what stands in the place of line 12 of a recipe of method soft, parts of the message)
SOFT_MISTAKES = [
    ("alpha: 0", ["method.alpha", "greater than 0", "found 0"]),
    ("alpha: -1.5", ["method.alpha", "greater than 0", "found -1.5"]),
    ("alpha: .inf", ["method.alpha", "finite"]),
    ("alpha: '1'", ["method.alpha", "a number", "write 1 without quotes"]),
    ("alhpa: 1", ["method.alhpa", "unknown key", "did you mean 'alpha'"]),
    ("kl_coef: -0.1", ["method.kl_coef", "at least 0", "found -0.1"]),
    ("kl_coeff: 0.1", ["method.kl_coeff", "did you mean 'kl_coef'"]),
    ("mu: 0.5", ["method.mu", "expected none", "found 0.5", "{gamma: 0.1}"]),
    ("mu: {}", ["method.mu.gamma", "missing"]),
    ("mu: {gamma: 0}", ["method.mu.gamma", "greater than 0"]),
    ("mu: {gamma: 1, clamp: 3}", ["method.mu.clamp", "unknown key"]),
    ("mu_clamp: 0", ["method.mu_clamp", "greater than 0"]),
    ("gamma: 1", ["method.gamma", "method.mu.gamma"]),
    (
        "loss: logistic",
        ["method.loss", "method gpo or sequential has it, soft does not", "valid here: alpha, kl_coef"],
    ),
    (
        "beta: 0.1",
        ["method.beta", "method gpo or sequential has it, soft does not", "valid here: alpha, kl_coef"],
    ),
    ("sample_every: 4", ["method.sample_every", "method.regularizer.sample_every"]),
    ("regularizer: none", ["method.regularizer", "a mapping", "found 'none'"]),
    ("regularizer: {num_promts: 3}", ["method.regularizer.num_promts", "did you mean 'num_prompts'"]),
    ("regularizer: {kl_coef: 0.1}", ["method.regularizer.kl_coef", "method.kl_coef"]),
    ("regularizer: {beta: 0.1}", ["method.regularizer.beta", "unknown key"]),
    ("regularizer: {sample_every: 0}", ["method.regularizer.sample_every", "greater than 0", "found 0"]),
    ("regularizer: {sample_every: 2.0}", ["method.regularizer.sample_every", "an integer", "write 2"]),
    ("regularizer: {num_prompts: 0}", ["method.regularizer.num_prompts", "greater than 0"]),
    ("regularizer: {max_new_tokens: 0}", ["method.regularizer.max_new_tokens", "greater than 0"]),
    (
        "regularizer: {estimator: sequences}",
        ["method.regularizer.estimator", "token or sequence", "did you mean 'sequence'"],
    ),
    ("regularizer: {prompts: []}", ["method.regularizer.prompts", "at least one entry"]),
    ("regularizer: {prompts: [{sorce: x.jsonl}]}", ["method.regularizer.prompts.0.sorce", "'source'"]),
    (
        "regularizer: {prompts: [{source: x, limit: 0}]}",
        ["method.regularizer.prompts.0.limit", "greater than"],
    ),
]


@pytest.mark.parametrize(("old", "new", "line", "parts"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_a_mistake_is_told_with_line_key_and_remedy(refusal, sound, old, new, line, parts):
    assert sound.count(old) == 1
    message = refusal(sound.replace(old, new))
    told = [text for text in message.splitlines()[1:] if all(part in text for part in parts)]
    assert len(told) == 1, message
    assert told[0].startswith(f"  my.yaml:{line}  "), message


@pytest.mark.parametrize(("new", "parts"), SOFT_MISTAKES, ids=[new for new, _ in SOFT_MISTAKES])
def test_a_mistake_in_the_settings_of_soft(refusal, soft, new, parts):
    message = refusal(soft.replace("alpha: 0.1", new))
    told = [text for text in message.splitlines()[1:] if all(part in text for part in parts)]
    assert len(told) == 1, message
    assert told[0].startswith("  my.yaml:12  "), message


@pytest.mark.parametrize("key", ["alpha: 1", "kl_coef: 0", "mu: none", "mu_clamp: 1", "regularizer: {}"])
def test_a_key_of_soft_under_gpo_names_soft(refusal, sound, key):
    message = refusal(sound.replace("beta: 0.1", key))
    name = key.partition(":")[0]
    assert (
        f"my.yaml:13  method.{name}: unknown key; method soft has it, gpo does not; valid here: loss"
        in message
    )


def test_a_misspelt_gamma_is_told_with_what_is_then_missing(refusal, soft):
    message = refusal(soft.replace("alpha: 0.1", "mu: {gama: 1}"))
    assert message.splitlines()[0] == "my.yaml: 2 mistakes"
    assert "method.mu.gama: unknown key; did you mean 'gamma'?" in message
    assert "method.mu.gamma: missing" in message


def test_the_sound_recipe_has_no_mistake(load, soft):
    recipe = load()
    assert recipe.method.beta == 0.1
    assert recipe.training["learning_rate"] == 1e-6
    assert load(soft).method.alpha == 0.1


@pytest.mark.parametrize(
    ("key", "samples"),
    [("kl_coef: 0", False), ("kl_coef: 0.0", False), ("alpha: 2", True), ("mu: {gamma: 1}", True)],
)
def test_the_policy_is_sampled_only_for_the_kl(load, soft, key, samples):
    assert load(soft.replace("alpha: 0.1", key)).method.samples is samples


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(refusal):
    text = "model: {nam: x}\nadapter: lora\nmethod:\n  name: gpo\n  betta: 1\n"
    text += "training:\n  bf16: 3\n  fp: 1\n  bf16: 3\n"
    message = refusal(text, "method.loss=dpo", "nonsense")
    lines = message.splitlines()
    assert lines[0] == "my.yaml: 11 mistakes"
    assert len(lines) == 12
    keys = ["model.nam", "model.name_or_path", "dataset", "output_dir", "adapter", "method.betta"]
    keys += ["training.bf16", "training.fp", "duplicate", "override 'method.loss=dpo'", "override 'nonsense'"]
    for key in keys:
        assert key in message
    numbers = [int(number) for number in re.findall(r"my\.yaml:(\d+)", message)]
    assert numbers == sorted(numbers)
    assert lines[-1].startswith("  override")


@pytest.mark.parametrize("name", [*GOVERNED, "hub_token", "hub_model_id"])
def test_governed_training_fields_point_elsewhere(refusal, sound, name):
    message = refusal(sound.replace("learning_rate: 1e-6", f"{name}: 1"))
    assert f"my.yaml:15  training.{name}: cannot be set here: " in message


def test_pointers_name_the_right_place(refusal, sound):
    for name, place in {
        "beta": "method.beta",
        "loss_type": "method.loss",
        "max_length": "dataset.max_length",
        "truncation_mode": "dataset.on_overflow",
        "output_dir": "output_dir at the top level",
        "resume_from_checkpoint": "--resume",
        "push_to_hub": "hf upload",
    }.items():
        assert place in refusal(sound.replace("learning_rate: 1e-6", f"{name}: 1"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty", "recipe new gpo"]),
        (b"# only a comment\n", ["empty"]),
        (b"- a\n", [":1", "mapping", "a list"]),
        (b"text", ["mapping", "'text'"]),
        ("a: 1\nb: é\n".encode("latin-1"), [":2", "UTF-8", "0xe9", "offset 8"]),
        ("a: 1".encode("utf-16"), ["UTF-8", "offset 0"]),
        (b"a: " + b"x" * 1_000_000, ["larger than 500 kB"]),
    ],
)
def test_files_that_are_no_recipe(load, content, parts):
    with pytest.raises(UserError) as caught:
        load(content)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_byte_order_mark_does_not_matter(load, sound):
    assert load("\ufeff" + sound) == load(sound)


def test_missing_files_suggest_what_may_be_meant(tmp_path, sound):
    (tmp_path / "mine.yaml").write_text(sound)
    for name, part in {
        "mina.yaml": "did you mean " + str(tmp_path / "mine.yaml"),
        "gpo-hh.yaml": "prefopt recipe show gpo-hh > gpo-hh.yaml",
        "gpo-hhh": "'gpo-hh'",
        "zzzzzz.yaml": "prefopt recipe list",
        "nowhere/x.yaml": "no folder",
        "": "is a folder",
        "nul\0": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(UserError, match=re.escape(part)):
            load_recipe(tmp_path / name if "\0" not in name else name)


def test_a_run_folder_points_to_its_recipe(tmp_path, sound):
    (tmp_path / "recipe.yaml").write_text(sound)
    with pytest.raises(UserError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(tmp_path)


def test_a_file_without_permission(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may read everything, so chmod would not do
    with pytest.raises(UserError, match="permission denied"):
        load_recipe(tmp_path / "my.yaml")
