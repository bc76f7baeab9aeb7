"""A tiny world made on the spot: a random 2-layer Llama, its tokenizer, and pairs with an obvious preference.

Many tests run on it. `python -m tests.tiny FOLDER` writes one to look at.
"""

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINGS = [
    "cats",
    "dogs",
    "rain",
    "tea",
    "trains",
    "books",
    "maps",
    "snow",
    "bread",
    "music",
    "ships",
    "clocks",
]
ASKS = ["Tell me about", "What is special about", "Why do people like", "Say something about"]
KIND = ["I am happy to help:", "Good question!", "With pleasure:"]
RUDE = ["No.", "Who cares?", "Find out yourself."]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Rows {id, prompt, chosen, rejected, dimension}: a kind answer beats a rude one."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        thing, ask = draw.choice(THINGS), draw.choice(ASKS)
        facts = " ".join(f"{thing} number {draw.randrange(100)}." for _ in range(draw.randrange(1, 4)))
        rows.append(
            {
                "prompt": f"Human: {ask} {thing} ({seed}-{i}).\nAssistant:",
                "chosen": f" {draw.choice(KIND)} {facts}",
                "rejected": f" {draw.choice(RUDE)} {facts}",
                "dimension": draw.choice(["tone", "facts"]),
            }
        )
    return rows


def write_pairs(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(folder: Path, *, train: int = 96, heldout: int = 24) -> None:
    """Write `model/`, `pairs.jsonl` and `heldout.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", pairs(train, seed=1))
    write_pairs(folder / "heldout.jsonl", pairs(heldout, seed=2))
    build_model(folder / "model")


def build_model(folder: Path, *, hidden: int = 32, seed: int = 0) -> None:
    """A random Llama with a byte-level tokenizer that writes `<s>` in front and ends turns with `</s>`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE trained on the made-up pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    text = [row[key] for row in pairs(60, seed=0) for key in ("prompt", "chosen", "rejected")]
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


if __name__ == "__main__":
    build(Path(sys.argv[1]))
