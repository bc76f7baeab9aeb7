"""A world that is made in seconds, and runs on it that nobody trained."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.sandbox import world
from prefopt_cli.sandbox.settings import BaseSettings, WorldSettings
from prefopt_cli.sandbox.world import World

TINY = WorldSettings(base_prompts=64, train_prompts=8, test_prompts=4, base=BaseSettings(steps=2))


@contextmanager
def only_tiny_worlds(cache: Path) -> Iterator[None]:
    """Worlds are tiny wherever no settings are given, and lie in this cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(cache))
        for function in (world.open_world, world.find_world, world.world_folder):
            patch.setattr(function, "__defaults__", (TINY, *(function.__defaults__ or ())[1:]))
        yield


def replace_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """Other rows in a split of a finished world, which is still whole after it."""
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = json.loads((folder / world.DESCRIPTION).read_text())
    description["bytes"][path.name] = path.stat().st_size
    (folder / world.DESCRIPTION).write_text(json.dumps(description))


def write_run(
    folder: Path,
    started_from: str = "sandbox:base",
    preferences: str = "sandbox:helpful",
    method: str = "{name: gpo, loss: logistic, beta: 0.5}",
    status: str = "finished",
) -> Path:
    """A run folder with a recipe and a manifest; its policy has yet to be put into ``model/``."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: '{started_from}'}}\n"
        f"dataset: {{train: '{preferences}'}}\n"
        f"method: {method}\n"
        f"output_dir: '{folder}'\n"
    )
    (folder / "manifest.json").write_text(json.dumps({"status": status}))
    if status == "finished":
        (folder / "model").mkdir()
    return folder


def add_policy(run: Path, made: World, seed: int) -> Path:
    """The base policy with noise on its weights in the run's ``model/``."""
    import torch

    model, tokenizer = _base(made)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.05 * torch.randn_like(weights)
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    return run


def add_adapter(run: Path, made: World, seed: int) -> Path:
    """A random adapter on the base policy in the run's ``model/``, as training leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = _base(made)
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    lineage = {"name": "sandbox:base", "weights": str(made.base)}
    (run / "manifest.json").write_text(json.dumps({"status": "finished", "lineage": lineage}))
    return run


def _base(made: World):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(made.base), AutoTokenizer.from_pretrained(made.base)
