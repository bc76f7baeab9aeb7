"""What every part of a recipe is made of."""

from pydantic import BaseModel, ConfigDict

Scalar = str | int | float | bool | None


class Section(BaseModel):
    """One mapping of a recipe: immutable, and closed to keys it does not know.

    Strict: an integer is not given as text or as 8.0; a number may be given as an integer.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )
