"""What training and checking do first: find the policy, read the data, tokenise it, see that they fit."""

from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from prefopt_cli import data
from prefopt_cli.data.degrading import Degrading
from prefopt_cli.data.stopwords import find_stopwords
from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.adapters import is_stacked
from prefopt_cli.models.ancestry import Ancestry, find_ancestry
from prefopt_cli.models.policy import PolicySource, find_policy
from prefopt_cli.models.quantising import computing_device, numbers_note, quantised_start
from prefopt_cli.recipe.schema import (
    TAKE_LISTS,
    LoraAdapter,
    QuantizationSettings,
    Recipe,
    Regularizer,
    SelfSupervisedSettings,
    SequentialSettings,
    SoftSettings,
    Source,
    place_of_alignment,
)
from prefopt_cli.recipe.training_fields import OWN_FIELDS
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.scoring.choice import wants_router_loss
from prefopt_cli.training.degree_checks import require_metric
from prefopt_cli.training.engines import sharding_asked
from prefopt_cli.training.extent import largest_id, longest_row, row_lengths
from prefopt_cli.training.previous_checks import require_same_tokenizer, require_steady_scores
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.sampling_prompts import SamplingPrompts, sampling_prompts


@dataclass(frozen=True)
class Prepared:
    """All of a run but the weights."""

    source: PolicySource
    config: Any
    skeleton: PreTrainedModel | PeftModel
    """The policy as it will be trained, on the meta device."""
    tokenizer: PreTrainedTokenizerBase
    tokens: data.TokenizedData
    sampling: SamplingPrompts | None = None
    """What the policy is asked during training, where the method samples it."""
    ancestry: Ancestry | None = None
    """The stages that came before, where the method knows of any."""

    @property
    def stacked(self) -> bool:
        """Whether a new adapter is trained on top of the policy's own."""
        return is_stacked(self.skeleton)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response of all sets."""
        return max(longest_row(rows) for rows in (self.tokens.train, *self.tokens.eval.values()))


def prepare(recipe: Recipe, reporter: Reporter, runs: RunFinder | None = None) -> Prepared:
    """Resolve and read everything that a recipe names, except weights; report the data's receipt.

    Args:
        recipe: the validated recipe.
        reporter: told what happens.
        runs: finds earlier stages.

    Raises:
        UserError: the model, the tokenizer, the data or an earlier stage cannot be used as they are.
    """
    degrade = degrading(recipe)  # first of all: a list of stop words that is not there is told at once
    runs = runs or RunFinder()
    ancestry = find_ancestry(recipe, runs, reporter.progress)
    for place, found in runs.moved.items():
        reporter.message(f"The run {place} was found in {found}.")
    source = ancestry.start if ancestry else find_policy(recipe.model, reporter.progress)
    if not source.is_local:  # without a connection the hub's client takes its time to give up
        reporter.message(f"Looking for {source.weights} in the hub's cache and on the hub.")
    config = loading.load_config(source, recipe.model)
    source = quantised_start(source, recipe, config, sharding_asked(recipe.launch))
    _tell_numbers(source, recipe, reporter)
    require_states(recipe, config)
    skeleton = loading.on_meta_device(source, recipe.model, recipe.adapter, stacked=stacks(recipe, source))
    tokenizer = loading.load_tokenizer(source, recipe.model)
    require_same_tokenizer(tokenizer, ancestry, recipe)
    text = data.load(recipe.dataset, progress=reporter.progress, prompts=own_prompts(recipe))
    tokens = data.tokenize(
        text,
        tokenizer,
        recipe.dataset,
        progress=reporter.progress,
        lists=list_handling(recipe),
        degrading=degrade,
        report=reporter.message,
    )
    reporter.receipt(tokens.receipt.to_dict())
    require_metric(recipe, tokens.receipt)
    if not len(tokens.train):
        raise UserError("dataset.train: no row is left to train on; the receipt says where they went.")
    require_fit(config, tokens)
    require_steady_scores(config, tokens, ancestry)
    require_a_batch(recipe, len(tokens.train))
    require_pairs_for_weights(recipe, tokens.train)
    prompts = None
    if (regularizer := sampling_settings(recipe)) is not None:
        place = f"{place_of_alignment(recipe.method)}.regularizer"
        prompts = sampling_prompts(regularizer, place, config, tokens, reporter)
    return Prepared(source, config, skeleton, tokenizer, tokens, prompts, ancestry)


def _tell_numbers(source: PolicySource, recipe: Recipe, reporter: Reporter) -> None:
    """What the recipe does not say of the weights' quantisation."""
    if isinstance(recipe.quantization, QuantizationSettings):
        if source.quantization is None:
            reporter.message(
                f"The weights of {source.place} are quantised already, and are used as they are."
            )
        elif note := numbers_note(source.quantization, recipe.quantization, computing_device(recipe)):
            reporter.message(note)


