"""The model card: what the policy is, how it was made, whom to cite."""

from pathlib import Path
from typing import Any

import yaml

from prefopt_cli.data.sources import looks_like_hub_id
from prefopt_cli.recipe.schema import QuantizationSettings, Recipe

CITATIONS = {
    "gpo": """@inproceedings{tang2024generalized,
  title     = {Generalized Preference Optimization: A Unified Approach to Offline Alignment},
  author    = {Tang, Yunhao and Guo, Zhaohan Daniel and Zheng, Zeyu and Calandriello, Daniele and Munos, R{\\'e}mi
               and Rowland, Mark and Richemond, Pierre Harvey and Valko, Michal and Pires, Bernardo {\\'A}vila
               and Piot, Bilal},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  note      = {arXiv:2402.05749}
}""",
    "soft": """@article{sharifnassab2026soft,
  title   = {Soft Preference Optimization: Aligning Language Models to Expert Distributions},
  author  = {Sharifnassab, Arsalan and Salehkaleybar, Saber and Ghiassian, Sina and Kanoria, Surya
             and Schuurmans, Dale},
  journal = {Transactions on Machine Learning Research},
  year    = {2026},
  note    = {arXiv:2405.00747}
}""",
    "self_supervised": """@inproceedings{li2024selfsupervised,
  title     = {Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness},
  author    = {Li, Jian and Huang, Haojing and Zhang, Yujia and Xu, Pengfei and Chen, Xi and Song, Rui and Shi, Lida
               and Wang, Jingwen and Xu, Hao},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
  year      = {2024},
  note      = {arXiv:2409.17791}
}""",
    "sequential": """@inproceedings{lou2025sequential,
  title     = {Sequential Preference Optimization: Multi-Dimensional Preference Alignment
               With Implicit Reward Modeling},
  author    = {Lou, Xingzhou and Zhang, Junge and Xie, Jian and Liu, Lifeng and Yan, Dong and Huang, Kaiqi},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2405.12739}
}""",
}
TRL_CITATION = """@software{trl,
  title  = {TRL: Transformers Reinforcement Learning},
  author = {{The TRL authors}},
  url    = {https://github.com/huggingface/trl}
}"""

METHOD_NAMES = {
    "gpo": "Generalized Preference Optimization",
    "soft": "Soft Preference Optimization",
    "self_supervised": "Self-supervised Preference Optimization",
    "sequential": "Sequential Preference Optimization",
}


def model_card(recipe: Recipe, recipe_yaml: str, manifest: dict[str, Any]) -> str:
    """Markdown with the hub's front matter, from what the manifest says."""
    lineage, versions = manifest["lineage"], manifest["versions"]
    adapter = recipe.adapter != "none"
    names = dict.fromkeys([recipe.method.name, recipe.method.alignment.name])
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(recipe, lineage, adapter), sort_keys=False)}---",
        f"# {Path(recipe.output_dir).name}",
        f"Trained with prefopt {versions['prefopt']} by {' beside '.join(METHOD_NAMES[name] for name in names)}.",
        "## Lineage",
        f"- Starting policy: {lineage['policy']}\n- Reference policy: {lineage['reference']}\n"
        f"- What was trained: {'an adapter' if adapter else 'all weights'}",
        *_loading(recipe, lineage),
        "## Data",
        _receipt_table(manifest["receipt"]),
        "## Recipe",
        f"```yaml\n{recipe_yaml.strip()}\n```",
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## Citation",
        "```bibtex\n" + "\n".join([*(CITATIONS[name] for name in names), TRL_CITATION]) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, lineage: dict[str, Any], adapter: bool) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefopt", "trl", "preference-optimization", recipe.method.name],
    }
    # The hub resolves these names, so a local path must not stand here.
    if not Path(lineage["weights"]).exists():
        front["base_model"] = lineage["weights"]
    hub_sets = [source.source for source in recipe.dataset.train if looks_like_hub_id(source)]
    if hub_sets:
        front["datasets"] = hub_sets
    return front


def _loading(recipe: Recipe, lineage: dict[str, Any]) -> list[str]:
    """How the adapter is put on the weights that it was trained on; plain peft takes unquantised ones unasked."""
    if not lineage.get("quantization"):
        return []
    quantization = QuantizationSettings.model_validate(lineage["quantization"])
    base = [f'"{lineage["weights"]}"', f'dtype="{recipe.model.dtype}"', "quantization_config=quantization"]
    if recipe.model.revision is not None and not Path(lineage["weights"]).exists():
        base.append(f'revision="{recipe.model.revision}"')
    return [
        "## Loading",
        f"The adapter was trained on the base model's weights in {quantization.bits} bits, and is this policy on these "
        "alone. `prefopt merge` makes one plain model of both.",
        "```python\n"
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n\n"
        f"quantization = BitsAndBytesConfig({_in_code(quantization, lineage)})\n"
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(base)})\n"
        'policy = PeftModel.from_pretrained(base, ".")  # the folder of this file\n'
        "```",
    ]


def _in_code(quantization: QuantizationSettings, lineage: dict[str, Any]) -> str:
    """The settings as arguments in Python."""
    kept = lineage.get("kept_modules") or quantization.skip_modules  # runs of old tell no more
    skipped = f", llm_int8_skip_modules={kept}" if kept else ""
    if quantization.bits == 8:
        return f"load_in_8bit=True, llm_int8_threshold={quantization.threshold}{skipped}"
    return (
        f'load_in_4bit=True, bnb_4bit_quant_type="{quantization.quant_type}", '
        f"bnb_4bit_use_double_quant={quantization.double_quant}, "
        f"bnb_4bit_compute_dtype=torch.{quantization.compute_dtype}{skipped}"
    )


def _receipt_table(receipt: dict[str, Any]) -> str:
    rows = ["| set | source | rows read | kept | dropped |", "|---|---|---|---|---|"]
    for name, record in receipt["sets"].items():
        for source in record["sources"]:
            dropped = ", ".join(f"{reason}: {count}" for reason, count in source["dropped"].items()) or "none"
            rows.append(f"| {name} | {source['source']} | {source['read']} | {source['kept']} | {dropped} |")
    return "\n".join(rows)
