"""The figures of a score by hand: a bench whose policies say and think what the test wants."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.labels import labels
from prefopt_cli.evaluation.statistics import mean_with_interval
from prefopt_cli.sandbox import bench
from prefopt_cli.sandbox.bench import Bench, Score, Seen
from prefopt_cli.sandbox.grammar import CHOICES, Prompt, draw_prompts, reply_text
from prefopt_cli.sandbox.measure import Measured
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.plan import Plan, ScoreSettings
from prefopt_cli.sandbox.rewards import gold_rewards, reward_table
from prefopt_cli.sandbox.sampling import Sample
from prefopt_cli.sandbox.score import Report
from prefopt_cli.sandbox.targets import NamedTarget, closed_form, log_normalised
from prefopt_cli.sandbox.world import PoolRow

PROMPTS = draw_prompts(3, Random(0))
KIND, RUDE = " Hello. We will refund your order.", " What is it now? We will refund your order."
BASE_LOGPS = log_normalised(np.random.default_rng(0).normal(size=len(CHOICES)))


def measured(rewards: list[list[float]], kl: float = 0.0) -> Measured:
    """Samples with these rewards, by prompt, in every dimension; the first sample of a prompt is malformed."""
    shape = (len(rewards), len(rewards[0]))
    return Measured(
        samples=[
            [Sample(prompt, " Nonsense" if not n else KIND, ()) for n in range(shape[1])]
            for prompt in PROMPTS[: shape[0]]
        ],
        rewards={name: np.array(rewards) for name in DIMENSIONS},
        well_formed=np.array([[float(n > 0) for n in range(shape[1])]] * shape[0]),
        entropy=np.full(shape, 2.0),
        kl=np.full(shape, kl),
        distinct=np.ones(shape[0]),
    )


def seen(
    name: str,
    rewards: list[list[float]],
    margin: tuple[float, ...] = (1.0, -1.0),
    distances: tuple[float, ...] = (),
) -> Seen:
    """A policy with these margins on held-out pairs, where the base policy has 2 and -2."""
    return Seen(name, measured(rewards), np.array(margin), np.array([2.0, -2.0]), ["p", "q"], list(distances))


BASE = seen("sandbox:base", [[0.0, 1.0], [2.0, 2.0]], (2.0, -2.0))


def test_win_rate_by_hand() -> None:
    """Every sample against every sample of the opponent to the same prompt; a tie is half a win."""
    policy = seen("run", [[1.0, 2.0], [2.0, 0.0]])
    won = policy.score(BASE).win_rates["helpful"]
    # First prompt: 1 beats 0 and ties with 1, 2 beats both: 3.5 of 4. Second: 2 ties twice, 0 loses twice: 1 of 4.
    assert won.value == pytest.approx((3.5 / 4 + 1 / 4) / 2)
    # Drawing two of two prompts again gives at least the worse and at most the better.
    assert (won.low, won.high) == pytest.approx((1 / 4, 3.5 / 4))


def test_means_and_differences_by_hand() -> None:
    policy = seen("run", [[1.0, 2.0], [2.0, 0.0]])
    scored = policy.score(BASE)
    assert scored.figures["reward/polite"].value == pytest.approx((1.5 + 1.0) / 2)
    assert scored.changes["reward/polite"] == pytest.approx((0.0, -1.0, 1.0))
    assert scored.figures["well_formed"].value == 0.5
    assert set(scored.changes) == set(scored.figures)


def test_the_base_policy_against_itself() -> None:
    scored = BASE.score(BASE)
    assert all(won == (0.5, 0.5, 0.5) for won in scored.win_rates.values())
    assert all(change == (0.0, 0.0, 0.0) for change in scored.changes.values())
    assert scored.figures["heldout/reward_accuracy"] == (0.5, 0.5, 0.5)
    marks = scored.to_dict()
    assert not any(each["significant"] for kind in ("changes", "win_rates") for each in marks[kind].values())


def test_samples_of_a_prompt_do_not_narrow_the_interval() -> None:
    draw = np.random.default_rng(0)
    few = draw.normal(size=(3, 2)).tolist()
    many = np.repeat(few, 50, axis=1).tolist()
    one, other = (seen("run", rewards).score().figures["reward/helpful"] for rewards in (few, many))
    assert other == pytest.approx(one)


def test_heldout_accuracies_by_hand() -> None:
    """Margins 3, -1, -2 where the base has 2, -2, -2: log-probabilities get one of three right, implicit
    rewards (1, 1, 0) two and a tie."""
    policy = Seen(
        "run",
        measured([[0.0]]),
        np.array([3.0, -1.0, -2.0]),
        np.array([2.0, -2.0, -2.0]),
        ["p", "q", "q"],
        [],
    )
    figures = policy.score().figures
    assert figures["heldout/logp_accuracy"].value == pytest.approx(1 / 3)
    assert figures["heldout/reward_accuracy"].value == pytest.approx(2.5 / 3)
    by_prompt = mean_with_interval([1.0, 1.0, 0.5], ["p", "q", "q"])
    assert figures["heldout/reward_accuracy"] == by_prompt != mean_with_interval([1.0, 1.0, 0.5])


def test_total_variation_falls() -> None:
    rewards = [[0.0, 1.0], [2.0, 2.0]]
    near, far = seen("run", rewards, distances=(0.1, 0.2)), seen("base", rewards, distances=(0.6, 0.6))
    change = near.score(far).changes["total_variation"]
    assert change.value == pytest.approx(-0.45)
    assert change.excludes(0.0)
    assert "total_variation" not in BASE.score().figures


class World:
    """A world of which only the held-out prompts are looked at."""

    base = Path("base")
    rows = tuple(PoolRow(prompt, (KIND, RUDE, RUDE, KIND)) for prompt in PROMPTS)

    def pool(self, split: str) -> list[PoolRow]:
        """Three prompts."""
        assert split == "test"
        return list(self.rows)


@pytest.fixture
def make_bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """A bench on which a policy is its name: ``optimum`` follows the target, others the base policy."""

    def target_logps(prompts: list[Prompt]) -> np.ndarray:
        target = closed_form_of_the_run()
        return np.array(
            [target.distribution(BASE_LOGPS, reward_table(each.problem, "polite")) for each in prompts]
        )

    def exact(model: str, tokenizer: Any, prompts: list[Prompt], *rest: Any) -> np.ndarray:
        return target_logps(prompts) if model == "optimum" else np.array([BASE_LOGPS for _ in prompts])

    def margin(model: str, tokenizer: Any, texts: list[tuple[str, str]]) -> np.ndarray:
        return np.array([float(text == KIND) for _, text in texts]) * (1.0 if model == "optimum" else 0.5)

    looked: list[str] = []
    seeds: list[int] = []

    def look(model: str, base: str, tokenizer: Any, prompts: list[Prompt], count: int, **rest: Any) -> Any:
        looked.append(model)
        seeds.append(rest["seed"])
        return measured([[float(model == "optimum")] * count] * len(prompts))

    monkeypatch.setattr(bench, "load_policy", lambda name: (Path(name).name, None))
    monkeypatch.setattr(bench, "exact_logps", exact)
    monkeypatch.setattr(bench, "text_logps", margin)
    monkeypatch.setattr(bench, "measure", look)

    def make(target: NamedTarget | None = None, **settings: Any) -> Bench:
        plan = Plan(
            ("optimum",),
            "sandbox:base",
            PreferencesName("polite"),
            target,
            None,
            ScoreSettings(**{"prompts": 2, "per_prompt": 2, "exact_prompts": 2, **settings}),
        )
        made = Bench(World(), plan)  # type: ignore[arg-type]
        made.looked, made.seeds = looked, seeds  # type: ignore[attr-defined]
        return made

    return make


def closed_form_of_the_run() -> NamedTarget:
    """Of logistic at beta 0.5."""
    from prefopt_cli.recipe.schema import GPOSettings

    target = closed_form(GPOSettings(name="gpo", loss="logistic", beta=0.5), 1.0)
    assert target is not None
    return target


def test_the_optimum_is_no_distance_from_its_target(make_bench: Callable[..., Bench]) -> None:
    made = make_bench(closed_form_of_the_run())
    base, optimum = made.look_at("sandbox:base"), made.look_at("optimum")
    assert optimum.distances == pytest.approx([0.0, 0.0], abs=1e-12)
    assert min(base.distances) > 0.1
    assert optimum.score(base).changes["total_variation"].high < 0


def test_nothing_is_looked_at_twice(make_bench: Callable[..., Bench]) -> None:
    made = make_bench()
    first = made.look_at("sandbox:base")
    assert made.look_at("sandbox:base/seed=0") is first
    made.look_at("optimum")
    assert made.look_at("./optimum") is made.look_at("optimum")
    assert made.looked == ["base", "optimum"]  # type: ignore[attr-defined]
    assert first.distances == []


def test_the_opponent_is_sampled_by_itself(make_bench: Callable[..., Bench]) -> None:
    """With one stream for both, their replies would go together and wins would not be of independent samples."""
    for seed in (0, 1):
        made = make_bench(seed=seed)
        made.look_at("sandbox:base")
        made.look_at("optimum")
        made.look_at("another")
    opponent, policy, same, other_opponent, other_policy, _ = made.seeds  # type: ignore[attr-defined]
    assert policy == same
    assert len({opponent, policy, other_opponent, other_policy}) == 4


def test_attainable_accuracy_by_hand(make_bench: Callable[..., Bench]) -> None:
    """Polite compares replies 0 with 2 and 1 with 3: kind with rude in both pairs of all three prompts."""
    made = make_bench()
    assert len(made.heldout) == 6
    agreeing = sum(row["chosen"] == KIND for row in made.heldout)
    assert made.attainable() == agreeing / 6
    # A policy that prefers what is kind is as good as the gold reward; so the stub's log-probabilities are.
    figures = made.look_at("optimum").score().figures
    assert figures["heldout/logp_accuracy"].value == pytest.approx(agreeing / 6)
    assert figures["heldout/reward_accuracy"].value == pytest.approx(agreeing / 6)


def test_labels_between_equals_are_half_attainable(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "rows", tuple(PoolRow(prompt, (KIND,) * 4) for prompt in PROMPTS))
    assert make_bench().attainable() == 0.5


def test_a_bench_has_as_many_prompts_as_its_world(make_bench: Callable[..., Bench]) -> None:
    assert len(make_bench(prompts=3).prompts) == 3
    with pytest.raises(UserError, match=r"has 3 held-out prompts, not 4\."):
        make_bench(prompts=4)


def report(*policies: Score, opponent: Score | None = None) -> Report:
    """A report on made-up scores."""
    return Report(
        seed=0,
        dimension="helpful",
        temperature=1.0,
        settings=ScoreSettings(2, 2, 0),
        target=None,
        target_note="no prompt's replies were enumerated",
        attainable=0.75,
        opponent=opponent or BASE.score(),
        policies=list(policies),
        prompts=PROMPTS[:2],
    )


def test_json_is_valid_and_complete() -> None:
    policy = seen("runs/a", [[1.0, 2.0], [2.0, 0.0]]).score(BASE)
    text = json.dumps(report(policy).to_dict(), allow_nan=False)
    found = json.loads(text)
    assert set(found["policies"]) == {"sandbox:base", "runs/a"}
    metrics = {f"reward/{name}" for name in DIMENSIONS}
    metrics |= {"kl", "entropy", "distinct", "well_formed"}
    metrics |= {"heldout/logp_accuracy", "heldout/reward_accuracy"}
    own = found["policies"]["runs/a"]
    assert set(own["figures"]) == set(own["changes"]) == metrics
    assert set(own["win_rates"]) == set(DIMENSIONS)
    assert set(own["win_rates"]["polite"]) == {"value", "low", "high", "significant"}
    assert found["policies"]["sandbox:base"]["changes"] == {}


def test_a_policy_that_is_its_own_opponent_keeps_its_comparison() -> None:
    found = report(BASE.score(BASE)).to_dict()
    assert list(found["policies"]) == ["sandbox:base"]
    assert found["policies"]["sandbox:base"]["win_rates"]["helpful"]["value"] == 0.5


def test_sample_replies_are_the_first_ones() -> None:
    policy = seen("runs/a", [[1.0, 2.0], [2.0, 0.0]]).score(BASE)
    shown = report(policy).shown(1)
    assert [prompt for prompt, _ in shown] == PROMPTS[:1]
    assert [reply.policy for reply in shown[0][1]] == ["sandbox:base", "runs/a"]
    assert not shown[0][1][0].well_formed
    (one, two) = report(BASE.score(BASE)).samples_dict(2)
    assert [len(each["replies"]) for each in (one, two)] == [1, 1]
    assert one["prompt"] == PROMPTS[0].text
    worth = Score("runs/b", {}, samples=[[reply_text(PROMPTS[0], CHOICES[7])]])
    ((_, (_, reply)),) = report(worth).shown(1)
    assert reply.well_formed
    assert reply.rewards == gold_rewards(PROMPTS[0], CHOICES[7])


def test_short_names() -> None:
    assert labels(["runs/a", "runs/b/", "sandbox:base"]) == {
        "runs/a": "a",
        "runs/b/": "b",
        "sandbox:base": "sandbox:base",
    }
    assert labels(["x/run", "y/run"]) == {"x/run": "x/run", "y/run": "y/run"}
