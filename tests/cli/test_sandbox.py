"""`prefopt sandbox` as a person uses it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from prefopt_cli.sandbox import world
from prefopt_cli.sandbox.facts import describe
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.preferences import pairs
from prefopt_cli.sandbox.world import World, world_folder
from tests.cli.conftest import Prefopt
from tests.sandbox.build import TINY, replace_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(folder))
    return folder


@pytest.fixture
def quick_world(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the world that the commands build lies: a tiny one, of another name, in an empty cache."""
    for function in (world.open_world, world.find_world, world.world_folder):
        monkeypatch.setattr(function, "__defaults__", (TINY, *(function.__defaults__ or ())[1:]))
    return world_folder(0)


def test_build_makes_the_world_once(prefopt: Prefopt, quick_world: Path) -> None:
    first = prefopt("sandbox", "build")
    assert first.code == 0, first.err
    assert re.search(rf"^Built in \d+ s, \d+\.\d MB: {re.escape(str(quick_world))}$", first.out, re.MULTILINE)
    assert first.out.splitlines()[-1] == "Next: prefopt sandbox sample sandbox:base"
    assert first.err == ""
    assert (quick_world / "base" / "model.safetensors").is_file()
    again = prefopt("sandbox", "build")
    assert again.out.startswith("It was already there")
    found = json.loads(prefopt("sandbox", "build", "--json").out)
    size = sum(path.stat().st_size for path in quick_world.rglob("*") if path.is_file())
    assert found == {"seed": 0, "folder": str(quick_world), "bytes": size, "seconds": None}
    (quick_world / "mark").write_text("of the old one")
    rebuilt = json.loads(prefopt("sandbox", "build", "--rebuild", "--json").out)
    assert rebuilt["seconds"] > 0
    assert rebuilt["bytes"] == size


