"""What is read from the source of trl and transformers is what they are."""

import dataclasses
import typing
from typing import Literal

import pytest

from prefopt_cli.errors import PrefoptError
from prefopt_cli.recipe import training_fields as module
from prefopt_cli.recipe.training_fields import MISSING, OWN_FIELDS, training_fields
from prefopt_cli.recipe.training_settings import GOVERNED, RANGES, REPORT_TO, TYPES, allowed_fields, choices


@pytest.fixture(scope="module")
def real() -> dict[str, dataclasses.Field]:
    from trl import DPOConfig

    return {field.name: field for field in dataclasses.fields(DPOConfig) if field.init}


OWN = {field.name for field in OWN_FIELDS}


def test_names_are_those_of_the_class_and_our_own(real):
    assert set(training_fields()) == set(real) | OWN


def test_own_fields_come_with_default_and_help():
    for field in OWN_FIELDS:
        assert field.help, field.name
        assert training_fields()[field.name] == field


def test_literal_defaults_are_those_of_the_class(real):
    read = {name: field.default for name, field in training_fields().items() if field.default is not MISSING}
    read = {name: default for name, default in read.items() if name not in OWN}
    assert len(read) > 100
    assert read == {name: real[name].default for name in read}


def test_every_enum_is_found_and_complete(real):
    from transformers.debug_utils import DebugOption
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    for name, enum in {
        "optim": OptimizerNames,
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
        "debug": DebugOption,
    }.items():
        assert set(choices(training_fields()[name].type)) == {member.value for member in enum}, name


def test_annotations_are_understood():
    unknown = {name for name, field in training_fields().items() if field.type is typing.Any}
    assert unknown <= {"parallelism_config"}
    types = {name: field.type for name, field in training_fields().items()}
    assert types["learning_rate"] is float
    assert types["bf16"] == bool | None
    assert types["save_total_limit"] == int | None
    assert types["optim_target_modules"] == str | list[str] | None
    assert typing.get_origin(types["train_sampling_strategy"]) is Literal


def test_help_texts_are_found():
    assert all(field.help for field in training_fields().values())
    assert "%%" not in "".join(field.help for field in training_fields().values())


def test_tables_name_real_fields(real):
    assert set(GOVERNED) | set(RANGES) | set(TYPES) <= set(real)
    assert not any(name.startswith("hub_") or name in GOVERNED for name in allowed_fields())


def test_every_integration_of_the_library_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= set(REPORT_TO)


def test_log_levels_are_those_of_the_library(refusal, sound):
    from transformers.training_args import trainer_log_levels

    assert set(choices(TYPES["log_level"])) == set(trainer_log_levels)


@pytest.mark.parametrize("package", ["no_such_package_at_all", "json"])
def test_a_missing_or_unknown_library_is_told(package):
    with pytest.raises(PrefoptError, match=package):
        module._class(package, "nothing.py", "Nothing")


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: 1",
        "num_train_epochs: 2",
        "save_strategy: no",
        "report_to: none",
        "report_to: [wandb, tensorboard]",
        "lr_scheduler_kwargs: {num_cycles: 2}",
        "optim: adamw_8bit",
        "save_total_limit: null",
        "precompute_ref_log_probs: false",
        "pad_to_multiple_of: 8",
        "debug: underflow_overflow",
        "gradient_checkpointing_kwargs: {use_reentrant: false}",
        "logging_steps: 0.25",
        "warmup_steps: 0",
    ],
)
def test_values_that_the_class_takes_are_taken(load, sound, line):
    from trl import DPOConfig

    name, value = line.split(": ", 1)
    recipe = load(sound, f"training.{name}={value}")
    config = DPOConfig(output_dir="x", use_cpu=True, bf16=False, **{name: recipe.training[name]})
    assert hasattr(config, name)
