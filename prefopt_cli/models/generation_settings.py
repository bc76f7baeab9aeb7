"""Generation settings that a model brings along, made such that the libraries save them again."""

from typing import Any

from transformers import PreTrainedModel

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import PolicySource


def mend_generation_settings(model: PreTrainedModel, source: PolicySource) -> None:
    """Settings that transformers refuses to save, as older models have them, must not end a run at its first save.

    Raises:
        UserError: they contradict each other in another way than sampling settings without `do_sample`.
    """
    settings = model.generation_config
    if settings is None or _is_saveable(settings):
        return
    settings.do_sample = True  # what temperature, top_k or top_p beside it say
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"model {source.place}: its generation_config.json contradicts itself, and no checkpoint could be saved. "
            f"Mend or delete that file. ({' '.join(str(error).split())})"
        ) from error


def _is_saveable(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True
