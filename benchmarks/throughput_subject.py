"""What `benchmarks.throughput` trains: a random Llama, its tokenizer, and pairs of known shape.

Everything is written to a folder that the caller throws away, so that processes of their own read the same.
"""

import gzip
import json
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from prefopt_cli import data
from prefopt_cli.models.quantised import keep_trainable
from prefopt_cli.recipe.schema import DatasetSettings
from prefopt_cli.scoring.cache import Policy, ScoreCache
from prefopt_cli.scoring.choice import choose_layout
from prefopt_cli.scoring.frozen import score_frozen
from prefopt_cli.scoring.policy_digest import policy_digest
from prefopt_cli.training.batches import example_of
from prefopt_cli.training.extent import row_lengths

TOKENS = 8000
"""Entries of the tokenizer; the model's vocabulary may be larger."""

WEIGHTS = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}
"""--dtype -> dtype of the weights. `mixed` is TRL's default: float32 weights under bfloat16 autocast."""

SIDES = ("chosen", "rejected")
REFERENCE_NOISE = 0.01
"""Standard deviation of what sets the reference policy apart, so that the first loss is not log 2 for anybody."""

Row = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """The model and how it is trained."""

    hidden: int = 384
    intermediate: int = 1024
    layers: int = 6
    heads: int = 6
    kv_heads: int = 6
    vocabulary: int = TOKENS
    max_length: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    learning_rate: float = 1e-5
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    """Of adapters on all linear layers; 0: all weights are trained. The reference is the policy without them."""
    bits: int = 0
    """Of the weights under the adapters: 4 (NF4, scales in 8 bits too) or 8; 0: as they are."""


@dataclass(frozen=True)
class PairSet:
    """The same pairs in the same order, as text (for TRL) and as tokens (for prefopt)."""

    name: str
    path: Path
    rows: list[Row]
    tokens: Dataset

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Tokens of prompt, chosen and rejected response of every pair."""
        return [tuple(row) for row in row_lengths(self.tokens).tolist()]


def build(folder: Path, subject: Subject, texts: Sequence[str], longest: int) -> None:
    """Write `model/` (policy and tokenizer) and `reference/` (weights a little apart from the policy's)."""
    tokenizer = train_tokenizer(texts, min(subject.vocabulary, TOKENS))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=subject.vocabulary,
            hidden_size=subject.hidden,
            intermediate_size=subject.intermediate,
            num_hidden_layers=subject.layers,
            num_attention_heads=subject.heads,
            num_key_value_heads=subject.kv_heads,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        dtype=torch.float32,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=REFERENCE_NOISE)
    model.save_pretrained(folder / "reference")


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def load_policy(folder: Path, subject: Subject, name: str = "model") -> Any:
    """The policy or, by the name `reference`, its reference; on the CPU, or where weights in few bits are computed."""
    if not subject.bits:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=WEIGHTS[subject.dtype])
    compute = torch.float32 if subject.dtype == "float32" else torch.bfloat16
    settings = BitsAndBytesConfig(
        load_in_4bit=subject.bits == 4,
        load_in_8bit=subject.bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=compute, quantization_config=settings, device_map={"": subject.device}
    )
    keep_trainable(model)
    return model


def adapter(subject: Subject) -> LoraConfig | None:
    """The adapter that every peer adds to its policy."""
    if not subject.lora_rank:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=subject.lora_rank,
        lora_alpha=2 * subject.lora_rank,
        target_modules="all-linear",
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of `prompt`, `chosen`, `rejected`, from JSON lines that may be gzipped."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{part: row[part] for part in ("prompt", *SIDES)} for row in rows]


