"""One training step on fake tensors: every allocation of the real step, and no memory.

A fake tensor has shape, type and device but no data. Model code, autograd, checkpointing, autocast, LoRA and
packing run on it as they are, so no architecture needs a formula of its own. All fakes claim to be on the CPU: a
torch without CUDA cannot run autograd on anything else. `memory_stand_ins` replaces what needs data or a GPU.

One known excess: autograd adds up gradients of fakes out of place where it adds real ones in place, so tied
embeddings seem to need one more gradient of the embedding at the end of backward.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from prefopt_cli.recipe.schema import SelfSupervisedSettings
from prefopt_cli.scoring.attention import BLOCK
from prefopt_cli.scoring.forward import ResponseScores, plain_model, score_responses, score_samples
from prefopt_cli.scoring.head import HeadStates
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory_log import AllocationLog, Timeline
from prefopt_cli.training.memory_stand_ins import TRACED_ROW, Device, head_stand_ins, pieces_of

Reference = Literal["copy", "adapter_disabled", "none"]
Precision = Literal["no", "bf16", "fp16"]

_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory besides the model."""

    examples: Sequence[Example]
    """The batch; only lengths matter."""
    layout: Layout
    reference: Reference
    mixed_precision: Precision
    gradient_checkpointing: bool
    accumulates: bool
    """Whether gradients of an earlier micro-batch are there already."""
    device: Device
    samples: Sequence[Example] = ()
    """Responses of the policy itself that go through it after the batch, for the KL to the reference, whose states
    are known by then; the reference does not see the batch."""
    kept_positions: int = 0
    """Tokens of all samples of a draw, whose reference states are kept until the next one."""
    degrees: SelfSupervisedSettings | None = None
    """How the levels of all responses, the unscored ones among them, are told from their states."""

    @property
    def traced_layout(self) -> Layout:
        """Blocks stand in one row, as pieces do, and their mask is small beside all else."""
        return Layout("pieces") if self.layout.way == "blocks" else self.layout

    def batch(self) -> dict[str, Tensor]:
        """The batch as the model gets it."""
        return self._laid_out(self.examples)

    def sample_batch(self) -> dict[str, Tensor]:
        """The same of the samples; empty without any."""
        return self._laid_out(self.samples) if self.samples else {}

    def _laid_out(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        multiple = BLOCK if self.layout.way == "blocks" else None
        return self.traced_layout.batch(examples, 0, multiple)


def trace_step(model: nn.Module, shape: StepShape) -> Timeline:
    """Bytes by part through policy forward, reference forward, loss and backward; no optimizer state.

    The model is left as it is; its weights are neither read nor copied.

    Raises:
        Exception: whatever the model's code raises on tensors without data, for example where it branches on
            their values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch, samples = shape.batch(), shape.sample_batch()
    policy = _fake_copy(model, mode)
    _prepare(policy, shape, batch, samples)
    frozen = _fake_copy(model, mode) if shape.reference == "copy" else None
    if frozen is not None:
        _set_attention(frozen, shape, batch, samples)
        frozen.eval()
    log = AllocationLog()
    batch, samples = (_fakes(each, mode) for each in (batch, samples))
    with warnings.catch_warnings(), mode, head_stand_ins(shape.device, log), log:
        warnings.simplefilter("ignore")
        log.own([*policy.parameters(), *policy.buffers()], "weights")
        if frozen is not None:
            log.own([*frozen.parameters(), *frozen.buffers()], "frozen policy")
        if shape.accumulates:
            for parameter in _trainable(policy):
                parameter.grad = torch.zeros_like(parameter)
        if samples:
            reference = _reference_states(frozen or policy, samples, shape, log)
            scores = _score_policy(policy, batch, shape)
            loss = scores.logps.mean()
            loss = loss + _divergence(policy, reference, samples, shape, log)
        else:
            scores = _score_policy(policy, batch, shape)
            loss = _loss(scores, policy, frozen, batch, shape, log)
        if shape.degrees is not None:
            loss = loss + _degree_loss(scores, shape.degrees)
        _backward(loss, log)
        log.assign([p.grad for p in _trainable(policy) if p.grad is not None], "gradients")
    return log.timeline()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same modules around fake weights. Tied weights stay tied: a deep copy replaces each tensor once."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def _fakes(batch: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
    return {name: mode.from_tensor(tensor) for name, tensor in batch.items()}


def _prepare(policy: Any, shape: StepShape, *batches: Mapping[str, Tensor]) -> None:
    """As the trainer prepares it: training mode, no dropout, checkpointing as asked."""
    policy.train()
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _set_attention(policy, shape, *batches)
    if shape.gradient_checkpointing:
        # The state of the random generator is data, which fake tensors lack.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if hasattr(policy, "peft_config"):
            policy.enable_input_require_grads()


def _set_attention(model: Any, shape: StepShape, *batches: Mapping[str, Tensor]) -> None:
    plain = plain_model(model)
    if str(getattr(plain.config, "_attn_implementation", None)).startswith(("flash", "kernels")):
        # These kernels need a GPU; sdpa never stores the score matrix either.
        plain.config._attn_implementation = "sdpa"
    shape.traced_layout.prepare(model)
    if shape.layout.way == "blocks":
        plain.set_attn_implementation(TRACED_ROW)
    elif shape.layout.way == "pieces":
        plain.set_attn_implementation(pieces_of(*(batch["calls"] for batch in batches if batch)))


def _loss(
    scores: ResponseScores,
    policy: Any,
    frozen: Any,
    batch: Mapping[str, Tensor],
    shape: StepShape,
    log: AllocationLog,
) -> Tensor:
    """Policy forward, then reference forward, as the trainer orders them: the activations are there during both."""
    logps = scores.logps
    if shape.reference != "none":
        log.part = "reference forward"
        with torch.no_grad(), _without_checkpointing(policy):
            reference_scores = _reference_scores(policy, frozen, batch, shape)
        log.part = "activations"
        logps = logps - reference_scores
    return logps.mean()


def _degree_loss(scores: ResponseScores, degrees: SelfSupervisedSettings) -> Tensor:
    """That of all responses, though a few may take no part; the classifier's own weights are next to nothing."""
    assert scores.states is not None
    head = nn.Linear(scores.states.size(1), degrees.levels)
    levels = torch.zeros(scores.states.size(0), dtype=torch.int64)
    return cross_entropy(head(scores.states.float()), levels)


def _reference_states(
    reference: Any, samples: Mapping[str, Tensor], shape: StepShape, log: AllocationLog
) -> HeadStates:
    """What the reference says about the samples of a draw: those of this step lie in the same memory as the others."""
    part, log.part = log.part, "reference states"
    head = plain_model(reference).get_output_embeddings()
    places = samples["predicting"].numel()
    hidden = torch.empty(max(shape.kept_positions, places), head.weight.size(1), dtype=head.weight.dtype)
    log.part = part
    return HeadStates(hidden[:places], head.weight.detach(), head.bias)


def _divergence(
    policy: Any, states: HeadStates, samples: Mapping[str, Tensor], shape: StepShape, log: AllocationLog
) -> Tensor:
    """The KL on the policy's samples, beside the activations of the batch."""
    log.part = "activations of samples"
    with _autocast(shape):
        return score_samples(policy, samples, shape.traced_layout, states).kl.sum()


def _reference_scores(policy: Any, frozen: Any, batch: Mapping[str, Tensor], shape: StepShape) -> Tensor:
    if frozen is not None:
        return _score(frozen, batch, shape)
    with policy.disable_adapter():
        return _score(policy, batch, shape)


@contextmanager
def _without_checkpointing(policy: nn.Module) -> Iterator[None]:
    policy.eval()  # checkpointing is for training mode; dropout is off anyway
    try:
        yield
    finally:
        policy.train()


def _score_policy(policy: Any, batch: Mapping[str, Tensor], shape: StepShape) -> ResponseScores:
    pooling = shape.degrees.pooling if shape.degrees else None
    with _autocast(shape):
        return score_responses(policy, batch, shape.traced_layout, pooling=pooling)


def _score(model: Any, batch: Mapping[str, Tensor], shape: StepShape) -> Tensor:
    """Summed log-probabilities of the responses under the reference."""
    with _autocast(shape):
        return score_responses(model, batch, shape.traced_layout).logps


def _autocast(shape: StepShape) -> AbstractContextManager[Any]:
    if shape.mixed_precision == "no":
        return nullcontext()
    return torch.autocast("cpu", dtype=_LOW_PRECISION[shape.mixed_precision])


def _backward(loss: Tensor, log: AllocationLog) -> None:
    gradient = torch.ones_like(loss)
    log.in_backward, log.part = True, "LM head"
    loss.backward(gradient)
    log.in_backward = False
