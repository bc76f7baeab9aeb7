"""Small files and tokenizers for the data tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefopt_cli.recipe.schema import DatasetSettings

TEXTS = [
    "Human: Tell me about cats and dogs. Assistant: Cats are small animals. Dogs are not.",
    "user assistant system question answer Yes No I am fine, thank you very much.",
]

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
LLAMA3_WITHOUT_BOS = LLAMA3.removeprefix("{{ bos_token }}")
WITHOUT_TURN_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot_id|>"]


def tokenizer(
    *, adds_bos: bool = True, adds_eos: bool = False, template: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; BOS (and EOS) come from the post-processor, as in the Llama family."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    bos, end = ("<s> " if adds_bos else ""), (" </s>" if adds_eos else "")
    if bos or end:
        ids = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos}$A{end}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>" if adds_bos else None, eos_token=eos, chat_template=template
    )


def row(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A standard row, each number another one."""
    answers = {"prompt": f"Question {number}?", "chosen": f" Yes {number}", "rejected": f" No {number}"}
    return {**answers, **columns}


def rows(count: int) -> list[dict[str, Any]]:
    """Distinct standard rows."""
    return [row(number) for number in range(count)]


def chat_row(question: str = "Tell me", chosen: str = "Yes I am", rejected: str = "No") -> dict[str, Any]:
    """A conversational row of one turn."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write rows one a line, zipped if the name ends in .gz; returns the path as recipes have it."""
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def settings(train: Any, **others: Any) -> DatasetSettings:
    """Settings with everything in file order unless told otherwise."""
    return DatasetSettings.model_validate({"shuffle": False, "train": train, **others})
