"""How batches are laid out, and what a model needs for it. `choice` says which layout a model gets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt_cli.scoring.attention import PIECES, Way
from prefopt_cli.scoring.batches import packed_batch, padded_batch
from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.head import add_response_head
from prefopt_cli.scoring.packing import Example


@dataclass(frozen=True)
class Layout:
    """How batches are laid out."""

    way: Way | None = None
    """How attention is told of the packing; None stands for padded rows."""
    mask_dtype: torch.dtype | None = None
    """Type of an additive mask, where the attention takes no boolean one."""
    width_cost: float = 0.0
    """Cost of attention per key as a share of all else per token; see `packing.rows_for_masks`."""
    note: str = ""
    """One line for the user: which layout, and why."""

    def batch(
        self, examples: Sequence[Example], padding_id: int, multiple: int | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a batch; see `batches`."""
        if self.way is None:
            return padded_batch(examples, padding_id, multiple or 1)
        return packed_batch(examples, self.way, padding_id, multiple or 1, self.width_cost)

    def prepare(self, model: nn.Module) -> None:
        """Give a model the head, and the attention implementation that this layout needs."""
        plain = plain_model(model)
        add_response_head(plain)
        wanted = {"pieces": PIECES, "blocks": "flex_attention"}.get(self.way or "")
        if wanted and plain.config._attn_implementation != wanted:
            plain.set_attn_implementation(wanted)
        elif self.way is None and plain.config._attn_implementation == PIECES:
            plain.set_attn_implementation("sdpa")
