"""Calibration of margins."""

import json

import numpy as np
import pytest
from scipy import optimize, special

from prefopt_cli.evaluation.statistics import bootstrap
from prefopt_cli.evaluation.statistics.calibration import Calibration, best_scale, calibration


def choices(seed: int, pairs: int, scale: float, spread: float = 2.0) -> np.ndarray:
    """Margins chosen - rejected of pairs whose preferred response follows sigma(scale * difference)."""
    draw = np.random.default_rng(seed)
    differences = draw.normal(0, spread, pairs)
    return np.where(draw.random(pairs) < special.expit(scale * differences), differences, -differences)


def test_by_hand() -> None:
    """Three pairs at |margin| log 4, p = 0.8, two of them right; one at log 1.5, p = 0.6, that is wrong."""
    found = calibration([np.log(4), np.log(4), -np.log(4), -np.log(1.5)], bins=2)
    assert [(each.low, each.high, each.pairs) for each in found.bins] == [(0.5, 0.75, 1), (0.75, 1.0, 3)]
    assert [each.confidence for each in found.bins] == pytest.approx([0.6, 0.8])
    assert [each.accuracy.value for each in found.bins] == pytest.approx([0, 2 / 3])
    assert found.ece.value == pytest.approx((0.6 + 3 * (0.8 - 2 / 3)) / 4)
    assert found.log_loss.value == pytest.approx(-np.log(0.8 * 0.8 * 0.2 * 0.4) / 4)
    assert found.brier.value == pytest.approx((2 * 0.04 + 0.64 + 0.36) / 4)


def test_ties_are_calibrated() -> None:
    found = calibration([0.0] * 6)
    assert (found.ece, found.ece_if_calibrated) == ((0, 0, 0), 0)
    assert found.bins[0].accuracy.value == 0.5
    assert found.log_loss.value == pytest.approx(np.log(2))
    assert found.scale == (1, 0, 100)


@pytest.mark.parametrize("true", [0.2, 1.0, 3.0])
def test_scale_agrees_with_scipy(true: float) -> None:
    margins = choices(0, 300, true)
    expected = optimize.minimize_scalar(
        lambda scale: np.logaddexp(0, -scale * margins).mean(), bounds=(0, 100), options={"xatol": 1e-8}
    ).x
    assert best_scale(margins) == pytest.approx(expected, abs=1e-6)
    found = calibration(margins).scale
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert 0 < found.low < found.value < found.high


def test_scale_turns_with_the_margins() -> None:
    margins = choices(0, 300, 1.0)
    assert best_scale(4 * margins) == pytest.approx(best_scale(margins) / 4)


def test_scale_that_nothing_bounds() -> None:
    """Of right pairs alone, the more there are the larger must c be; of wrong pairs alone, the smaller."""
    assert best_scale(np.array([1.0, 2.0])) == 100
    assert best_scale(np.array([-1.0, -3.0, 2.0])) == 0
    few, many = (calibration(np.ones(pairs)).scale for pairs in (10, 100))
    assert few.value == few.high == many.high == 100
    assert 0 < few.low < many.low < 100
    # The likelihood at the lower end: 10 log(1 + exp(-c)) = 1.96^2 / 2.
    assert 10 * np.log1p(np.exp(-few.low)) == pytest.approx(1.959964**2 / 2, abs=1e-4)
    few, many = (calibration(-np.ones(pairs)).scale for pairs in (10, 100))
    assert few.value == few.low == many.low == 0
    assert 0 < many.high < few.high < 1
    copied = calibration(np.ones(50), np.arange(50) // 5).scale
    assert copied.low == pytest.approx(calibration(np.ones(10)).scale.low)


def test_huge_margins_overflow_nowhere() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = calibration([1e5, -1e5, 2e5, 3e5])
    assert found.log_loss.value == pytest.approx(25_000)
    assert found.brier.value == pytest.approx(0.25)
    assert found.ece.value == pytest.approx(0.25)


def test_miscalibration_is_seen_and_calibration_is_too() -> None:
    over, right = calibration(choices(1, 1000, 0.4)), calibration(choices(1, 1000, 1.0))
    assert over.ece.low > 0
    assert over.ece.value > over.ece_if_calibrated
    assert over.scale.high < 1
    assert right.ece.low == 0
    assert right.ece.value < right.ece_if_calibrated
    assert not right.scale.excludes(1)


@pytest.mark.slow
def test_calibrated_margins_are_rarely_beyond_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ece_if_calibrated` is exceeded in 5 % of calibrated sets, and the interval leaves out 0 in about 2.5 %."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    sets = [calibration(choices(seed, 300, 1.0), seed=seed) for seed in range(200)]
    beyond = np.mean([found.ece.value > found.ece_if_calibrated for found in sets])
    assert beyond == pytest.approx(0.05, abs=0.04)
    assert np.mean([found.ece.low > 0 for found in sets]) <= 0.05


def test_pairs_of_one_prompt_do_not_narrow_the_intervals() -> None:
    margins = choices(0, 200, 0.5)
    alone = calibration(margins)
    copied = calibration(np.repeat(margins, 3), np.repeat(np.arange(200), 3))
    for name in ("ece", "log_loss", "brier", "scale"):
        assert getattr(copied, name) == pytest.approx(getattr(alone, name), abs=1e-6)


def test_bins_hold_all_pairs() -> None:
    margins = np.append(choices(0, 500, 1.0), [0.0, 800.0])
    for bins in (1, 5, 10):
        found = calibration(margins, bins=bins)
        assert sum(each.pairs for each in found.bins) == len(margins)
        for each in found.bins:
            assert each.low <= each.confidence <= each.high
            assert each.accuracy.low <= each.accuracy.value <= each.accuracy.high
        gaps = [each.pairs * abs(each.accuracy.value - each.confidence) for each in found.bins]
        assert found.ece.value == pytest.approx(sum(gaps) / len(margins))


def test_one_cluster() -> None:
    found = calibration([1.0, -2.0, 0.5], ["a", "a", "a"])
    for estimate in (found.ece, found.log_loss, found.brier, found.scale):
        assert estimate.low == estimate.value == estimate.high


def test_seed() -> None:
    margins = choices(0, 100, 1.0)
    assert calibration(margins) == calibration(margins)
    assert calibration(margins).ece_if_calibrated != calibration(margins, seed=1).ece_if_calibrated


def test_to_json() -> None:
    found: Calibration = calibration(choices(0, 50, 1.0))
    plain = json.loads(json.dumps(found.to_dict()))
    assert list(plain) == ["ece", "log_loss", "brier", "scale", "ece_if_calibrated", "bins"]
    assert plain["ece"] == found.ece.to_dict()
    assert plain["bins"][0]["accuracy"] == found.bins[0].accuracy.to_dict()


@pytest.mark.parametrize("margins", [[], [np.nan, 1.0], [np.inf]])
def test_what_cannot_be_calibrated(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="missing or not finite"):
        calibration(margins)
