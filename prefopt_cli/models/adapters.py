"""A new adapter on top of an earlier one, which stays as it is: in training both are at work, and saved they are one.

peft has both in the model side by side. What is exported is one adapter of the sum of their ranks, which computes
the same and which plain peft loads on the base model.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import set_seed

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import PolicySource, read_adapter_config
from prefopt_cli.models.quantised import compute_in_bfloat16, is_quantised
from prefopt_cli.recipe.schema import LoraAdapter

TRAINED_ADAPTER = "default"
"""peft's name of the adapter that is trained; a frozen copy may stand beside it as the reference."""

EARLIER_ADAPTER = "earlier"
"""The name of one that a new adapter is trained on top of."""

COMBINED_ADAPTER = "combined"


def require_stackable(source: PolicySource, adapter: LoraAdapter) -> None:
    """Refuse adapters whose sum is no adapter.

    Raises:
        UserError: one of them is not plain LoRA, or they name their modules in different ways.
    """
    if source.adapter is None:
        return
    saved = read_adapter_config(source.adapter)
    remedy = (
        "Use adapter_per_stage: continue, or put the earlier adapter into the weights first (`prefopt merge`) and "
        "start from there."
    )
    for name, config in (("the earlier adapter", saved), ("the recipe's adapter", adapter.model_dump())):
        for key in ("use_dora", "modules_to_save"):
            if config.get(key):
                raise UserError(
                    f"method.adapter_per_stage: new needs plain LoRA, and {name} has {key}. {remedy}"
                )
    by_pattern = [
        isinstance(config, str) and config != "all-linear"
        for config in (saved.get("target_modules"), adapter.target_modules)
    ]
    if by_pattern[0] != by_pattern[1]:
        raise UserError(
            "method.adapter_per_stage: new needs target_modules of one kind, and one adapter has a regular expression, "
            f"the other names. Write both in the same way. {remedy}"
        )


def stack_adapter(model: PeftModel, config: LoraConfig, seed: int) -> PeftModel:
    """Add a new adapter, to be trained, on top of the earlier one, which is frozen. It changes nothing at first."""
    set_seed(seed)  # as TRL does before it adds one
    model.add_adapter(TRAINED_ADAPTER, config)
    activate_adapters(model)
    return model


def activate_adapters(model: nn.Module) -> None:
    """Have the trained adapter and the earlier one at work, in the types that they are trained in.

    Loading a checkpoint leaves only the first, in float32.
    """
    if is_quantised(model):
        compute_in_bfloat16(model, TRAINED_ADAPTER)
    if is_stacked(model):
        # The library takes the first for the one that is trained.
        model.base_model.set_adapter([TRAINED_ADAPTER, EARLIER_ADAPTER])  # type: ignore[union-attr, operator]
        model.set_requires_grad(EARLIER_ADAPTER, requires_grad=False)  # type: ignore[operator]


def is_stacked(model: Any) -> bool:
    """Whether an adapter is trained on top of an earlier one."""
    return isinstance(model, PeftModel) and {TRAINED_ADAPTER, EARLIER_ADAPTER} <= set(model.peft_config)


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter of a policy, the earlier one included, as one that peft loads on the base model.

    Args:
        model: the policy.
        folder: where to.
        weights: of what is trained, where the model itself holds a part only.
    """
    name = _combined(model) if is_stacked(model) else TRAINED_ADAPTER
    config: Any = model.peft_config[name]
    if Path(config.base_model_name_or_path or "").is_dir():
        # A base given by a relative path would be found from one working directory only.
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    model.save_pretrained(str(folder), selected_adapters=[name], state_dict=weights)
    if name != TRAINED_ADAPTER:  # peft has put it one folder deeper
        for file in sorted((folder / name).iterdir()):
            file.replace(folder / file.name)
        (folder / name).rmdir()


def _combined(model: PeftModel) -> str:
    if COMBINED_ADAPTER not in model.peft_config:
        names = [EARLIER_ADAPTER, TRAINED_ADAPTER]
        model.base_model.add_weighted_adapter(names, [1.0, 1.0], COMBINED_ADAPTER, combination_type="cat")
        # Its matrices hold the scales of both already, and alpha is its rank.
        model.peft_config[COMBINED_ADAPTER].use_rslora = False
    return COMBINED_ADAPTER


def restore_dropout(model: nn.Module) -> None:
    """``disable_dropout`` is about the model; TRL takes the adapter's dropout with it, which was asked for by name."""
    if not isinstance(model, PeftModel):
        return
    for name, module in model.named_modules():
        parent, _, adapter = name.rpartition(".")
        if parent.endswith("lora_dropout") and adapter == TRAINED_ADAPTER and isinstance(module, nn.Dropout):
            module.p = model.peft_config[adapter].lora_dropout


def require_same_adapter(source: PolicySource, adapter: LoraAdapter) -> None:
    """Training goes on with the adapter that the policy already has, so the recipe must describe that one.

    Raises:
        UserError: it describes another; the message lists the differences.
    """
    if source.adapter is None:
        return
    saved = read_adapter_config(source.adapter)
    # What the recipe leaves out is as the adapter has it; peft saves all-linear as the names it stood for.
    # Trained biases would stay behind in the reference, so `bias` counts even then.
    wanted = adapter.model_dump(include=(adapter.model_fields_set | {"bias"}) - {"type", "init_lora_weights"})
    if wanted.get("target_modules") == "all-linear":
        del wanted["target_modules"]
    differing = [
        f"{key} is {saved.get(key)}, not {value}"
        for key, value in wanted.items()
        if _unordered(saved.get(key)) != _unordered(value)
    ]
    if differing:
        raise UserError(
            f"adapter: the policy already has an adapter ({source.adapter}), and training would go on with it, but "
            f"the recipe describes another: {'; '.join(differing)}. Use its values, or `adapter: none` to merge it "
            "into the weights and train all of them."
        )


def _unordered(value: Any) -> Any:
    """Lists of names in any order, and nothing written as null or as an empty collection, are the same."""
    return sorted(value, key=str) if isinstance(value, list) else value or None
