"""An interval of 95 % holds the truth in about 95 % of simulated sets: each kind of figure in a world like its own."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from prefopt_cli.evaluation.statistics import bootstrap
from prefopt_cli.evaluation.statistics.bootstrap import Estimate, estimates, mean, share
from prefopt_cli.evaluation.statistics.calibration import calibration
from prefopt_cli.evaluation.statistics.ranking import kendall_tau

SETS = 1000
RESAMPLES = 1000
"""Fewer than `prefopt eval` takes, which widens no interval on average."""

Found = Mapping[str, Estimate]
World = Callable[[np.random.Generator, int], Found]


def _prompts(draw: np.random.Generator) -> np.ndarray:
    """The prompts of the pairs: 150 of 1 to 3 pairs each."""
    return np.repeat(np.arange(150), draw.integers(1, 4, 150))


def clustered_shares(draw: np.random.Generator, seed: int) -> Found:
    """Each prompt has chances of its own: to be ordered rightly, and to be ordered other than by the reference."""
    prompts = _prompts(draw)
    right = draw.random(len(prompts)) < draw.beta(3, 2, 150)[prompts]
    flipped = draw.random(len(prompts)) < draw.beta(1.2, 8.8, 150)[prompts]
    return estimates({"accuracy": share(right), "flipped": share(flipped)}, prompts, seed=seed)


def lone_shares(draw: np.random.Generator, seed: int) -> Found:
    """Pairs with a prompt each."""
    return estimates(
        {str(chance): share(draw.random(250) < chance) for chance in (0.6, 0.95)}, np.arange(250), seed=seed
    )


def margins(draw: np.random.Generator, seed: int) -> Found:
    """A long tail of margins to the right."""
    values = draw.lognormal(0, 0.8, 200) - draw.lognormal(0, 0.5, 200)
    return estimates({"margin": mean(values)}, seed=seed)


def paired_gain(draw: np.random.Generator, seed: int) -> Found:
    """Two policies on the same pairs; what is hard for one is so for the other."""
    prompts = _prompts(draw)
    ease = draw.normal(size=150)[prompts]
    first, second = (draw.normal(ease, 1) > bar for bar in (-0.5, -0.2))
    return estimates({"gain": mean(first.astype(float) - second)}, prompts, seed=seed)


def ranks(draw: np.random.Generator, seed: int) -> Found:
    """Rows of four responses, whose scores are their true places with noise."""
    scores = draw.normal(-np.arange(4), 2, (150, 4))
    return estimates({"tau": mean([kendall_tau(row, range(4)) for row in scores])}, seed=seed)


def overconfident(draw: np.random.Generator, seed: int) -> Found:
    """500 pairs whose preferred response follows sigma(margin / 2)."""
    differences = draw.normal(0, 2, 500)
    signs = np.where(draw.random(500) < expit(differences / 2), 1, -1)
    found = calibration(signs * differences, seed=seed)
    return {"ece": found.ece, "log_loss": found.log_loss, "brier": found.brier, "scale": found.scale}


def _overconfident_truth() -> dict[str, float]:
    """By integration over the differences' normal distribution."""
    differences = np.linspace(-16, 16, 400_001)
    weights = norm.pdf(differences, scale=2)
    weights /= weights.sum()
    wrong, chance = expit(-differences), expit(differences / 2)
    confidence = np.maximum(wrong, 1 - wrong)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = np.bincount(bins, weights=weights * (expit(np.abs(differences) / 2) - confidence))
    return {
        "ece": float(np.abs(gaps).sum()),
        # The response that is ahead by the difference is chosen with that chance; either may be named first.
        "log_loss": float(2 * (weights * chance * np.logaddexp(0, -differences)).sum()),
        "brier": float(2 * (weights * chance * wrong**2).sum()),
        "scale": 0.5,
    }


WORLDS: list[tuple[World, dict[str, float]]] = [
    (clustered_shares, {"accuracy": 0.6, "flipped": 0.12}),
    (lone_shares, {"0.6": 0.6, "0.95": 0.95}),
    (margins, {"margin": np.exp(0.32) - np.exp(0.125)}),
    (paired_gain, {"gain": norm.cdf(0.5 / 2**0.5) - norm.cdf(0.2 / 2**0.5)}),
    (
        ranks,
        {"tau": np.mean([2 * norm.cdf((j - i) / 8**0.5) - 1 for i in range(4) for j in range(i + 1, 4)])},
    ),
    (overconfident, _overconfident_truth()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "truth"), WORLDS, ids=[world.__name__ for world, _ in WORLDS])
def test_coverage(world: World, truth: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", RESAMPLES)
    draw = np.random.default_rng(1)
    sets = [world(draw, seed) for seed in range(SETS)]
    held = {
        name: float(np.mean([not found[name].excludes(true) for found in sets]))
        for name, true in truth.items()
    }
    print(held)  # shown where it fails, and with -s
    assert held == pytest.approx(dict.fromkeys(truth, 0.95), abs=0.02 + 1e-9)