def test_build_where_nothing_can_be_written(prefopt: Prefopt, cache: Path) -> None:
    cache.write_text("no folder")
    result = prefopt("sandbox", "build")
    assert result.code == 1
    assert "PREFOPT_CACHE" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build", "--seed", "-1"), "--seed"),
        (("build", "--seed", "one"), "--seed"),
        (("info", "--seed", str(2**32)), "--seed"),
        (("sample", "--prompts", "0"), "--prompts"),
        (("sample", "--prompts", "-3"), "--prompts"),
        (("sample", "--per-prompt", "-1"), "--per-prompt"),
        (("sample", "--seed", "-1"), "--seed"),
        (("sample", "sandbox:bass"), "the sandbox's only model is sandbox:base"),
        (("sample", "sandbox:polite"), "sandbox:polite is a dataset"),
        (("sample", "runs/none"), "There is no folder runs/none"),
        (("sample", "/nowhere/at/all"), "there is no folder /nowhere/at/all"),
        (("sample", ""), "has no name"),
    ],
)
def test_wrong_values_build_nothing(
    prefopt: Prefopt, cache: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = prefopt("sandbox", *arguments)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert "model.name_or_path" not in result.err
    assert not cache.exists()


def test_a_policy_of_another_language_is_refused(prefopt: Prefopt, tiny_world: Path, cache: Path) -> None:
    result = prefopt("sandbox", "sample", str(tiny_world / "model"))
    assert result.code == 2
    assert str(tiny_world / "model") in result.err
    assert "tokenizer" in result.err
    assert not cache.exists()


def test_info_before_anything_is_built(prefopt: Prefopt, cache: Path) -> None:
    result = prefopt("sandbox", "info", "--seed", "3")
    assert result.code == 0
    for part in (
        "460,800 prompts",
        "2,304 well-formed replies",
        "polite against concise",
        "at most 5,000 pairs",
    ):
        assert part in result.out
    assert result.out.splitlines()[-1].endswith("prefopt sandbox build --seed 3")
    assert "best accuracy" not in result.out
    assert "…" not in result.out
    found = json.loads(prefopt("sandbox", "info", "--json").out)
    assert (found["built"], found["bytes"], found["labels"]) == (False, None, {})
    assert found["rows"]["test"] == {"prompts": 500, "pairs": 1000, "lists": 500, "list_length": 4}
    assert set(found["dimensions"]) == set(DIMENSIONS)
    assert found["dimensions"]["polite"]["best"]["reward"] == found["dimensions"]["polite"]["most"] == 3.2
    assert found["conflicts"]["polite/concise"] > 0.4
    assert set(found["versions"]) == {"prefopt", "torch", "transformers", "tokenizers"}
    assert not cache.exists()


def test_info_of_a_finished_world(prefopt: Prefopt, quick_world: Path) -> None:
    """By hand: three prompts with known replies in the place of what a policy said."""
    assert prefopt("sandbox", "build").code == 0
    rows = [json.loads(line) for line in (quick_world / "test.jsonl").read_text().splitlines()][:3]
    kind, rude = " Hello. We will refund your order.", " What is it now? We will refund your order."
    for row in rows:
        row["replies"] = [kind, rude, kind, kind.replace("order", row["prompt"]["item"])]
    replace_rows(quick_world, "test", rows)
    found = describe(0, TINY)
    assert found.is_built
    assert (found.rows["test"].prompts, found.rows["test"].pairs) == (3, 6)
    polite = found.labels["polite"]
    # Kind is worth 0.4, rude -0.8; every second pair is of two that are equally polite.
    assert polite.mean == pytest.approx((3 * 0.4 - 0.8) / 4)
    assert polite.std == pytest.approx(1.2 * (3 / 16) ** 0.5)
    assert polite.equal == pytest.approx(1 / 2)
    labelled = pairs(World(quick_world, 0).pool("test"), "test", PreferencesName("polite"))
    agreeing = sum(row["chosen_gold"]["polite"] > row["rejected_gold"]["polite"] for row in labelled)
    assert polite.agree == pytest.approx(agreeing / 6)
    assert polite.best_accuracy == pytest.approx(agreeing / 6 + 1 / 4)


@pytest.mark.slow
def test_info_of_the_standard_world(prefopt: Prefopt, sandbox: World) -> None:
    result = prefopt("sandbox", "info")
    assert result.code == 0
    assert f"built: {sandbox.folder}" in result.out
    assert "at most" not in result.out
    assert "…" not in result.out
    found = json.loads(prefopt("sandbox", "info", "--json").out)
    for dimension in DIMENSIONS:
        labels = found["labels"][dimension]
        # Noisy enough to be a task, and far from a coin's.
        assert 0.65 < labels["best_accuracy"] < 0.9
        assert labels["agree"] < labels["best_accuracy"] <= labels["agree"] + labels["equal"]
        assert labels["std"] > 0.5


@pytest.mark.slow
def test_sample_prints_replies_with_their_rewards(prefopt: Prefopt, sandbox: World) -> None:
    result = prefopt("sandbox", "sample", "--prompts", "2", "--per-prompt", "3")
    assert result.code == 0, result.err
    prompts = [row.prompt.text for row in sandbox.pool("test")[:2]]
    assert all(prompt in result.out for prompt in prompts)
    assert result.out.count("helpful  polite  concise  reply") == 2
    assert len(re.findall(r"^ +-?\d\.\d\d +-?\d\.\d\d +-?\d\.\d\d  \S", result.out, re.MULTILINE)) == 6
    assert "Mean of 6 replies: helpful" in result.out
    assert result.err == ""


@pytest.mark.slow
def test_sample_as_json(prefopt: Prefopt, sandbox: World, tmp_path: Path) -> None:
    options = ("--prompts", "4", "--per-prompt", "2", "--json")
    found = json.loads(prefopt("sandbox", "sample", *options).out)
    assert [len(one["replies"]) for one in found["prompts"]] == [2] * 4
    replies = [reply for one in found["prompts"] for reply in one["replies"]]
    for dimension in DIMENSIONS:
        mean = sum(reply["rewards"][dimension] for reply in replies) / len(replies)
        assert found["means"][dimension] == pytest.approx(mean)
    assert found["well_formed"] == sum(reply["well_formed"] for reply in replies) / len(replies)
    # A copy of the policy in a folder of its own says the same, another seed something else.
    copy = shutil.copytree(sandbox.base, tmp_path / "copy")
    again = json.loads(prefopt("sandbox", "sample", str(copy), *options).out)
    assert {**again, "policy": "sandbox:base"} == found
    other = json.loads(prefopt("sandbox", "sample", *options, "--seed", "1").out)
    assert other["prompts"] != found["prompts"]


@pytest.mark.slow
def test_sample_has_only_so_many_prompts(prefopt: Prefopt, sandbox: World) -> None:
    count = len(sandbox.pool("test"))
    result = prefopt("sandbox", "sample", "--prompts", str(count + 1))
    assert result.code == 2
    assert result.err == f"prefopt: The sandbox has {count} held-out prompts, not {count + 1}.\n"
