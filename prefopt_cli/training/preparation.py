"""What training and checking do first: find the policy, read the data, tokenise it, see that they fit."""

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from prefopt_cli import data
from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource, find_policy
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.training_fields import OWN_FIELDS
from prefopt_cli.training.reporting import Reporter

PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Prepared:
    """All of a run but the weights."""

    source: PolicySource
    config: Any
    skeleton: PreTrainedModel | PeftModel
    """The policy as it will be trained, on the meta device."""
    tokenizer: PreTrainedTokenizerBase
    tokens: data.TokenizedData


def prepare(recipe: Recipe, reporter: Reporter) -> Prepared:
    """Resolve and read everything that a recipe names, except weights; report the data's receipt.

    Raises:
        UserError: the model, the tokenizer or the data cannot be used as they are.
    """
    source = find_policy(recipe.model, reporter.progress)
    if not source.is_local:  # without a connection the hub's client takes its time to give up
        reporter.message(f"Looking for {source.weights} in the hub's cache and on the hub.")
    config = loading.load_config(source, recipe.model)
    skeleton = loading.on_meta_device(source, recipe.model, recipe.adapter)
    tokenizer = loading.load_tokenizer(source, recipe.model)
    text = data.load(recipe.dataset, progress=reporter.progress)
    tokens = data.tokenize(text, tokenizer, recipe.dataset, progress=reporter.progress)
    reporter.receipt(tokens.receipt.to_dict())
    if not len(tokens.train):
        raise UserError("dataset.train: no row is left to train on; the receipt says where they went.")
    require_fit(config, tokens)
    require_a_batch(recipe, len(tokens.train))
    return Prepared(source, config, skeleton, tokenizer, tokens)


def require_fit(config: Any, tokens: data.TokenizedData) -> None:
    """Refuse rows that the model cannot take.

    Raises:
        UserError: a row is longer than the model's context, or holds a token that the model does not have.
    """
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    vocabulary = getattr(text_config, "vocab_size", None)
    for name, rows in {"train": tokens.train, **tokens.eval}.items():
        longest, largest_id = extent(rows)
        if context is not None and longest > context:
            raise UserError(
                f"dataset ({name}): the longest row has {longest} tokens, but the model's context holds {context}. "
                f"Set dataset.max_length: {context} (or less)."
            )
        if vocabulary is not None and largest_id >= vocabulary:
            raise UserError(
                f"dataset ({name}): the tokenizer gives the token id {largest_id}, but the model's vocabulary has "
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
            f"training.dataloader_drop_last: the {pairs} training pairs do not fill one batch of {batch}, so none "
            "would be left. Set it to false, or per_device_train_batch_size lower."
        )


def training_field(given: dict[str, Any], name: str) -> Any:
    """A training field, or its default: prefopt's own, else the library's."""
    if name in given:
        return given[name]
    own = {field.name: field.default for field in OWN_FIELDS}
    return own[name] if name in own else DPOConfig.__dataclass_fields__[name].default


def extent(rows: Dataset) -> tuple[int, int]:
    """Tokens of the longest prompt + response of a tokenised set, and its largest token id."""
    longest = largest_id = 0
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        prompt, chosen, rejected = (pc.list_value_length(table[f"{part}_ids"]) for part in PARTS)
        longest = max(longest, pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py())
        ids = [pc.max(pc.list_flatten(table[f"{part}_ids"])).as_py() for part in PARTS]
        largest_id = max(largest_id, *(found for found in ids if found is not None))
    return longest, largest_id
