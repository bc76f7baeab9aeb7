"""What a recipe cannot do without, by the names that findings have."""

from prefopt_cli.recipe.schema import QuantizationSettings, Recipe


def needs_of(recipe: Recipe) -> dict[str, str]:
    """Feature -> the setting that needs it."""
    training, launch = recipe.training, recipe.launch
    on_cpu = bool(training.get("use_cpu"))
    needs: dict[str, str] = {}
    for half in ("bf16", "fp16"):
        if training.get(half) and not on_cpu:
            needs["gpu"] = f"training.{half}"
    if training.get("bf16"):
        needs["bf16"] = "training.bf16"
    if isinstance(recipe.quantization, QuantizationSettings):
        needs[f"{recipe.quantization.bits}-bit"] = f"quantization.bits: {recipe.quantization.bits}"
    optimizer = str(training.get("optim", ""))
    if "8bit" in optimizer or optimizer.startswith("paged_"):
        needs["8-bit"] = f"training.optim: {optimizer}"
    if launch.engine == "deepspeed":
        needs["deepspeed"] = "launch.engine: deepspeed"
    if launch.machines > 1:
        needs["processes"] = f"launch.machines: {launch.machines}"
    elif isinstance(launch.processes, int) and launch.processes > 1:
        needs["processes"] = f"launch.processes: {launch.processes}"
    attention = recipe.model.attn_implementation or ""
    if attention == "flash_attention_2":
        needs["flash_attention_2"] = f"model.attn_implementation: {attention}"
    elif "/" in attention:
        needs["kernels"] = f"model.attn_implementation: {attention}"
    return needs