def sampling_settings(recipe: Recipe) -> Regularizer | None:
    """How the policy is sampled during training; None where the method does without."""
    method = recipe.method.alignment
    return method.regularizer if isinstance(method, SoftSettings) and method.samples else None


def stacks(recipe: Recipe, source: PolicySource) -> bool:
    """Whether a new adapter is trained on top of one that the policy has."""
    method = recipe.method.alignment
    new = isinstance(method, SequentialSettings) and method.adapter_per_stage == "new"
    return new and source.adapter is not None and isinstance(recipe.adapter, LoraAdapter)


def own_prompts(recipe: Recipe) -> list[Source] | None:
    """Sources of prompts that are only sampled from, where the recipe names any."""
    regularizer = sampling_settings(recipe)
    return regularizer.prompts if regularizer else None


def list_handling(recipe: Recipe) -> Literal["whole", "all_pairs", "adjacent_pairs"]:
    """What becomes of rows with several responses: the recipe's wish, or what its method takes."""
    if recipe.dataset.lists != "auto":
        return recipe.dataset.lists
    return "whole" if recipe.method.alignment.name in TAKE_LISTS else "all_pairs"


def degree_settings(recipe: Recipe) -> SelfSupervisedSettings | None:
    """How degrees of responses are learnt; None where the method does without."""
    method = recipe.method
    return method if isinstance(method, SelfSupervisedSettings) and method.learns_degrees else None


def degrading(recipe: Recipe) -> Degrading | None:
    """How responses are degraded; None where the method does without.

    Raises:
        UserError: the stop words cannot be found.
    """
    method = degree_settings(recipe)
    if method is None:
        return None
    return Degrading(find_stopwords(method.stopwords), method.levels, method.apply_to)


def require_states(recipe: Recipe, config: Any) -> None:
    """Refuse models that show no hidden states, where the method reads them.

    Raises:
        UserError: the model's experts are balanced by a loss, for which it runs in another way.
    """
    balanced = wants_router_loss(config, training_field(recipe.training, "router_aux_loss_coef"))
    if balanced and degree_settings(recipe):
        raise UserError(
            "method self_supervised reads hidden states, which a model whose experts are balanced by a loss does not "
            "show. Set training.router_aux_loss_coef: 0, or use the settings of method.align alone."
        )


def require_pairs_for_weights(recipe: Recipe, train: Dataset) -> None:
    """Refuse to weight lists, for which mu is not defined.

    Raises:
        UserError: the recipe asks for mu, and a row has more than two responses.
    """
    method = recipe.method.alignment
    weighted = isinstance(method, SoftSettings) and method.mu != "none"
    if weighted and (widest := row_lengths(train).shape[1] - 1) > 2:
        raise UserError(
            f"{place_of_alignment(recipe.method)}.mu: weights are defined for pairs, and the data has lists of up to "
            f"{widest} responses. Set dataset.lists: all_pairs (or adjacent_pairs), or mu: none."
        )


def require_fit(config: Any, tokens: data.TokenizedData) -> None:
    """Refuse rows that the model cannot take.

    Raises:
        UserError: a row is longer than the model's context, or holds a token that the model does not have.
    """
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    for name, rows in {"train": tokens.train, **tokens.eval}.items():
        longest = longest_row(rows)
        if context is not None and longest > context:
            raise UserError(
                f"dataset ({name}): the longest row has {longest} tokens, but the model's context holds {context}. "
                f"Set dataset.max_length: {context} (or less)."
            )
    vocabulary = getattr(text_config, "vocab_size", None)
    for name, rows in {"train": tokens.train, **tokens.eval, "prompts": tokens.prompts}.items():
        if rows is not None and vocabulary is not None and (largest := largest_id(rows)) >= vocabulary:
            raise UserError(
                f"dataset ({name}): the tokenizer gives the token id {largest}, but the model's vocabulary has "
                f"{vocabulary} entries: they do not belong together. Check model.name_or_path."
            )


def require_a_batch(recipe: Recipe, pairs: int) -> None:
    """Refuse data that `dataloader_drop_last` would drop entirely.

    Raises:
        UserError: there is less than one batch of it.
    """
    batch = training_field(recipe.training, "per_device_train_batch_size")
    if recipe.training.get("dataloader_drop_last") and pairs < batch:
        raise UserError(
            f"training.dataloader_drop_last: the {pairs} training rows do not fill one batch of {batch}, so none "
            "would be left. Set it to false, or per_device_train_batch_size lower."
        )


def training_field(given: dict[str, Any], name: str) -> Any:
    """A training field, or its default: prefopt's own, else the library's."""
    if name in given:
        return given[name]
    own = {field.name: field.default for field in OWN_FIELDS}
    return own[name] if name in own else DPOConfig.__dataclass_fields__[name].default
