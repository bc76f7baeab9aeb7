"""Figures of sets that can be worked out by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau

from prefopt_cli.evaluation.figures import FEWEST, SetFigures, figures_of
from prefopt_cli.evaluation.held_out import prompt_key
from prefopt_cli.evaluation.scored import ScoredSet
from prefopt_cli.evaluation.targets import Reward
from tests.evaluation.plain import REWARD, made_up

POLICY = [[-10.0, -12.0], [-20.0, -18.0], [-9.0, -8.0], [-7.0, -7.0]]
REFERENCE = [[-11.0, -10.0], [-18.0, -19.0], [-9.0, -6.0], [-6.0, -8.0]]


def values(found: SetFigures) -> dict[str, float]:
    return {name: each.value for name, each in found.figures.items()}


def test_pairs_by_hand() -> None:
    """Log-prob margins 2, -2, -1, 0 of the policy; -1, 1, -3, 2 of the reference."""
    found = values(figures_of(made_up(POLICY, REFERENCE, reward=REWARD), None))
    assert found["accuracy/logp"] == (1 + 0 + 0 + 0.5) / 4
    assert found["reference/accuracy/logp"] == 0.5
    assert found["gain/accuracy/logp"] == (1 - 1 + 0 - 0.5) / 4
    assert found["margin/logp"] == pytest.approx(-0.25)
    assert found["reference/margin/logp"] == pytest.approx(-0.25)
    assert found["gain/margin/logp"] == pytest.approx(0)
    # Log-ratio margins: 3, -3, 2, -2.
    assert found["accuracy/reward"] == 0.5
    assert found["margin/reward"] == pytest.approx(0)
    # A tie of either is no flip.
    assert (found["flipped"], found["flipped/to_chosen"], found["flipped/to_rejected"]) == (0.5, 0.25, 0.25)
    assert found["change/chosen"] == pytest.approx((1 - 2 + 0 - 1) / 4)
    assert found["change/rejected"] == pytest.approx((-2 + 1 - 2 + 1) / 4)
    assert (found["logp/chosen"], found["logp/rejected"]) == (-46 / 4, -45 / 4)


def test_lengths_by_hand() -> None:
    lengths = [[4, 2], [5, 9], [3, 1], [7, 7]]
    found = figures_of(made_up(POLICY, lengths=lengths), None)
    told = values(found)
    assert (told["tokens/chosen"], told["tokens/rejected"]) == (19 / 4, 19 / 4)
    # -10/4 > -12/2, -20/5 < -18/9, -9/3 > -8/1, a tie.
    assert told["accuracy/logp_per_token"] == (1 + 0 + 1 + 0.5) / 4
    baselines = found.to_dict()["baselines"]
    assert baselines["length_only"]["rule"] == "longer"
    assert baselines["length_only"]["accuracy"]["value"] == (1 + 0 + 1 + 0.5) / 4
    # Accuracy by log-probability: 1, 0, 0, 1/2.
    assert baselines["gain/length_only"]["value"] == -0.25
    short = figures_of(made_up(POLICY, lengths=[[2, 4], [5, 9], [3, 1], [7, 7]]), None).to_dict()["baselines"]
    assert short["length_only"]["rule"] == "shorter"
    assert short["length_only"]["accuracy"]["value"] == (1 + 1 + 0 + 0.5) / 4
    assert short["gain/length_only"]["value"] == (0 - 1 + 0 + 0) / 4


@pytest.mark.parametrize(("swapped", "share"), [(0, 1.0), (10, 1.0), (4, 0.6), (5, 0.5)])
def test_the_majority_knows_the_words_and_not_the_preference(swapped: int, share: float) -> None:
    """Ten pairs of the same two responses; of some the other one is chosen."""
    one, other = [11, 12], [13]
    responses = [[other, one] if number < swapped else [one, other] for number in range(10)]
    scored = made_up([[-1.0, -2.0]] * 10, responses=responses)
    assert figures_of(scored, None).to_dict()["baselines"]["majority"]["accuracy"]["value"] == share


@pytest.mark.parametrize(
    ("reward", "reference", "expected"),
    [
        (Reward(0.5, "beta", relative=True, per_token=False), True, [0.5 * 3, 0.5 * -3, 0.5 * 2, 0.5 * -2]),
        (Reward(2.0, "alpha", relative=False, per_token=False), False, [4, -4, -2, 0]),
        (Reward(2.0, "alpha", relative=False, per_token=True), True, [4 / 5, -4 / 5, -2 / 5, 0]),
        (None, True, [2, -2, -1, 0]),
    ],
)
def test_the_main_score(reward: Reward | None, reference: bool, expected: list[float]) -> None:
    scored = made_up(POLICY, REFERENCE if reference else None, reward=reward)
    found = figures_of(scored, None)
    assert found.to_dict()["main"] == scored.main == ("reward" if reward else "logp")
    assert [each["margin"] for each in scored.records()] == pytest.approx(expected)
    assert found.figures[f"margin/{scored.main}"].value == pytest.approx(np.mean(expected))
    assert (found.calibration is None) == (reward is None)
    assert any(name.startswith(("change", "flipped", "gain/a")) for name in found.figures) == reference
    if found.calibration:
        margins = np.array(expected)
        assert found.calibration.log_loss.value == pytest.approx(np.log(1 + np.exp(-margins)).mean())
        assert found.calibration.brier.value == pytest.approx(((1 / (1 + np.exp(-margins)) - 1) ** 2).mean())
        assert sum(each.pairs for each in found.calibration.bins) == len(expected)


def test_a_relative_reward_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        figures_of(made_up(POLICY, reward=REWARD), None)


def random_pairs(size: int, spread: int) -> ScoredSet:
    draw = np.random.default_rng(size)
    return made_up(
        draw.normal(-20, 5, (size, 2)).tolist(),
        draw.normal(-20, 5, (size, 2)).tolist(),
        lengths=(20 + draw.integers(-spread, spread + 1, (size, 2))).tolist(),
        prompts=draw.integers(0, max(1, size // 2), size).tolist(),
        reward=REWARD,
    )


@pytest.mark.parametrize("size", [1, 7, 24, 63])
@pytest.mark.parametrize("spread", [1, 15])
def test_buckets_of_length_cover_every_pair_once(size: int, spread: int) -> None:
    scored = random_pairs(size, spread)
    found = figures_of(scored, None)
    differences = scored.margins(scored.tokens)
    reward = scored.margins(scored.scores["reward"])
    buckets = found.buckets
    assert sum(each.pairs for each in buckets) == size
    assert all(a.high < b.low for a, b in itertools.pairwise(buckets))
    assert (buckets[0].low, buckets[-1].high) == (differences.min(), differences.max())
    assert all(each.pairs >= min(FEWEST, size) for each in buckets)
    assert 1 <= len(buckets) <= 5
    longer = (np.sign(differences) + 1) / 2
    rule = longer if found.longer else 1 - longer
    for each in buckets:
        inside = (differences >= each.low) & (differences <= each.high)
        assert inside.sum() == each.pairs
        assert each.prompts == len(set(scored.clusters[inside].tolist()))
        assert each.accuracy.value == pytest.approx((reward[inside] > 0).mean())
        assert each.length_only.value == pytest.approx(rule[inside].mean())


def test_buckets_of_many_different_lengths_are_of_about_equal_size() -> None:
    scored = made_up([[-1.0, -2.0]] * 100, lengths=[[n + 1, 50] for n in range(100)])
    assert [each.pairs for each in figures_of(scored, None).buckets] == [20] * 5


def test_lists_by_hand() -> None:
    """Kendall's tau-b by scipy, and how often the highest score is a best response. A pair is no list."""
    draw = np.random.default_rng(3)
    ranks = [[0, 1, 2], [0, 0, 1, 2], [0, 1], [0, 1, 1, 1], [0, 0, 1, 1, 1]]
    logps = [draw.integers(-6, 0, len(row)).astype(float).tolist() for row in ranks]
    reference = [draw.normal(-5, 2, len(row)).tolist() for row in ranks]
    lengths = [draw.integers(1, 9, len(row)).tolist() for row in ranks]
    scored = made_up(logps, reference, ranks=ranks, lengths=lengths, reward=REWARD)
    found = figures_of(scored, None)
    assert found.ranking is not None
    assert (found.ranking.rows, found.ranking.responses) == (4, 16)
    assert found.ranking.chance == pytest.approx((1 / 3 + 2 / 4 + 1 / 4 + 2 / 5) / 4)
    rows = [n for n in range(5) if n != 2]
    scores = {
        "logp": [np.array(logps[n]) for n in rows],
        "logp_per_token": [np.array(logps[n]) / lengths[n] for n in rows],
        "reward": [0.1 * (np.array(logps[n]) - reference[n]) for n in rows],
    }
    for name, listed in scores.items():
        taus = [kendalltau(each, -np.array(ranks[n])).statistic for n, each in zip(rows, listed, strict=True)]
        assert found.ranking.kendall_tau[name].value == pytest.approx(np.nanmean(taus))
        hits = [
            np.mean(np.array(ranks[n])[each == each.max()] == 0) for n, each in zip(rows, listed, strict=True)
        ]
        assert found.ranking.best_of_n[name].value == pytest.approx(np.mean(hits))
    # Every two responses of unlike ranks are a pair: 3 + (2 + 2 + 1) + 1 + 3 + 6.
    assert found.pairs == 18
    own = [(record["id"], *record["responses"]) for record in scored.records()]
    assert len(set(own)) == 18
    by_id = {f"row-{number}": listed for number, listed in enumerate(ranks)}
    assert all(by_id[name][better] < by_id[name][worse] for name, better, worse in own)


