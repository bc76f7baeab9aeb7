"""The ``quantization`` section: bitsandbytes' settings, in the words of ``BitsAndBytesConfig`` without its prefixes."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from prefopt_cli.recipe.section import Section


class QuantizationSettings(Section):
    """Weights stored in a few bits each while an adapter is trained on them (QLoRA, Dettmers et al. 2023)."""

    bits: Literal[4, 8] = Field(description="4: about a quarter of bfloat16's memory; 8: LLM.int8().")
    quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="With 4 bits, the levels: nf4 fits weights that are normally distributed."
    )
    double_quant: bool = Field(
        default=True,
        description="With 4 bits, store the scales in 8 bits too: saves about 0.4 bits per weight.",
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="With 4 bits, the type that weights are brought to for computing. auto: bfloat16 on GPUs that "
        "have it, float16 on others, float32 on the CPU.",
    )
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8",
        description="With 4 bits, the type of the tensors that the bits are kept in; fsdp needs model.dtype here.",
    )
    threshold: float = Field(
        default=6.0, ge=0.0, description="With 8 bits, activations above it are computed in float16."
    )
    skip_modules: list[str] | None = Field(
        default=None,
        description="Modules that stay as they are, besides the language-model head.",
    )

    def of_weights(self) -> dict[str, Any]:
        """What decides which numbers the weights become. In which type they are computed is left out."""
        names = ["bits", "quant_type", "double_quant"] if self.bits == 4 else ["bits", "threshold"]
        # The type of the tensors that hold the bits changes nothing, and neither does the order of names.
        return {name: getattr(self, name) for name in names} | {"skip": sorted(set(self.skip_modules or ()))}

    def describe(self) -> str:
        """In a few words."""
        kind = f" ({self.quant_type}{', double quantisation' if self.double_quant else ''})"
        kept = f", without {', '.join(self.skip_modules)}" if self.skip_modules else ""
        return f"{self.bits}-bit{kind if self.bits == 4 else ''}{kept}"

    def to_text(self) -> str:
        """As a recipe has it, in one line: what differs from the defaults."""
        given = self.model_dump(exclude_defaults=True, exclude={"compute_dtype", "storage_dtype"})
        return json.dumps({"bits": self.bits, **given}).replace('"', "")


def _kind(value: Any) -> str:
    """Which member of the union to judge a value by; the brackets keep it apart from keys of a recipe."""
    return "<bits>" if isinstance(value, Mapping | QuantizationSettings) else "<none>"


Quantization = Annotated[
    Annotated[QuantizationSettings, Tag("<bits>")] | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_kind),
]
