"""A world that is made in seconds."""

from prefopt_cli.sandbox.settings import BaseSettings, WorldSettings

TINY = WorldSettings(base_prompts=64, train_prompts=8, test_prompts=4, base=BaseSettings(steps=2))
