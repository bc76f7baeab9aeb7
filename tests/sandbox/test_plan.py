"""What can be scored, and the refusals that come before all work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.sandbox.names import PreferencesName
from prefopt_cli.sandbox.plan import ScoreSettings, plan_score
from tests.sandbox.build import write_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in which nothing may appear."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(folder))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(write_run(tmp_path / "run"))


def test_what_is_taken_for_granted(run: str, cache: Path) -> None:
    plan = plan_score([run])
    assert plan.policies == (run,)
    assert plan.opponent == "sandbox:base"
    assert plan.preferences == PreferencesName("helpful")
    assert plan.target is not None
    assert plan.target.name == "pi_base exp(2 r)"
    assert plan.settings.prompts == 300
    assert not cache.exists()


def test_the_world_is_that_of_the_runs(tmp_path: Path) -> None:
    """Labels are of the world on which the policy is judged, even if it learned from those of another."""
    own = write_run(tmp_path / "own", "sandbox:base/seed=4", "sandbox:polite/seed=4/temperature=2")
    plan = plan_score([str(own)])
    assert (plan.opponent, plan.seed) == ("sandbox:base/seed=4", 4)
    assert plan.preferences == PreferencesName("polite", 2.0, 4)
    foreign = plan_score([str(write_run(tmp_path / "foreign", "sandbox:base/seed=4", "sandbox:polite"))])
    assert foreign.preferences == PreferencesName("polite", 1.0, 4)
    assert foreign.target is None


def test_another_dimension_has_no_closed_form(run: str) -> None:
    plan = plan_score([run], dimension="polite")
    assert plan.preferences == PreferencesName("polite")
    assert (plan.target, plan.target_note) == (
        None,
        "the policy was not trained on this world's polite alone",
    )


def test_a_target_of_ones_own(run: str) -> None:
    plan = plan_score([run], dimension="polite", target="softmax:0.5")
    assert plan.target is not None
    assert plan.target.name == "softmax(r / 0.5)"


def test_why_there_is_no_closed_form(run: str, tmp_path: Path) -> None:
    hinge = write_run(tmp_path / "hinge", method="{name: gpo, loss: hinge}")
    chained = write_run(tmp_path / "chained", run)
    for name, said in {
        str(hinge): "hinge has no closed form",
        str(chained): "runs that start from the base policy",
        "sandbox:base": "was not trained by a method",
    }.items():
        plan = plan_score([name], dimension="helpful")
        assert plan.target is None
        assert said in (plan.target_note or "")
    nothing = plan_score([run], settings=ScoreSettings(exact_prompts=0))
    assert (nothing.target, nothing.target_note) == (None, "no prompt's replies were enumerated")


def test_the_optimum_of_soft_knows_no_base_policy(tmp_path: Path) -> None:
    free = write_run(tmp_path / "free", method="{name: soft, alpha: 0.5, kl_coef: 0}")
    plan = plan_score([str(free)])
    assert plan.target is not None
    assert plan.target.name == "softmax(r / 0.5)"
    method = "{name: soft, alpha: 0.5, kl_coef: 0}"
    noisy = write_run(tmp_path / "noisy", preferences="sandbox:polite/temperature=3", method=method)
    plan = plan_score([str(noisy)])
    assert plan.target is not None
    assert plan.target.name == "softmax(r / 1.5)"


def test_soft_with_kl_has_no_closed_form_but_takes_any_target(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "held", method="{name: soft, alpha: 0.5}"))
    plan = plan_score([run])
    assert plan.target is None
    assert "soft" in (plan.target_note or "")
    plan = plan_score([run], target="softmax:0.5")
    assert plan.target is not None


def test_the_first_run_that_was_trained_decides(run: str, tmp_path: Path) -> None:
    polite = str(write_run(tmp_path / "polite", preferences="sandbox:polite"))
    plan = plan_score(["sandbox:base", polite, run])
    assert plan.preferences.dimension == "polite"
    assert plan.target is not None
    assert plan.target.name.endswith(f"(closed form of {polite})")


def test_the_opponent_may_be_any_policy_of_the_world(run: str, tmp_path: Path) -> None:
    other = str(write_run(tmp_path / "other"))
    assert plan_score([run], against=other).opponent == other
    assert plan_score([run], against=run).opponent == run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "closed-from"}, "Did you mean closed-form?"),
        ({"target": "softmx:1"}, "--target softmx:1: there is no such target; there are closed-form"),
        ({"target": ""}, "there is no such target"),
        ({"target": "softmax"}, "Did you mean softmax:ALPHA?"),
        ({"target": "softmax:"}, "needs a number"),
        ({"target": "softmax:warm"}, "needs a number"),
        ({"target": "softmax:0"}, "at least 1e-06"),
        ({"target": "softmax:-1"}, "at least 1e-06"),
        ({"target": "softmax:nan"}, "at least 1e-06"),
        ({"target": "softmax:inf"}, "at least 1e-06"),
        ({"dimension": "politte"}, "Did you mean polite?"),
        ({"dimension": "polite/temperature=2"}, "there is no such dimension"),
        ({"dimension": ""}, "there are helpful, polite, concise"),
        ({"against": "nowhere"}, "There is no run nowhere"),
        ({"against": ""}, "has no name"),
        ({"against": "sandbox:base/seed=1"}, "different worlds (seeds 0 and 1)"),
        ({"settings": ScoreSettings(prompts=501)}, "The sandbox has 500 held-out prompts, not 501."),
        ({"settings": ScoreSettings(prompts=10, exact_prompts=11)}, "The 11 prompts"),
    ],
)
def test_refusals(run: str, cache: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_score([run], **options)
    assert said in str(caught.value)
    assert not cache.exists()


def test_runs_that_do_not_go_together(run: str, tmp_path: Path) -> None:
    elsewhere = str(write_run(tmp_path / "elsewhere", "sandbox:base/seed=1"))
    unfinished = str(write_run(tmp_path / "unfinished", status="running"))
    for names, said in {
        (run, run): "is named twice.",
        (run, f"{run}/"): f"{run} is named twice, the second time as {run}/.",
        (run, elsewhere): "different worlds",
        (run, unfinished): "no finished policy",
        ("sandbox:base",): "choose what counts with --dimension: helpful, polite, concise",
        (): "at least one run",
    }.items():
        with pytest.raises(UserError) as caught:
            plan_score(names)
        assert said in str(caught.value)


def test_it_needs_nothing_heavy() -> None:
    """A mistyped name is refused at once."""
    program = (
        "import sys; from prefopt_cli.sandbox.plan import plan_score; from prefopt_cli.sandbox import results; "
        "print({'torch', 'transformers', 'datasets', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