def test_pairs_alone_have_no_ranking() -> None:
    found = figures_of(made_up(POLICY), None)
    assert found.ranking is None
    assert found.to_dict()["lists"] == 0


def test_lists_that_a_score_cannot_order() -> None:
    """Policy and reference agree: every reward is 0, and tau is not defined in any row."""
    logps = [[-1.0, -2.0, -3.0], [-2.0, -1.0, -5.0]]
    found = figures_of(made_up(logps, logps, reward=REWARD), None)
    assert found.ranking is not None
    assert found.ranking.kendall_tau.keys() == {"logp", "logp_per_token"}
    assert found.ranking.kendall_tau["logp"].value == pytest.approx((1 + 1 / 3) / 2)
    assert found.ranking.best_of_n["reward"].value == pytest.approx(1 / 3)


def test_pairs_of_a_prompt_are_resampled_together() -> None:
    """Twenty copies of one prompt's pairs say no more than the prompt does."""
    alone = made_up(POLICY * 5)
    together = made_up(POLICY * 5, prompts=[0, 1, 2, 3] * 5)
    apart, clustered = (figures_of(each, None).figures["margin/logp"] for each in (alone, together))
    assert apart.value == clustered.value
    assert clustered.high - clustered.low > 1.5 * (apart.high - apart.low)
    assert figures_of(together, None).prompts == 4


