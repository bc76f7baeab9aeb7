"""How large the world is and how its base policy is trained; all of it enters the name of the cached folder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseSettings:
    """The base policy and its training."""

    hidden_size: int = 64
    intermediate_size: int = 192
    layers: int = 3
    heads: int = 4
    initializer_range: float = 0.12
    """Large, as so narrow a model wants it: at the usual 0.02 it does not learn to copy the item."""
    steps: int = 900
    batch: int = 48
    learning_rate: float = 6e-3
    warmup: int = 40


@dataclass(frozen=True)
class WorldSettings:
    """The prompts of a world, all different, and how many replies of the base policy each has."""

    base_prompts: int = 12_000
    """The base policy learns from these and never sees the others."""
    train_prompts: int = 2_500
    test_prompts: int = 500
    replies: int = 4
    base: BaseSettings = BaseSettings()


STANDARD = WorldSettings()
"""What users get."""