def pair_set(folder: Path, name: str, human: Sequence[Row], subject: Subject, count: int) -> PairSet:
    """The first `count` pairs of a set, written to `<name>/pairs.jsonl`.

    `hh` are the human pairs, cut at max_length. `even-N` are random words: prompts of 2 to 4 tokens, every response
    of N. `length-N` are random words in the human pairs' proportions, scaled from max_length to N tokens.
    """
    kind, _, number = name.partition("-")
    limit = int(number) if kind == "length" else subject.max_length
    if kind == "hh":
        rows = random.Random(0).sample(list(human), len(human))
    elif kind == "even":
        draw = random.Random(1)
        rows = random_rows(folder, [(draw.randint(2, 4), int(number), int(number)) for _ in range(count)])
    elif kind == "length":
        shapes = pair_set(folder, "hh", human, subject, count).shapes
        scale = limit / subject.max_length
        rows = random_rows(folder, [tuple(max(2, int(n * scale)) for n in shape) for shape in shapes])
    else:
        raise SystemExit(f"unknown set of pairs: {name}")
    path = folder / name / "pairs.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_rows(path, rows)
    kept = [int(pair.rsplit(":", 1)[1]) for pair in tokenize(path, folder, limit)["row_id"][:count]]
    if len(kept) < count:
        raise SystemExit(
            f"{name}: only {len(kept)} pairs fit, {count} are needed: lower --rounds or --batches"
        )
    rows = [rows[i] for i in kept]
    write_rows(path, rows)
    return PairSet(name, path, rows, tokenize(path, folder, limit))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenize(path: Path, folder: Path, max_length: int) -> Dataset:
    """By prefopt, in the file's order. Responses are cut at max_length, as TRL cuts them by default."""
    settings = DatasetSettings(
        train=[{"source": str(path)}], max_length=max_length, on_overflow="truncate_response", shuffle=False
    )
    return data.tokenize(data.load(settings), tokenizer_of(folder), settings).train


@lru_cache
def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder / "model")


def random_rows(folder: Path, shapes: Sequence[tuple[int, int, int]]) -> list[Row]:
    """Random words that make exactly so many tokens; responses end with the end-of-text token, which both add."""
    tokenizer, draw = tokenizer_of(folder), random.Random(2)
    spelt = (tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab()))
    words = [word for word in spelt if re.fullmatch(" [a-z]+", word) and len(tokenizer(word).input_ids) == 1]

    def text(count: int) -> str:
        return "".join(draw.choices(words, k=count))

    return [
        {"prompt": text(prompt), "chosen": text(chosen - 1), "rejected": text(rejected - 1)}
        for prompt, chosen, rejected in shapes
    ]


def reference_scores(folder: Path, subject: Subject, tokens: Dataset) -> tuple[dict[str, list[float]], float]:
    """Columns `ref_chosen_logps` and `ref_rejected_logps`, and the seconds that prefopt took, its cache being empty."""
    model = load_policy(folder, subject, "model" if subject.lora_rank else "reference")
    model = model if subject.bits else model.to(subject.device)
    examples = [example_of(row) for row in tokens]

    def autocast() -> torch.autocast:
        return torch.autocast(subject.device, torch.bfloat16, enabled=subject.dtype != "float32")

    layout = choose_layout(
        model, examples[:8], longest=max(each.longest for each in examples), autocast=autocast
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, ScoreCache(Path(place) / "scores.sqlite") as cache:
        policy = Policy(policy_digest(model, numerics={}), "the reference")
        scored = score_frozen(
            model, examples, policy=policy, cache=cache, layout=layout, autocast=autocast
        ).logps
    columns = {f"ref_{side}_logps": [pair[i] for pair in scored] for i, side in enumerate(SIDES)}
    return columns, time.perf_counter() - start


def useful_tokens(shape: tuple[int, int, int]) -> int:
    """Of one pair: its prompt once, both responses, no padding."""
    return sum(shape)


def useful_flops(subject: Subject, shape: tuple[int, int, int]) -> float:
    """Of one pair's training step: 3 x the forward pass over its useful tokens.

    Forward: 2 per weight and token in the layers, 2 per weight of the head for every response token, and
    4 x hidden per layer for every token and token that it attends to.
    """
    prompt, *responses = shape
    head_size = subject.hidden // subject.heads
    layer = subject.hidden * (
        2 * subject.hidden + 2 * subject.kv_heads * head_size + 3 * subject.intermediate
    )
    attended = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
    forward = 2 * subject.layers * layer * sum(shape)
    forward += 2 * subject.hidden * subject.vocabulary * sum(responses)
    forward += 4 * subject.layers * subject.hidden * attended
    return 3 * forward


def peak_flops(subject: Subject, size: int) -> float:
    """Floating-point operations per second of a matrix multiplication, the best of several."""
    dtype = torch.float32 if subject.dtype == "float32" else torch.bfloat16
    left, right = (torch.randn(size, size, device=subject.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize(subject.device)
        start = time.perf_counter()
        left @ right
        synchronize(subject.device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
