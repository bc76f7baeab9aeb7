"""bitsandbytes: a small tensor is really brought to 4 and to 8 bits and back, on the device that would train."""

from collections.abc import Iterator

import torch

from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, ok

INSTALL = 'pip install --upgrade "bitsandbytes>=0.48" (after torch)'
WORST = {"4-bit": 0.15, "8-bit": 0.02}
"""Relative error of normally distributed values above which something is broken (0.09 and 0.01 are right)."""


def quantization() -> Iterator[Finding]:
    """4 bits (nf4) and 8 bits (LLM.int8())."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes
    except (
        Exception
    ) as error:  # it loads libraries of the machine, and says in many ways that they do not fit
        for feature in WORST:
            yield note(f"{feature} weights: bitsandbytes fails: {in_brief(error)}", INSTALL, feature)
        return
    version = bitsandbytes.__version__
    for feature, error_of in (("4-bit", four_bits), ("8-bit", eight_bits)):
        try:
            found = error_of(device)
        except Exception as failure:
            said = in_brief(failure)
            yield note(
                f"{feature} weights fail on {device} (bitsandbytes {version}): {said}", INSTALL, feature
            )
            continue
        text = f"{feature} weights on {device} (bitsandbytes {version}): error {found:.1%}"
        if not found < WORST[feature]:
            yield note(f"{text}, which is too much", INSTALL, feature)
        else:
            yield ok(text, feature)


def four_bits(device: str) -> float:
    """Relative error of a tensor that was in nf4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = _values(device)
    bits, state = quantize_4bit(values, quant_type="nf4")
    return _error(dequantize_4bit(bits, state), values)


def eight_bits(device: str) -> float:
    """Relative error of what a layer in 8 bits computes."""
    from bitsandbytes.nn import Linear8bitLt

    values = _values("cpu")
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": values})
    half = torch.float16 if device == "cuda" else torch.float32
    inputs = _values(device).to(half)
    with torch.no_grad():
        return _error(layer.to(device)(inputs), inputs @ values.to(device, half).T)


def _values(device: str) -> torch.Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).float().norm() / right.float().norm())
