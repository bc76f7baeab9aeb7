"""The base policy: a tiny Llama with a word-level tokenizer, trained on replies of mixed quality."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt_cli.sandbox.grammar import Prompt, all_texts, draw_choice, reply_text
from prefopt_cli.sandbox.settings import BaseSettings

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
WORD = r" ?[A-Za-z]+|[^A-Za-z ]"
"""A word with the space before it, or one other character: texts come back exactly as they were."""

CONTEXT = 128
THREADS = 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; ``<s>`` goes in front of every text."""
    pieces = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    words = sorted({piece for text in all_texts() for piece, _ in pieces.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build(
    folder: Path,
    prompts: Sequence[Prompt],
    settings: BaseSettings,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Train the base policy and save it with its tokenizer; the same seed gives the same bytes."""
    tokenizer = build_tokenizer()
    with fixed_threads(THREADS), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, settings))
        _train(model, _texts(tokenizer, prompts, seed), settings, progress)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        initializer_range=settings.initializer_range,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _texts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], seed: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Endless (prompt, reply) in tokens: the prompts over and over, each time with another reply."""
    random = Random(f"{seed}/replies")
    encoded = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    while True:
        order = list(range(len(prompts)))
        random.shuffle(order)
        replies = [reply_text(prompts[n], draw_choice(prompts[n], random)) + EOS for n in order]
        replies = tokenizer(replies, add_special_tokens=False)["input_ids"]
        for n, reply in zip(order, replies, strict=True):
            yield encoded[n], reply


def _train(
    model: nn.Module,
    texts: Iterator[tuple[Sequence[int], Sequence[int]]],
    settings: BaseSettings,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """AdamW, linear warm-up, then down to zero; only the replies count."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / settings.warmup, (settings.steps - step) / settings.steps),
    )
    model.train()
    for step in range(settings.steps):
        batch = [next(texts) for _ in range(settings.batch)]
        loss = model(**_padded(batch)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress:
            progress("training the sandbox's base policy", step + 1, settings.steps)
    model.eval()


def _padded(batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    width = max(len(prompt) + len(reply) for prompt, reply in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, reply) in enumerate(batch):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor([*prompt, *reply])
        labels[row, len(prompt) : end] = torch.tensor(reply)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """So many threads whatever the environment says: sums in another number of them round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
