"""Whether every earlier policy can score a sequential stage's data."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_cli.data import TokenizedData
from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.ancestry import Ancestry
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.scoring.choice import scores_depend_on_batch
from prefopt_cli.training.extent import longest_row


def require_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, ancestry: Ancestry | None, recipe: Recipe
) -> None:
    """Refuse earlier policies that would take the data's tokens for others.

    Raises:
        UserError: which.
    """
    if ancestry is None:
        return
    vocabulary = tokenizer.get_vocab()
    for name, source in ancestry.earlier:
        other = loading.load_tokenizer(source, recipe.model)
        if other.get_vocab() != vocabulary:
            raise UserError(
                f"The policy {name} of the earlier stages ({source.describe()}) has another tokenizer than "
                f"{ancestry.start.describe()}, so it cannot score the same tokens. All stages need one tokenizer."
            )


def require_steady_scores(config: Any, tokens: TokenizedData, ancestry: Ancestry | None) -> None:
    """Refuse models whose scores of a response depend on what stands beside it, where earlier policies score.

    Raises:
        UserError: the model is one.
    """
    if ancestry is None:
        return
    longest = max(longest_row(rows) for rows in (tokens.train, *tokens.eval.values()))
    if scores_depend_on_batch(config, longest):
        raise UserError(
            "method sequential scores the data with every earlier policy once, and with this model's rotary embeddings "
            "a score depends on the longest sequence of its batch. Set dataset.max_length to "
            "original_max_position_embeddings of its config.json or less."
        )
