"""Why a model could not be loaded, in one sentence."""

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import near_folder


@contextlib.contextmanager
def loading_errors(name: str, what: str = "model", *, local: bool) -> Iterator[None]:
    """Say what is wrong where a model or its tokenizer cannot be loaded.

    Args:
        name: what is loaded, as the user knows it.
        what: the kind of thing it is.
        local: whether the hub has no part in it.

    Raises:
        UserError: in place of what the libraries raise.
    """
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"model {name} is gated: accept its terms on the hub, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"model {name} is neither a folder here nor a model on the hub.") from error
    except SafetensorError as error:
        raise UserError(
            f"model {name} cannot be loaded: its weights are damaged or cut off ({error}). Fetch them again."
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        StrictDataclassError,
    ) as error:
        raise UserError(f"{what} {name} cannot be loaded: {_reason(name, error, local=local)}") from error


def _reason(name: str, error: BaseException, *, local: bool) -> str:
    text = " ".join(str(error).split())
    if "safetensors" in text:
        return "it has no weights in safetensors format. Convert them first; pickled weights are not loaded."
    if not local and ("connect" in text or "offline" in text or "cached" in text):
        return (
            f"it is no folder in {Path.cwd()}, is not in the hub cache, and the hub cannot be reached (offline)."
            f"{near_folder(Path(name))} Check the name, or download it with `hf download` while online."
        )
    if "trust_remote_code" in text:
        return "it brings its own code. Read that code, then set model.trust_remote_code: true."
    if "Couldn't instantiate the backend tokenizer" in text:
        return (
            "there is none. Put the model's tokenizer.json and tokenizer_config.json beside its config.json."
        )
    if text.startswith("Unrecognized configuration class"):
        return "it is no causal language model."
    return textwrap.shorten(text, 400, placeholder=" ...")
