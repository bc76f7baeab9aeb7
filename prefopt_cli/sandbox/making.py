"""Makes a world: trains its base policy and lets it reply to the prompts that preferences are about."""

import json
from dataclasses import asdict
from pathlib import Path
from random import Random

from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.data.examples import Progress
from prefopt_cli.sandbox import base
from prefopt_cli.sandbox.grammar import Prompt, draw_prompts
from prefopt_cli.sandbox.sampling import sample_replies
from prefopt_cli.sandbox.settings import WorldSettings

REDRAWS = 10


def make(folder: Path, seed: int, settings: WorldSettings, progress: Progress | None) -> None:
    """Write ``base/``, ``train.jsonl`` and ``test.jsonl``; the same seed gives the same bytes.

    A line holds a prompt and different replies of the base policy to it, in the order in which they were drawn.
    A prompt to which the policy keeps saying the same is left out.
    """
    count = settings.base_prompts + settings.train_prompts + settings.test_prompts
    prompts = draw_prompts(count, Random(f"{seed}/prompts"))
    base.build(folder / "base", prompts[: settings.base_prompts], settings.base, seed, progress)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    unseen = prompts[settings.base_prompts :]
    splits = {"train": unseen[: settings.train_prompts], "test": unseen[settings.train_prompts :]}
    for number, (split, listed) in enumerate(splits.items()):
        found: dict[Prompt, dict[str, None]] = {prompt: {} for prompt in listed}
        for draw in range(REDRAWS):
            wanting = [prompt for prompt, texts in found.items() if len(texts) < settings.replies]
            samples = sample_replies(
                model,
                tokenizer,
                wanting,
                settings.replies,
                seed=(len(splits) * seed + number) * REDRAWS + draw,
                progress=progress if draw == 0 else None,
                task=f"sampling the sandbox's {split} replies",
            )
            for drawn in samples:
                found[drawn[0].prompt].update(dict.fromkeys(sample.text for sample in drawn))
        _write(folder / f"{split}.jsonl", found, settings.replies)


def _write(path: Path, found: dict[Prompt, dict[str, None]], replies: int) -> None:
    rows = [(prompt, list(texts)[:replies]) for prompt, texts in found.items() if len(texts) >= replies]
    lines = [json.dumps({"prompt": asdict(prompt), "replies": texts}) + "\n" for prompt, texts in rows]
    path.write_text("".join(lines), encoding="utf-8")
