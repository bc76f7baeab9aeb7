"""Is a packed layout right for a model? Its first batch, scored packed and padded, tells."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_cli.errors import PrefoptError
from prefopt_cli.scoring.forward import plain_model, score_responses
from prefopt_cli.scoring.head import add_response_head
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted difference between packed and padded, in nats per token of a response, by type of the products."""

FEW = 8
"""Shorter responses count as if they had so many tokens: rounding does not average out over fewer."""

PROBE_TOKENS = 8192
"""Padded tokens of the batch that is scored both ways, at most, beyond its first two examples."""


def disagreement(
    model: nn.Module,
    layout: Layout,
    examples: Sequence[Example],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[str | None, float]:
    """What speaks against a layout after scoring examples both ways, and the largest difference in nats per token.

    Args:
        model: the policy, peft's wrapper or not; afterwards prepared for the layout if nothing speaks against it.
        layout: a packed one.
        examples: the first batch, or as many of it as `PROBE_TOKENS` allows.
        autocast: the precision that the model will run in.

    Raises:
        PrefoptError: the model's head is of a kind not known here.
    """
    examples = _probe(examples)
    plain = plain_model(model)
    before, training = plain.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            add_response_head(plain)
            padded = score_responses(model, _on(plain, Layout().batch(examples, 0)), Layout())
            _require_known_head(model, examples)
            try:
                layout.prepare(model)
                packed = score_responses(model, _on(plain, layout.batch(examples, 0)), layout)
                leaks = _leaks(model, layout, examples, packed.logps)
            except (PrefoptError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # any code may be in a model, and any of it may refuse the mask
                words = " ".join(str(error).split())[:200]
                return f"the model does not take the packed input ({type(error).__name__}: {words})", 0.0
        dtype = torch.get_autocast_dtype(plain.device.type) if _is_autocast(autocast, plain) else plain.dtype
        difference = float(((packed.logps - padded.logps).abs() / padded.lengths.clamp(min=FEW)).max())
        tolerance = TOLERANCE.get(dtype, 5e-2)
        if not difference <= tolerance:
            return (
                f"packed and padded log-probabilities of the first batch differ by {difference:.1e} nats per token "
                f"(accepted: {tolerance:.0e})"
            ), difference
        if leaks:
            return "the score of a response depends on the other response to its prompt", difference
        before = plain.config._attn_implementation
        return None, difference
    finally:
        if plain.config._attn_implementation != before:
            plain.set_attn_implementation(before)
        model.train(training)


def _probe(examples: Sequence[Example]) -> list[Example]:
    """The examples that are scored both ways.

    Only later tokens of a second response tell whether it sees the first one, so there is always such a response.
    """
    chosen = list(examples[:2])
    for example in examples[2:]:
        widest = max(each.longest for each in (*chosen, example))
        if widest * sum(len(each.responses) for each in (*chosen, example)) > PROBE_TOKENS:
            break
        chosen.append(example)
    if all(len(response) < 2 for example in chosen for response in example.responses[1:]):
        longest = max(chosen, key=lambda example: example.longest)
        text = [*longest.prompt, *max(longest.responses, key=len)]
        chosen.append(Example([], (text, text)))
    return chosen


def _leaks(model: nn.Module, layout: Layout, examples: Sequence[Example], logps: Tensor) -> bool:
    """Whether a response's score moves when the first response to its prompt, of the same length, is another.

    Where a response sees its prompt and itself only it cannot, in any precision; agreement with padded rows is
    asked only up to rounding, which in bfloat16 hides much.
    """
    others = [
        Example(each.prompt, ([max(token, 2) - 1 for token in each.responses[0]], *each.responses[1:]))
        for each in examples
    ]
    changed = score_responses(model, _on(plain_model(model), layout.batch(others, 0)), layout).logps
    later = slice(len(examples), None)  # response-major: the first responses come first
    # Experts work on the tokens that they are given together, so that there rounding moves.
    experts = hasattr(plain_model(model).config.get_text_config(), "output_router_logits")
    return not torch.allclose(changed[later], logps[later], rtol=1e-3 if experts else 1e-6, atol=1e-5)


def _require_known_head(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse a model whose own logits differ from those that the head here computes.

    Raises:
        PrefoptError: it puts something on its logits that is not known here.
    """
    plain = plain_model(model)
    singles = [Example(each.prompt, each.responses[:1]) for each in examples]
    scored = [single for single in singles if single.longest > 1]
    if not scored:
        return
    shortest = min(scored, key=lambda single: single.longest)
    batch = _on(plain, Layout().batch([shortest], 0))
    count = int(batch["targets"].numel())
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    log_probs = logits[0, batch["predicting"]].float().log_softmax(-1)
    expected = log_probs.gather(1, batch["targets"][:, None]).sum()
    got = score_responses(model, batch, Layout()).logps[0]
    reduced = torch.is_autocast_enabled(plain.device.type) or plain.dtype.itemsize < 4
    if not abs(float(got - expected)) / count < (0.1 if reduced else 1e-2):
        raise PrefoptError(
            f"{type(plain).__name__} computes its logits in a way that prefopt does not know: its log-probability of "
            f"a response is {float(expected):.3f}, the one from its hidden states {float(got):.3f}."
        )


def _is_autocast(autocast: Callable[[], AbstractContextManager[Any]], plain: Any) -> bool:
    with autocast():
        return torch.is_autocast_enabled(plain.device.type)


def _on(plain: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(plain.device) for name, tensor in batch.items()}
