"""The model card of a merged model."""

from pathlib import Path
from typing import Any

from prefopt_cli.models.policy import MERGE_RECORD
from prefopt_cli.recipe.quantization_settings import QuantizationSettings

INTO = {
    "dequantized": "The adapter was trained on {bits} weights and is merged into these, dequantised: the policy as it "
    "was trained.",
    "original": "The adapter was trained on {bits} weights and is merged into the weights before they were quantised: "
    "another policy than the one that was trained.",
}


def merge_card(record: dict[str, Any], dtype: str) -> str:
    """Markdown with the hub's front matter. Places on this disk stay out of it.

    Args:
        record: see `merging.new_record`.
        dtype: of the weights.
    """
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
        *_about_quantised(record),
        *_about_difference(record),
        "Stages, the oldest first:\n\n" + "\n".join(stages),
        f"{MERGE_RECORD} has the whole lineage; `prefopt lineage` draws it.",
    ]
    return "\n\n".join(parts) + "\n"


def _about_quantised(record: dict[str, Any]) -> list[str]:
    into = record.get("merged_into")
    if into is None:
        return []
    settings = record.get("quantization")
    bits = QuantizationSettings.model_validate(settings).describe() if settings else "quantised"
    return [INTO[into].format(bits=bits)]


def _about_difference(record: dict[str, Any]) -> list[str]:
    found = record.get("difference")
    if found is None:  # not measured yet
        return []
    return [
        f"Measured over {found['responses']} responses ({found['tokens']} tokens): log-probabilities differ from those "
        f"of the policy as it was trained by {found['mean']:.2g} nats on average and {found['max']:.2g} at most, per "
        f"token by {found['mean_per_token']:.2g} and {found['max_per_token']:.2g}."
    ]
