"""The head in chunks against the plain formula: log-softmax of all logits, derived by autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction

from prefopt_cli.scoring import head
from prefopt_cli.scoring.head import TokenScores, token_scores

COUNT, HIDDEN, VOCABULARY = 23, 7, 41
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "both": {"scale": 1.7, "softcap": 5.0},
}


def inputs(dtype: torch.dtype = torch.float64, count: int = COUNT, *, bias: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": draw(count, HIDDEN),
        "weight": draw(VOCABULARY, HIDDEN),
        "bias": draw(VOCABULARY) if bias else None,
        "targets": torch.randint(0, VOCABULARY, (count,), generator=generator),
    }


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    return TokenScores(
        log_probs.gather(1, targets[:, None])[:, 0],
        -(log_probs.exp() * log_probs).sum(-1),
        logits.mean(-1),
        (logits.argmax(-1) == targets).to(logits.dtype),
    )


def gradients(scores: TokenScores, given: dict[str, Any]) -> list[Tensor]:
    """Of a sum with weights of both signs, with respect to everything that wants one."""
    weights = torch.cos(torch.arange(len(scores.log_probs), dtype=scores.log_probs.dtype))
    wanted = [each for each in given.values() if each is not None and each.requires_grad]
    return list(torch.autograd.grad((scores.log_probs * weights).sum(), wanted))


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int, kept: int, element: int = 8) -> None:
    """Chunks of so many rows, of which so many are kept for backward."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head, "CHUNK_ROWS", rows)
    monkeypatch.setattr(head, "KEPT_BYTES", kept * rows * VOCABULARY * element)


@pytest.mark.parametrize("kept", [0, 2, 100], ids=["none-kept", "some-kept", "all-kept"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_scores_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    transform: str,
    bias: bool,
    kept: int,
) -> None:
    chunked(monkeypatch, rows=5, kept=kept, element=dtype.itemsize)
    given = inputs(dtype, bias=bias)

    found, expected = (score(**given, **TRANSFORMS[transform]) for score in (token_scores, plain))

    for name, values in found._asdict().items():
        torch.testing.assert_close(
            values, getattr(expected, name), rtol=tolerance, atol=tolerance, msg=name, check_dtype=True
        )
    for ours, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    chunked(monkeypatch, rows=2, kept=1)
    given = inputs(count=5)
    targets = given.pop("targets")

    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: (
            token_scores(hidden, weight, targets, bias, **TRANSFORMS[transform]).log_probs
        ),
        tuple(given.values()),
        nondet_tol=1e-12,  # it goes through the graph twice, the second time with nothing kept
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_neither_the_chunks_nor_what_is_kept_of_them_is_seen_in_the_numbers(
    monkeypatch: pytest.MonkeyPatch, transform: str
) -> None:
    given = inputs()
    results = []
    for rows, kept in ((COUNT, 1), (COUNT, 0), (1, 7), (4, 0), (COUNT - 1, 1)):
        chunked(monkeypatch, rows, kept)
        scores = token_scores(**given, **TRANSFORMS[transform])
        results.append([*scores, *gradients(scores, given)])

    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_log_probabilities_carry_a_gradient() -> None:
    scores = token_scores(**inputs())

    assert [values.requires_grad for values in scores] == [True, False, False, False]


def test_a_graph_can_be_gone_through_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is given up as it is used; the second time it is computed again."""
    chunked(monkeypatch, rows=5, kept=100)
    given = inputs()
    total = token_scores(**given).log_probs.sum()

    once = torch.autograd.grad(total, given["weight"], retain_graph=True)[0]
    twice = torch.autograd.grad(total, given["weight"])[0]

    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("weight",)])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[str, ...]) -> None:
    given = inputs()
    for name in frozen:
        given[name].requires_grad_(False)

    token_scores(**given).log_probs.sum().backward()

    expected = plain(**given).log_probs.sum()
    for name in ("hidden", "weight", "bias"):
        if name in frozen:
            assert given[name].grad is None
        else:
            torch.testing.assert_close(
                given[name].grad, torch.autograd.grad(expected, given[name], retain_graph=True)[0]
            )


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        scores = token_scores(**inputs())

    torch.testing.assert_close(scores.log_probs, plain(**inputs()).log_probs.detach())
    assert scores.log_probs.grad_fn is None


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(count: int) -> None:
    given = inputs(count=count)
    found, expected = token_scores(**given), plain(**given)

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (count,)
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_of_equally_likely_tokens_the_first_counts() -> None:
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0], [3.0]])
    hidden = torch.ones(5, 1)

    scores = token_scores(hidden, weight, torch.arange(5))

    assert scores.is_top1.tolist() == [0, 1, 0, 0, 0]


def test_logits_far_apart_stay_finite() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)

    scores = token_scores(hidden, weight, torch.tensor([0, 0, 1]))
    scores.log_probs.sum().backward()

    assert scores.log_probs.tolist() == [0.0, -2e4, -2e4]
    assert scores.entropy.tolist() == [0.0, 0.0, 0.0]
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def trl(given: dict[str, Any], scale: float = 1.0, softcap: float | None = None) -> TokenScores:
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    log_probs, entropy, _, mean_logits, top1 = ChunkedLogProbFunction.apply(
        given["hidden"], given["weight"], given["bias"], given["targets"], 1.0, 16, softcap, scale, outputs
    )
    return TokenScores(log_probs, entropy, mean_logits, top1.float())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_autocast_it_is_as_good_as_trls_kernel(transform: str) -> None:
    """Both round products to bfloat16 and reduce in float32; against float64 ours errs no more than theirs."""
    given, exact = inputs(torch.float32), inputs()
    truth = plain(**exact, **TRANSFORMS[transform])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            token_scores(**given, **TRANSFORMS[transform]),
            trl(given, **TRANSFORMS[transform]),
        )

    assert ours.log_probs.dtype == torch.float32
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.mean_logits, theirs.mean_logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for mine, other, right in zip(
        gradients(ours, given), gradients(theirs, given), gradients(truth, exact), strict=True
    ):
        assert mine.dtype == torch.float32
        error = (mine - right).norm() / right.norm()
        assert error < max(1e-3, 1.5 * float((other - right).norm() / right.norm()))
        assert error < 0.02


def test_bfloat16_weights_without_autocast() -> None:
    given, exact = inputs(torch.bfloat16), inputs()
    exact = {name: each.detach().double() if name != "targets" else each for name, each in given.items()}

    scores = token_scores(**given)

    assert scores.log_probs.dtype == torch.float32
    torch.testing.assert_close(scores.log_probs.double(), plain(**exact).log_probs, rtol=0.02, atol=0.05)
    assert {gradient.dtype for gradient in gradients(scores, given)} == {torch.bfloat16}


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_tensor_of_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr(head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(head, "KEPT_BYTES", 3 * 16 * 500 * 4)
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    targets = torch.randint(0, 500, (1000,))

    with Sizes() as sizes:
        scores = token_scores(hidden, weight, targets, **TRANSFORMS[transform])
        scores.log_probs.sum().backward()

    assert sizes.largest <= 16 * 500 + 1000
    assert hidden.grad is not None


def test_no_more_is_kept_for_backward_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(head, "KEPT_BYTES", 100_000)
    hidden, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)

    scores = token_scores(hidden, weight, torch.zeros(1000, dtype=torch.long))
    context: Any = scores.log_probs.grad_fn
    while not hasattr(context, "kept"):
        context = context.next_functions[0][0]

    assert 0 < sum(each.untyped_storage().nbytes() for each in context.kept.values()) <= 100_000
