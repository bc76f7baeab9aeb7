"""A run's policy as one plain model folder: adapters merged into the weights in float32, then saved in any type.

An adapter that was trained on quantised weights goes into those weights dequantised, or into the original ones.
"""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.models import loading
from prefopt_cli.models.merge_card import merge_card
from prefopt_cli.models.policy import MERGE_RECORD, PolicySource, fingerprint, merge_record
from prefopt_cli.models.quantised import compute_in_float32, stores_few_bits, take_dequantised
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings
from prefopt_cli.runs.writable import require_writable

Dtype = Literal["float32", "bfloat16", "float16"]
Base = Literal["dequantized", "original"]

RECORD_FORMAT = 1

OF_QUANTISED = (
    "quantization_config",
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "_weight_conversions",
)
"""What transformers leaves on a dequantised model, and would save it as a quantised one by."""

AS_IT_IS = LoraAdapter(type="lora")
"""Describes no adapter in particular, so that whichever the policy has is kept as it is."""


def merge_settings(source: PolicySource, settings: ModelSettings) -> ModelSettings:
    """How a policy is loaded in order to be merged: in float32, by the run's own settings."""
    keep: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    return ModelSettings(name_or_path=source.weights, dtype="float32", **keep)


def unmerged_policy(source: PolicySource, settings: ModelSettings) -> PreTrainedModel | PeftModel:
    """The policy as it was trained, its adapter beside the weights, all of it computed in float32; on the CPU.

    Raises:
        UserError: the weights cannot be had.
    """
    if source.quantization is not None:
        exact = source.quantization.model_copy(update={"compute_dtype": "float32"})
        source = replace(source, quantization=exact)
    model = loading.load_model(source, settings, AS_IT_IS if source.adapter else "none", frozen=True)
    compute_in_float32(model)
    return model.eval()


def merged_policy(
    source: PolicySource, settings: ModelSettings, base: Base = "dequantized"
) -> PreTrainedModel:
    """The policy as one model without adapters, in float32, on the CPU.

    Args:
        source: the policy.
        settings: see `merge_settings`.
        base: where the weights are quantised, what the adapter is merged into. dequantized: what it was trained on,
            and so the same policy; original: the weights before they were quantised, and so another one. Merged
            into the quantised weights, an adapter would be rounded to their few levels.

    Raises:
        UserError: the weights cannot be had, or are quantised in a way that cannot be undone.
    """
    stored = stores_few_bits(loading.load_config(source, settings))
    if source.quantization is None and not stored:
        return loading.load_model(source, settings, "none").eval()
    below = replace(source, adapter=None, run=None)
    if stored:
        model = _dequantised(loading.load_model(below, settings, "none"), source)
    else:
        model = loading.load_model(replace(below, quantization=None), settings, "none")
        if base == "dequantized":
            take_dequantised(model, loading.load_model(below, settings, "none"))
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()
    return model.eval()


def require_base(source: PolicySource, settings: ModelSettings, base: Base | None) -> Base | None:
    """What the adapter is merged into; None where the weights are not quantised.

    Raises:
        UserError: the user asks for what there is not.
    """
    stored = stores_few_bits(loading.load_config(source, settings))
    if source.quantization is None and not stored:
        if base is not None:
            raise UserError("--base: the run was not trained on quantised weights. Leave it out.")
        return None
    if stored and base == "original":
        raise UserError(
            f"--base original: {source.place} holds quantised weights only; what they were before is not known. Leave "
            "it out."
        )
    return base or "dequantized"


def _dequantised(model: Any, source: PolicySource) -> Any:
    try:
        plain = model.dequantize()
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        reason = textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" ...")
        raise UserError(
            f"The weights of {source.place} are quantised, and transformers cannot dequantise them here ({reason}). "
            "Use the policy with its adapter as it is, or train on the unquantised model."
        ) from error
    for each in (plain.config, plain):
        for name in OF_QUANTISED:
            if name in vars(each):
                delattr(each, name)
    return plain.to(torch.float32)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: Dtype,
    record: dict[str, Any],
) -> None:
    """Fill a folder with the weights (safetensors), tokenizer, generation settings, model card and record.

    Raises:
        PrefoptError: the folder cannot be written, for one because the disk is full.
    """
    try:
        model.to(getattr(torch, dtype)).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        write_record(folder, record, dtype)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PrefoptError(f"The merged model cannot be written beside {folder.parent}: {reason}.") from error


def write_record(folder: Path, record: dict[str, Any], dtype: Dtype) -> None:
    """Fill a folder with what is known of the model in it: for programs and for people."""
    (folder / "README.md").write_text(merge_card(record, dtype), encoding="utf-8")
    (folder / MERGE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def require_free(out: Path, *, overwrite: bool) -> None:
    """Refuse early to write over anything but an earlier merged model, and where nothing can be written.

    Raises:
        UserError: which of these it is.
    """
    if out.is_dir() and any(out.iterdir()):
        if merge_record(out) is None:
            raise UserError(
                f"OUT {out} exists and is no merged model (it has no {MERGE_RECORD}), so it is never deleted. Choose "
                "another folder."
            )
        if not overwrite:
            raise UserError(
                f"OUT {out} already holds a merged model. Replace it with --overwrite, or choose another folder."
            )
    require_writable(out, key="OUT")


def require_elsewhere(out: Path, run: Path, read: Iterable[str | Path | None]) -> None:
    """Refuse to write into the run, or over anything that it reads.

    Raises:
        UserError: what is in the way.
    """
    target = out.resolve()
    if target.is_relative_to(run.resolve()):
        raise UserError(f"OUT {out} lies in the run {run} itself. Choose a folder outside it.")
    for place in (Path(each).expanduser() for each in (run, *read) if each):
        if place.exists() and place.resolve().is_relative_to(target):
            raise UserError(f"OUT {out} holds {place}, which the run needs. Choose another folder.")


def new_record(
    source: PolicySource, config: Any, line: dict[str, Any], into: Base | None = None
) -> dict[str, Any]:
    """What `prefopt_merge.json` says; a later run that starts from the folder takes its ancestors over.

    Args:
        source: the run's policy.
        config: its configuration, for the commit of a hub model.
        line: run, run_id, dimension, base, adapters and ancestors, the merged run itself last.
        into: which weights the adapter was merged into, where they were quantised.
    """
    ended_with = fingerprint(source, getattr(config, "_commit_hash", None))
    *before, own = line["ancestors"]
    return {
        "format": RECORD_FORMAT,
        **{name: line[name] for name in ("run", "run_id", "dimension")},
        "fingerprint": ended_with,
        **{name: line[name] for name in ("base", "adapters")},
        "merged_into": into,
        "quantization": source.quantization.model_dump() if source.quantization else None,
        "ancestors": [*before, {**own, "ended_with": ended_with}],
    }
