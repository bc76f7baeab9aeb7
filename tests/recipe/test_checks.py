"""Combinations that cannot work."""

import pytest

NO_EVAL = ("  eval:\n    helpful: {source: held.jsonl}\n", "")
PROMPTS = "method.regularizer.prompts"
BEST = ["training.load_best_model_at_end=true", "training.save_strategy=epoch"]


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["training.bf16=true", "training.fp16=true"], "training.fp16", "at most one"),
        (["training.bf16_full_eval=true", "training.fp16_full_eval=true"], "training.fp16_full_eval", "one"),
        (["training.fp16=true", "model.dtype=float16"], "model.dtype", "gradients"),
        (["training.max_steps=0"], "training.max_steps", "at least 1"),
        (["training.max_steps=-2"], "training.max_steps", "-1"),
        (["training.save_steps=2.5"], "training.save_steps", "whole number"),
        (["training.dataloader_prefetch_factor=2"], "training.dataloader_prefetch_factor", "num_workers"),
        (["dataset.holdout=0.1", "dataset.eval.holdout.source=x"], "dataset.eval.holdout", "rename"),
        (
            ["training.load_best_model_at_end=true", "training.metric_for_best_model=helpful_loss"],
            "training.load_best_model_at_end",
            "save_strategy (steps) to be the same as eval_strategy (epoch)",
        ),
        (
            ["training.load_best_model_at_end=true", "training.save_strategy=epoch"],
            "training.load_best_model_at_end",
            "helpful_loss",
        ),
        (
            ["training.save_strategy=best", "training.metric_for_best_model=loss"],
            "training.metric_for_best_model",
            "helpful_loss",
        ),
        (
            [
                "training.eval_strategy=no",
                "training.lr_scheduler_type=greedy",
                "training.metric_for_best_model=helpful_loss",
            ],
            "training.lr_scheduler_type",
            "eval_strategy",
        ),
    ],
)
def test_it_is_told(refusal, sound, overrides, key, part):
    message = refusal(sound, *overrides)
    assert message.splitlines()[0].endswith(": 1 mistake"), message
    assert f"  {key}: " in message
    assert part in message


def test_lists_stay_whole_only_for_methods_that_take_them(refusal, load, sound, soft):
    message = refusal(sound, "dataset.lists=whole")
    assert (
        "  dataset.lists: method gpo compares pairs; use all_pairs or adjacent_pairs, or method soft"
        in message
    )
    for lists in ("auto", "whole", "all_pairs", "adjacent_pairs"):
        load(soft, f"dataset.lists={lists}")
        if lists != "whole":
            load(sound, f"dataset.lists={lists}")
    message = refusal(sound.replace("name: gpo", "name: gop"), "dataset.lists=whole")
    assert "dataset.lists" not in message


@pytest.mark.parametrize(
    "setting",
    ["precompute_ref_log_probs=true", "precompute_ref_log_probs=false", "precompute_ref_batch_size=8"],
)
def test_soft_scores_no_data_with_the_reference(refusal, load, sound, soft, setting):
    message = refusal(soft, f"training.{setting}")
    name = setting.partition("=")[0]
    assert message.splitlines()[0].endswith(": 1 mistake"), message
    assert (
        f"  training.{name}: method soft never scores the data with the reference policy; leave it out"
        in message
    )
    load(sound, f"training.{setting}")


@pytest.mark.parametrize(
    ("metric", "of_gpo", "of_soft"),
    [
        ("helpful_loss", True, True),
        ("eval_helpful_rewards/accuracies", True, True),
        ("helpful_soft/gradient_weight", False, True),
        ("helpful_gpo/squared_log_ratio", True, False),
        ("helpful_soft/preference_loss", False, False),  # of training: the loss of an evaluation is just that
        ("helpful_kl/ref", False, False),  # nothing is sampled in an evaluation
        ("soft/gradient_weight", False, False),  # of which set?
    ],
)
def test_the_best_model_goes_by_what_an_evaluation_reports(
    refusal, load, sound, soft, metric, of_gpo, of_soft
):
    for text, reported in ((sound, of_gpo), (soft, of_soft)):
        if reported:
            load(text, *BEST, f"training.metric_for_best_model={metric}")
        else:
            message = refusal(text, *BEST, f"training.metric_for_best_model={metric}")
            assert "training.metric_for_best_model: expected a metric of one eval set" in message


@pytest.mark.parametrize(
    ("prompts", "key", "part"),
    [
        ("sandbox:hepful", PROMPTS, "Did you mean helpful?"),
        ("sandbox:base", PROMPTS, "sandbox:base is the model"),
        ("[q.jsonl, {source: sandbox:helpful/seed=x}]", f"{PROMPTS}.1.source", "seed must be a whole number"),
        ("{source: sandbox:helpful, config: rankd}", f"{PROMPTS}.config", "Did you mean ranked?"),
        ("{source: sandbox:helpful, revision: main}", f"{PROMPTS}.revision", "no revisions"),
    ],
)
def test_names_of_the_sandbox_among_the_prompts(refusal, soft, prompts, key, part):
    message = refusal(soft, f"{PROMPTS}={prompts}")
    assert message.splitlines()[0].endswith(": 1 mistake"), message
    assert f"  {key}: " in message
    assert part in message


@pytest.mark.parametrize(
    "prompts",
    ["q.jsonl", "sandbox:polite", "{source: sandbox:polite, config: ranked}", "[a.jsonl, {source: b.csv}]"],
)
def test_prompts_may_be_one_source_or_several(load, soft, prompts):
    recipe = load(soft, f"{PROMPTS}={prompts}")
    assert [source.source for source in recipe.method.regularizer.prompts]


