"""Each finding is there when it should be and not otherwise, with the figure that it is about and the threshold."""

import numpy as np
import pytest

from prefopt_cli.evaluation.figures import figures_of
from prefopt_cli.evaluation.findings import DROPPED, FEW_PROMPTS, TOO_FEW, Finding
from prefopt_cli.evaluation.held_out import prompt_key
from prefopt_cli.evaluation.scored import ScoredSet
from prefopt_cli.evaluation.set_findings import OVERCONFIDENT, SPREAD, UNDERCONFIDENT, findings_of
from tests.evaluation.plain import REWARD, made_up

PAIRS = 100


def pairs(
    margins: list[float] | np.ndarray,
    reference: list[float] | np.ndarray | None = None,
    *,
    level: float = -20.0,
    **options: object,
) -> ScoredSet:
    """Pairs of these log-prob margins under the policy and its reference; rejected ones have -20 under either.

    Args:
        level: of the policy's rejected responses, where it is another.
    """
    own = [[level + each, level] for each in margins]
    its = None if reference is None else [[-20.0 + each, -20.0] for each in reference]
    return made_up(own, its, reward=None if its is None else REWARD, **options)  # type: ignore[arg-type]


def found(scored: ScoredSet, trained_on: set[bytes] | None = None) -> dict[str, Finding]:
    listed = findings_of("set", figures_of(scored, trained_on))
    assert all(each.set == "set" and each.text.endswith(".") for each in listed)
    order = ["warning", "note", "good"]
    assert [order.index(each.weight) for each in listed] == sorted(
        order.index(each.weight) for each in listed
    )
    return {each.code: each for each in listed}


def mixed(right: int, size: float = 1.0, total: int = PAIRS) -> np.ndarray:
    """Margins of which so many are right."""
    return np.where(np.arange(total) < right, size, -size)


def test_chance() -> None:
    low, middle, high = (found(pairs(mixed(right))) for right in (20, 52, 80))
    assert "below_chance" in low
    assert "at_chance" not in low
    assert (low["below_chance"].figure, low["below_chance"].threshold) == (0.2, 0.5)
    assert low["below_chance"].weight == "warning"
    assert "20.0% [" in low["below_chance"].text
    assert "at_chance" in middle
    assert "below_chance" not in middle
    assert (middle["at_chance"].figure, middle["at_chance"].threshold) == (0.52, 0.5)
    assert not {"at_chance", "below_chance"} & high.keys()


LONGER_FOR_SEVENTY = [[6, 5] if n < 70 else [5, 6] for n in range(PAIRS)]


@pytest.mark.parametrize(
    ("margins", "code", "other", "gain"),
    [
        (mixed(95), "above_length_only", "not_above_length_only", 0.25),
        (mixed(70), "not_above_length_only", "above_length_only", 0.0),
        (mixed(40), "not_above_length_only", "above_length_only", -0.3),
    ],
)
def test_length_alone(margins: np.ndarray, code: str, other: str, gain: float) -> None:
    told = found(pairs(margins, np.zeros(PAIRS), lengths=LONGER_FOR_SEVENTY))
    assert other not in told
    assert told[code].figure == pytest.approx(gain)
    assert told[code].threshold == 0.0
    assert "always taking the longer response gets 70.0%" in told[code].text
    assert told[code].weight == ("good" if code == "above_length_only" else "warning")


def test_a_log_probability_that_only_counts_tokens() -> None:
    """The longer response is preferred, and less likely: that is no sign of anything."""
    margins = np.array([-1.0 if n < 70 else 1.0 for n in range(PAIRS)])
    alone, ratio = (
        found(pairs(margins, reference, lengths=LONGER_FOR_SEVENTY)) for reference in (None, np.zeros(PAIRS))
    )
    assert [told["below_chance"].weight for told in (alone, ratio)] == ["note", "warning"]
    assert [told["not_above_length_only"].weight for told in (alone, ratio)] == ["note", "warning"]
    assert "per token the accuracy is" in alone["below_chance"].text
    assert "swapped" in ratio["below_chance"].text


def test_nothing_is_concluded_from_a_handful_of_prompts() -> None:
    few = found(pairs(mixed(4, total=TOO_FEW - 1), np.zeros(TOO_FEW - 1)))
    assert few.keys() == {"few_prompts"}
    assert few["few_prompts"].weight == "warning"
    assert "Only 4 prompts: the intervals say nothing" in few["few_prompts"].text
    assert "Only 1 prompt:" in found(pairs([1.0]))["few_prompts"].text
    assert len(found(pairs(mixed(5, total=TOO_FEW), np.zeros(TOO_FEW)))) > 1


def test_likelihood_displacement() -> None:
    """Chosen responses lose while margins grow; where they gain, or no margin grows, nothing is said."""
    before = np.zeros(PAIRS) + np.linspace(-1, 1, PAIRS)
    displaced = found(pairs(before + 4, before, level=-30))
    assert displaced["likelihood_displacement"].figure == pytest.approx(-6)
    assert displaced["likelihood_displacement"].threshold == 0
    assert "lost 6.00 nats" in displaced["likelihood_displacement"].text
    assert "grew by 4.00 nats" in displaced["likelihood_displacement"].text
    assert "likelihood_displacement" not in found(pairs(before + 4, before, level=-22))  # chosen gains 2
    assert "likelihood_displacement" not in found(pairs(before - 1, before, level=-30))
    assert "likelihood_displacement" not in found(pairs(before))


