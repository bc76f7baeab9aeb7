"""Policies that speak the sandbox's language."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource, find_policy
from prefopt_cli.recipe.schema import ModelSettings
from prefopt_cli.recipe.schemes import Progress
from prefopt_cli.sandbox.base import build_tokenizer


def load_policy(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer, on the CPU in float32, an adapter merged into the weights.

    Raises:
        UserError: it cannot be loaded, or reads and writes other tokens than the sandbox's base policy.
    """
    settings = ModelSettings(name_or_path=str(name), dtype="float32")
    source = locate(settings)
    tokenizer = loading.load_tokenizer(source, settings)
    if tokenizer.get_vocab() != build_tokenizer().get_vocab():
        raise UserError(f"{name} is no policy of the sandbox: its tokenizer has another vocabulary.")
    model = loading.load_model(source, settings, "none")
    return model.eval(), tokenizer


def locate(settings: ModelSettings, progress: Progress | None = None) -> PolicySource:
    """As `find_policy`, in the words of a command line: there is no recipe whose key the reader could look up."""
    try:
        return find_policy(settings, progress)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.name_or_path: ")) from error