def test_prompts_that_the_training_data_has_are_counted() -> None:
    scored = made_up([[-1.0, -2.0, -3.0], [-2.0, -1.0], [-2.0, -1.0], [-1.0, -3.0]], prompts=[0, 1, 1, 2])
    keys = {name: prompt_key(text) for name, text in scored.held_out.texts.items()}
    assert keys["row-1"] == keys["row-2"]
    assert figures_of(scored, None).to_dict()["train_overlap"] is None
    assert figures_of(scored, set()).to_dict()["train_overlap"] == {"prompts": 0, "pairs": 0}
    assert figures_of(scored, {keys["row-1"], b"other"}).overlap == {"prompts": 1, "pairs": 2}
    assert figures_of(scored, {keys["row-0"], keys["row-3"]}).overlap == {"prompts": 2, "pairs": 4}


def test_a_prompt_is_the_same_as_text_and_as_messages() -> None:
    text = made_up([[-1.0, -2.0]]).held_out.texts["row-0"]
    chat = replace(text, prompt=[{"role": "user", "content": "prompt 0"}])
    plain = replace(text, prompt=" prompt 0\n")
    assert prompt_key(plain) == prompt_key(text)
    assert prompt_key(replace(text, prompt="prompt 1")) != prompt_key(text)
    assert prompt_key(chat) == prompt_key(replace(chat, prompt=[{"role": "user", "content": "prompt 0 "}]))


def test_every_key_of_the_summary() -> None:
    logps = [[-1.0, -2.0, -3.0], [-2.0, -1.0], [-2.0, -1.5]]
    scored = made_up(logps, [[-1.5, -1.0, -2.0], [-1.0, -1.0], [-1.0, -2.0]], reward=REWARD, dropped={"x": 2})
    found = figures_of(scored, set(), ("a note",)).to_dict()
    assert {name: found[name] for name in ("data", "rows", "pairs", "prompts", "lists", "dropped", "notes")} == {
        "data": "ab12", "rows": 3, "pairs": 5, "prompts": 3, "lists": 1, "dropped": {"x": 2}, "notes": ["a note"],
    }  # fmt: skip
    assert not any(name.startswith("baseline") for name in found["figures"])
    assert found["calibration"].keys() >= {"ece", "ece_if_calibrated", "log_loss", "brier", "scale", "bins"}
    assert found["by_length"][0].keys() == {"from", "to", "pairs", "prompts", "accuracy", "length_only"}
    assert found["ranking"].keys() == {"rows", "responses", "kendall_tau", "best_of_n", "best_of_n_chance"}
    for each in found["figures"].values():
        assert all(math.isfinite(each[part]) for part in ("value", "low", "high"))