def test_against_the_reference() -> None:
    better = found(pairs(mixed(90), mixed(50)))
    worse = found(pairs(mixed(50), mixed(90)))
    like = found(pairs(mixed(52), mixed(50)))
    codes = {"better_than_reference", "worse_than_reference", "like_reference"}
    assert [codes & each.keys() for each in (better, worse, like)] == [
        {"better_than_reference"},
        {"worse_than_reference"},
        {"like_reference"},
    ]
    assert better["better_than_reference"].figure == pytest.approx(0.4)
    assert worse["worse_than_reference"].figure == pytest.approx(-0.4)
    assert like["like_reference"].figure == pytest.approx(0.02)
    assert "90.0% [" in better["better_than_reference"].text
    assert not codes & found(pairs(mixed(90))).keys()


def test_flips() -> None:
    same = found(pairs(3 * mixed(60), mixed(60)))
    assert same["nothing_flipped"].figure == 0
    assert "flips_to_rejected" not in same
    # Ten went to the rejected response, none to the chosen one.
    wrong = found(pairs(mixed(50), mixed(60)))
    assert "nothing_flipped" not in wrong
    assert (wrong["flips_to_rejected"].figure, wrong["flips_to_rejected"].threshold) == (0.1, 0.0)
    right = found(pairs(mixed(60), mixed(50)))
    assert not {"nothing_flipped", "flips_to_rejected"} & right.keys()
    assert not {"nothing_flipped", "flips_to_rejected"} & found(pairs(mixed(60))).keys()


def test_accuracy_that_depends_on_length() -> None:
    """Right where chosen is longer, wrong where it is shorter; or right and wrong alike everywhere."""
    lengths = [[10 + n // 20, 12] for n in range(PAIRS)]  # five buckets: -2, -1, 0, 1, 2
    lopsided = np.array([1.0 if n >= 60 else -1.0 for n in range(PAIRS)])
    even = np.array([-1.0 if n % 4 == 0 else 1.0 for n in range(PAIRS)])
    zero = np.zeros(PAIRS)
    told = found(pairs(lopsided, zero, lengths=lengths))["depends_on_length"]
    assert (told.figure, told.threshold) == (1.0, SPREAD)
    assert "100.0% [83.9, 100.0] where chosen minus rejected is +1 tokens" in told.text
    assert "where it is -2." in told.text
    assert "depends_on_length" not in found(pairs(even, zero, lengths=lengths))
    # By log-probability alone: shorter ones are likelier, which is no finding.
    assert "depends_on_length" not in found(pairs(lopsided, lengths=lengths))


def test_confidence() -> None:
    """Rewards are 0.1 * the margin. At 75 % right, log 3 = 1.1 would be calibrated."""
    over, under, right = (
        found(pairs(mixed(75, size), np.zeros(PAIRS))) for size in (100.0, 1.0, 10 * np.log(3))
    )
    assert "overconfident" in over
    assert "underconfident" not in over
    assert over["overconfident"].figure == pytest.approx(np.log(3) / 10, rel=1e-3)
    assert over["overconfident"].threshold == OVERCONFIDENT
    assert over["overconfident"].weight == "warning"
    assert under["underconfident"].figure == pytest.approx(10 * np.log(3), rel=1e-3)
    assert under["underconfident"].threshold == UNDERCONFIDENT
    assert "overconfident" not in under
    assert not {"overconfident", "underconfident"} & right.keys()
    assert not {"overconfident", "underconfident"} & found(pairs(mixed(75, 100.0))).keys()


def test_dropped_rows() -> None:
    def told(**dropped: int) -> dict[str, Finding]:
        return found(pairs(mixed(80), dropped={name.replace("_", " "): n for name, n in dropped.items()}))

    many = told(prompt_too_long=20, response_too_long=5)
    assert many["dropped_rows"].figure == pytest.approx(0.2)
    assert many["dropped_rows"].threshold == DROPPED
    assert "prompt too long 20, response too long 5" in many["dropped_rows"].text
    assert "dropped_rows" not in told(prompt_too_long=5)
    assert "dropped_rows" not in told()
    # What the user has asked for, and what is there once already, is no loss.
    wanted = {"filtered_by_where": 500, "beyond_limit": 500, "duplicate": 70, "moved_to_holdout": 90}
    assert "dropped_rows" not in told(**wanted)
    assert told(**wanted, malformed=25)["dropped_rows"].figure == pytest.approx(0.2)


def test_reasons_that_are_no_loss_are_the_receipts_own() -> None:
    from prefopt_cli.data import receipt
    from prefopt_cli.evaluation.findings import WANTED_AWAY

    assert set(WANTED_AWAY) <= {value for name, value in vars(receipt).items() if name.isupper()}


def test_few_prompts() -> None:
    few = found(pairs(mixed(30, total=49)))["few_prompts"]
    assert (few.figure, few.threshold) == (49.0, FEW_PROMPTS)
    assert "few_prompts" not in found(pairs(mixed(30, total=50)))
    # Fifty pairs of five prompts.
    assert found(pairs(mixed(30, total=50), prompts=[n % 5 for n in range(50)]))["few_prompts"].figure == 5


def test_overlap_with_the_training_data() -> None:
    scored = pairs(mixed(80), prompts=[n // 2 for n in range(PAIRS)])
    keys = [prompt_key(text) for text in scored.held_out.texts.values()]
    told = found(scored, {keys[0], keys[2], b"another"})["train_overlap"]
    assert (told.figure, told.threshold, told.weight) == (2.0, 0.0, "warning")
    assert "2 of the 50 prompts (4 pairs, 4.0%)" in told.text
    assert "train_overlap" not in found(scored, {b"another"})
    assert "train_overlap" not in found(scored)