@pytest.mark.parametrize(
    "override",
    ["training.eval_strategy=steps", "training.load_best_model_at_end=true", "training.eval_on_start=true"],
)
def test_evaluation_needs_something_to_evaluate_on(refusal, load, sound, override):
    key = override.split("=")[0]
    message = refusal(sound.replace(*NO_EVAL), override)
    assert f"  {key}: nothing to evaluate on" in message
    if "load_best" not in override:
        load(sound, override)
        load(sound.replace(*NO_EVAL), override, "dataset.holdout=0.1")


@pytest.mark.parametrize(
    ("every", "save", "sound_pair"), [(10, 20, True), (10, 25, False), (0.1, 0.3, True), (0.1, 5, False)]
)
def test_the_best_model_must_have_been_saved(load, refusal, sound, every, save, sound_pair):
    overrides = [
        "training.load_best_model_at_end=true",
        "training.metric_for_best_model=eval_helpful_loss",
        "training.eval_strategy=steps",
        f"training.eval_steps={every}",
        f"training.save_steps={save}",
    ]
    if sound_pair:
        load(sound, *overrides)
    else:
        assert "whole multiple" in refusal(sound, *overrides)


@pytest.mark.parametrize(
    "optimizer",
    [
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "apollo_adamw_layerwise",
        "lomo",
        "adalomo",
    ],
)
def test_optimizers_that_would_never_train_the_classifier(refusal, load, sound, beside_gpo, optimizer):
    """They step through the model's weights in the backward pass; without a degree loss there is no classifier."""
    chosen = f"training.optim={optimizer}"
    message = refusal(beside_gpo, chosen)
    assert message.splitlines()[0].endswith(": 1 mistake"), message
    assert f"  training.optim: {optimizer} steps during the backward pass and never trains" in message
    load(beside_gpo, chosen, "method.ssl_coef=0")
    load(sound, chosen)
    for other in ("adamw_torch", "sgd", "galore_adamw"):
        load(beside_gpo, f"training.optim={other}")


def test_a_mistaken_section_causes_no_follow_up_mistakes(refusal, sound):
    message = refusal(
        sound.replace("helpful: {source: held.jsonl}", "helpful: {sorce: x}"), "training.eval_strategy=steps"
    )
    assert "nothing to evaluate on" not in message
    message = refusal(sound, "training.fp16=3", "training.bf16=true")
    assert "at most one" not in message


BITS = ["adapter={type: lora}", "quantization.bits=4"]
FSDP = "launch.engine=fsdp"


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (
            ["quantization.bits=4"],
            "quantization",
            "only an adapter on them; add adapter: {type: lora, r: 16}",
        ),
        (["adapter={type: lora}", "quantization.bits=2"], "quantization.bits", "4 or 8"),
        ([*BITS, "quantization.threshold=3.0"], "quantization.threshold", "is for bits: 8"),
        (
            ["adapter={type: lora}", "quantization.bits=8", "quantization.quant_type=fp4"],
            "quantization.quant_type",
            "is for bits: 4",
        ),
        ([*BITS, FSDP], "quantization", "add storage_dtype: bfloat16"),
        ([*BITS, FSDP, "model.dtype=float16"], "quantization", "add storage_dtype: float16"),
        (
            ["adapter={type: lora}", "quantization.bits=8", FSDP],
            "quantization.bits",
            "of 8 bits do not bear; write 4",
        ),
        (
            [*BITS, "launch.engine=deepspeed", "launch.zero_stage=3"],
            "launch.zero_stage",
            "write 2, or engine: fsdp",
        ),
    ],
)
def test_bits_that_cannot_work(refusal, sound, overrides, key, part):
    message = refusal(sound, *overrides)
    assert any(key in line and part in line for line in message.splitlines()), message


@pytest.mark.parametrize(
    "overrides",
    [
        [FSDP, "quantization.storage_dtype=bfloat16"],
        ["launch.engine=deepspeed", "launch.zero_stage=2"],
        ["quantization.skip_modules=[o_proj]", "adapter={type: lora, use_dora: true}"],
    ],
)
def test_bits_that_can(load, sound, overrides):
    load(sound, *BITS, *overrides)


ENGINE = "launch.engine=deepspeed"
MACHINES = ["launch.machines=2", "launch.rendezvous=a:29500"]


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["launch.cpu_offload=true"], "launch.cpu_offload", "is for engine: fsdp or deepspeed"),
        (
            [FSDP, "launch.zero_stage=1"],
            "launch.zero_stage",
            "is for engine: deepspeed, and the engine is fsdp",
        ),
        (
            [*MACHINES, "launch.machine_rank=2"],
            "launch.machine_rank",
            "expected less than launch.machines (2)",
        ),
        (["launch.rendezvous=a:65535"], "launch.rendezvous", "with a port up to 65534"),
        ([ENGINE, "launch.config=ds.json", "launch.zero_stage=3"], "launch.zero_stage", "is used as it is"),
    ],
)
def test_launches_that_cannot_work(refusal, sound, overrides, key, part):
    message = refusal(sound, *overrides)
    assert any(key in line and part in line for line in message.splitlines()), message


@pytest.mark.parametrize(
    "overrides",
    [
        ["launch.processes=auto"],
        ["launch.machines=2"],  # Slurm or SkyPilot may know where they meet
        [*MACHINES, "launch.machine_rank=1", FSDP, "launch.reshard_after_forward=false"],
        ["launch.rendezvous='[fe80::1]:29500'", "launch.machines=2"],
        ["launch.config=accelerate.yaml", "launch.machine_rank=1"],  # the file may say how many there are
    ],
)
def test_launches_that_can(load, sound, overrides):
    load(sound, *overrides)
