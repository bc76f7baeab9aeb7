"""Combinations that cannot work."""

import pytest

NO_EVAL = ("  eval:\n    helpful: {source: held.jsonl}\n", "")


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


def test_a_mistaken_section_causes_no_follow_up_mistakes(refusal, sound):
    message = refusal(
        sound.replace("helpful: {source: held.jsonl}", "helpful: {sorce: x}"), "training.eval_strategy=steps"
    )
    assert "nothing to evaluate on" not in message
    message = refusal(sound, "training.fp16=3", "training.bf16=true")
    assert "at most one" not in message
