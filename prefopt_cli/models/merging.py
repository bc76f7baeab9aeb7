"""A run's policy as one plain model folder: adapters merged into the weights in float32, then saved in any type."""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.models import loading
from prefopt_cli.models.policy import MERGE_RECORD, PolicySource, fingerprint, merge_record
from prefopt_cli.models.quantised import stores_few_bits
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings
from prefopt_cli.runs.writable import require_writable

Dtype = Literal["float32", "bfloat16", "float16"]

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
    """The policy as it was trained, in float32, its adapter beside the weights; on the CPU.

    Raises:
        UserError: the weights cannot be had.
    """
    return loading.load_model(source, settings, AS_IT_IS if source.adapter else "none", frozen=True).eval()


def merged_policy(source: PolicySource, settings: ModelSettings) -> PreTrainedModel:
    """The policy as one model without adapters, in float32, on the CPU.

    Quantised weights are dequantised first: merged into them, an adapter would be rounded to their few levels.

    Raises:
        UserError: the weights cannot be had, or are quantised in a way that cannot be undone.
    """
    if not stores_few_bits(loading.load_config(source, settings)):
        return loading.load_model(source, settings, "none").eval()
    model = _dequantised(loading.load_model(PolicySource(source.weights), settings, "none"), source)
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()
    return model.eval()


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
        (folder / "README.md").write_text(_card(record, dtype), encoding="utf-8")
        (folder / MERGE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PrefoptError(f"The merged model cannot be written beside {folder.parent}: {reason}.") from error


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


def new_record(source: PolicySource, config: Any, line: dict[str, Any]) -> dict[str, Any]:
    """What `prefopt_merge.json` says; a later run that starts from the folder takes its ancestors over.

    Args:
        source: the run's policy.
        config: its configuration, for the commit of a hub model.
        line: run, run_id, dimension, base, adapters and ancestors, the merged run itself last.
    """
    ended_with = fingerprint(source, getattr(config, "_commit_hash", None))
    *before, own = line["ancestors"]
    return {
        "format": RECORD_FORMAT,
        **{name: line[name] for name in ("run", "run_id", "dimension")},
        "fingerprint": ended_with,
        **{name: line[name] for name in ("base", "adapters")},
        "ancestors": [*before, {**own, "ended_with": ended_with}],
    }


def _card(record: dict[str, Any], dtype: str) -> str:
    """Markdown with the hub's front matter. Places on this disk stay out of it."""
    stages = [
        f"{number}. {each['dimension']}, method {(each.get('method') or {}).get('name', 'unknown')}"
        for number, each in enumerate(record["ancestors"], 1)
    ]
    base = record["base"] if not Path(str(record["base"])).exists() else Path(str(record["base"])).name
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [prefopt, trl, preference-optimization]\n---",
        f"# {Path(record['run']).name}, merged",
        f"The policy of the run {Path(record['run']).name} (id {record['run_id']}) as one plain model: base "
        f"{base}, weights in {dtype}, merged in float32. It needs no peft.",
        "Stages, the oldest first:\n\n" + "\n".join(stages),
        f"{MERGE_RECORD} has the whole lineage; `prefopt lineage` draws it.",
    ]
    return "\n\n".join(parts) + "\n"
