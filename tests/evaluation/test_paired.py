"""Several policies on the same pairs: differences, p-values and changed pairs that can be worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.paired import MEASURES, PairedSet, adjusted, paired_set
from prefopt_cli.evaluation.scored import ScoredSet
from tests.evaluation.plain import REWARD, made_up

FIRST = [[-10.0, -12.0], [-20.0, -18.0], [-9.0, -8.0], [-7.0, -7.0], [-5.0, -8.0]]
OTHER = [[-10.0, -13.0], [-17.0, -18.0], [-9.0, -9.0], [-7.0, -6.0], [-9.0, -8.0]]
BASE = [[-11.0, -11.0], [-20.0, -20.0], [-9.0, -9.0], [-7.0, -7.0], [-5.0, -6.0]]


def by_id(scored: ScoredSet) -> dict[str, float]:
    return {each["id"]: each["margin"] for each in scored.records()}


def test_differences_by_hand() -> None:
    """Margins by log-probability 2, -2, -1, 0, 3 of the first; 3, 1, 0, -1, -1 of the other."""
    found = paired_set("set", {"first": made_up(FIRST), "other": made_up(OTHER)})
    assert found.differences.keys() == {"other"}
    told = found.differences["other"]
    assert told.keys() == set(MEASURES)
    assert told["accuracy/main"].estimate.value == pytest.approx((0 + 1 + 0.5 - 0.5 - 1) / 5)
    assert told["accuracy/logp"].estimate == told["accuracy/main"].estimate
    assert told["margin/main"].estimate.value == pytest.approx((1 + 3 + 1 - 1 - 4) / 5)
    assert found.figures["first"]["accuracy/logp"].value == pytest.approx(2.5 / 5)
    assert found.figures["other"]["accuracy/logp"].value == pytest.approx(2.5 / 5)
    # Every pattern of signs of 1, 3, 1, -1, -4 gives 0 at least.
    assert told["margin/main"].p == 1.0
    assert found.left_out == 0
    assert not found.calibration


def test_p_values_by_enumeration() -> None:
    """Two of 2^5 patterns of signs are as far from zero as 1 + 2 + 1 + 3 + 2."""
    gains = [1, 2, 1, 3, 2]
    better = [[a + gain, b] for (a, b), gain in zip(FIRST, gains, strict=True)]
    told = paired_set("set", {"first": made_up(FIRST), "other": made_up(better)}).differences["other"]
    patterns = [abs(np.dot(signs, gains)) for signs in itertools.product((-1, 1), repeat=5)]
    assert told["margin/main"].p == pytest.approx(np.mean(np.array(patterns) >= 9)) == 2 / 32
    assert told["margin/main"].estimate.value == pytest.approx(9 / 5)
    # Two pairs of one prompt are flipped together.
    prompts = [0, 0, 1, 2, 3]
    clustered = paired_set(
        "set", {"first": made_up(FIRST, prompts=prompts), "other": made_up(better, prompts=prompts)}
    )
    assert clustered.differences["other"]["margin/main"].p == 2 / 16


def test_rewards_from_references_of_their_own() -> None:
    first, other = made_up(FIRST, BASE, reward=REWARD), made_up(OTHER, OTHER, reward=REWARD)
    found = paired_set("set", {"first": first, "other": other})
    told = found.differences["other"]
    # Log-ratio margins 2, -2, -1, 0, 2 of the first; the other is its own reference.
    assert told["margin/main"].estimate.value == pytest.approx(-0.1 * 1 / 5)
    assert told["accuracy/main"].estimate.value == pytest.approx((-0.5 + 0.5 + 0.5 + 0 - 0.5) / 5)
    assert found.calibration.keys() == {"first", "other"}
    # A tie is no change of sides.
    assert found.changes == {"other": ()}


def test_a_reward_and_a_log_probability_have_the_latter_in_common() -> None:
    """Margins by log-probability 2, -2, -1, 0, 3 and 3, 1, 0, -1, -1: one score for both."""
    found = paired_set("set", {"run": made_up(FIRST, BASE, reward=REWARD), "model": made_up(OTHER)})
    assert (found.main, found.margin) == ("logp", "logp")
    told = found.differences["model"]
    assert told["accuracy/main"].estimate.value == pytest.approx((0 + 1 + 0.5 - 0.5 - 1) / 5)
    assert told["margin/main"] == told["margin/logp"]
    assert found.calibration.keys() == {"run"}


def test_rewards_of_other_scales_have_no_margin_in_common() -> None:
    """Log-probabilities of twice the ratio under a tenth of beta: only in nats is the larger margin seen."""
    weak, strong = replace(REWARD, scale=0.01), REWARD
    first, other = made_up(FIRST, BASE, reward=strong), made_up(OTHER, BASE, reward=weak)
    found = paired_set("set", {"first": first, "other": other})
    assert (found.main, found.margin) == ("reward", "logp")
    told = found.differences["other"]
    assert told.keys() == {"accuracy/main", "accuracy/logp", "margin/logp"}
    assert told["margin/logp"].estimate.value == pytest.approx((1 + 3 + 1 - 1 - 4) / 5)


def test_changed_pairs_are_those_whose_sign_differs() -> None:
    draw = np.random.default_rng(1)
    ranks = [[0, 1], [0, 1, 2], [0, 0, 1], [0, 1]] * 5
    logps = [[draw.normal(0, 2, len(row)).tolist() for row in ranks] for _ in range(2)]
    first, other = (made_up(each, ranks=ranks) for each in logps)
    found = paired_set("set", {"first": first, "other": other}, seed=3)
    expected = {}
    for row, listed in enumerate(ranks):
        for a, b in itertools.permutations(range(len(listed)), 2):
            before, after = (each[row][a] - each[row][b] for each in logps)
            if listed[a] < listed[b] and before * after < 0:
                expected[row, (a, b)] = ("chosen" if after > 0 else "rejected", before, after)
    told = {
        (each.row, each.responses): (each.to, each.baseline_margin, each.margin)
        for each in found.changes["other"]
    }
    assert told.keys() == expected.keys()
    for place, (to, before, after) in expected.items():
        assert told[place] == (to, pytest.approx(before), pytest.approx(after))
    sizes = [abs(each.margin - each.baseline_margin) for each in found.changes["other"]]
    assert sizes == sorted(sizes, reverse=True)
    records = found.change_records("other", lambda ids: " ".join(map(str, ids)))
    assert len(records) == len(expected)
    assert len(found.change_records("other", str, limit=2)) == 2
    for record, change in zip(records, found.changes["other"], strict=True):
        tokens = first.held_out.tokens[change.row]["response_ids"]
        assert record["id"] == f"row-{change.row}"
        assert record["prompt"] == f"prompt {change.row}"
        assert [record["chosen"], record["rejected"]] == [
            " ".join(map(str, tokens[place])) for place in change.responses
        ]


def test_the_same_policy_twice() -> None:
    found = paired_set("set", {"first": made_up(FIRST), "again": made_up(FIRST)})
    for each in found.differences["again"].values():
        assert each.estimate == (0, 0, 0)
        assert each.p == 1.0
    assert found.changes["again"] == ()


def test_rows_that_not_all_were_asked_about_are_left_out() -> None:
    """By row id, wherever the rows stand."""
    ids = ["a", "b", "c", "d", "e"]
    first = made_up(FIRST, ids=ids, fingerprint="1")
    other = made_up([OTHER[3], OTHER[1], [-1.0, -2.0]], ids=["d", "b", "z"], fingerprint="2")
    found = paired_set("set", {"first": first, "other": other})
    assert found.left_out == 4  # a, c, e and z
    assert {label: by_id(each) for label, each in found.scored.items()} == {
        "first": {"b": -2, "d": 0},
        "other": {"b": 1, "d": -1},
    }
    assert [each.held_out.ids for each in found.scored.values()] == [["b", "d"], ["b", "d"]]
    told = found.differences["other"]
    assert told["margin/main"].estimate.value == pytest.approx((3 - 1) / 2)
    (change,) = found.change_records("other", str)
    assert (change["id"], change["to"], change["baseline_margin"], change["margin"]) == ("b", "chosen", -2, 1)


def test_the_same_rows_in_another_order() -> None:
    first = made_up(FIRST, ids=list("abcde"), fingerprint="1")
    other = made_up(OTHER[::-1], ids=list("edcba"), fingerprint="2")
    found = paired_set("set", {"first": first, "other": other})
    assert found.left_out == 0
    assert by_id(found.scored["other"]) == {"a": 3, "b": 1, "c": 0, "d": -1, "e": -1}
    assert found.differences["other"]["margin/main"].estimate.value == pytest.approx(0)
    assert [each.held_out.ids for each in found.scored.values()] == [list("abcde")] * 2


def test_lists_that_lost_other_responses_are_left_out() -> None:
    """Of three responses one policy could not take the first, the other not the last: both have ranks 0 and 1."""
    whole = [[0, 1, 2], [0, 1]]
    first = made_up(FIRST[:2], ranks=[[0, 1], [0, 1]], whole=whole, fingerprint="1")
    other = made_up(OTHER[:2], ranks=[[0, 1], [0, 1]], whole=whole, fingerprint="2")
    found = paired_set("set", {"first": first, "other": other})
    assert found.left_out == 1
    assert by_id(found.scored["first"]) == {"row-1": -2}
    # Policies of one tokenizer have lost the same ones.
    same = replace(other, held_out=replace(other.held_out, fingerprint="1"))
    assert paired_set("set", {"first": first, "other": same}).left_out == 0


def test_nothing_in_common() -> None:
    first, other = (made_up(FIRST, ids=list(ids), fingerprint=ids) for ids in ("abcde", "vwxyz"))
    with pytest.raises(UserError, match="eval set kind: no row is left that all policies can be asked about"):
        paired_set("kind", {"first": first, "other": other})


def test_p_values_are_adjusted_over_policies_and_sets() -> None:
    gains = {"one": [1, 2, 1, 3, 2], "two": [0, 2, 1, 3, -1], "three": [0, 0, 0, 0, 0]}

    def paired(name: str, shift: float) -> PairedSet:
        others = {
            label: made_up([[a + shift + gain, b] for (a, b), gain in zip(FIRST, listed, strict=True)])
            for label, listed in gains.items()
        }
        return paired_set(name, {"first": made_up(FIRST), **others})

    raw = {"x": paired("x", 0.0), "y": paired("y", 0.5)}
    found = adjusted(raw)
    for measure in MEASURES:
        places = [(name, label) for name in raw for label in gains]
        p = [raw[name].differences[label][measure].p for name, label in places]
        own = [found[name].differences[label][measure].p_holm for name, label in places]
        assert [found[name].differences[label][measure].p for name, label in places] == p
        highest = 0.0
        for rank, place in enumerate(sorted(range(6), key=p.__getitem__)):
            highest = max(highest, min(1.0, p[place] * (6 - rank)))
            assert own[place] == pytest.approx(highest)
    assert found["x"].changes == raw["x"].changes
