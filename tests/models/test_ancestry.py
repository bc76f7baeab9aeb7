"""The stages that a sequential run comes after: found, and refused where they do not follow one another."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.models.ancestry import Ancestry, find_ancestry, line_of, run_dimension
from prefopt_cli.models.policy import PolicySource, fingerprint
from prefopt_cli.recipe.schema import GPOSettings, Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from tests.models.build import GPO, Place, policy_fingerprint, run_id, sequential, write_model
from tests.training.conftest import LORA, Run, shared_run  # noqa: F401 - a fixture


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    write_model(made.base, "the base")
    return made


@pytest.fixture
def chain(place: Place) -> list[RunFolder]:
    """Three runs, each after the ones before: a by gpo, b and c by sequential."""
    a = place.run("a")
    b = place.run("b", a, method=sequential({"a": a}, {"a": 0.7}, beta=0.2))
    c = place.run("c", b, method=sequential({"a": a, "b": b}, {"a": 0.4, "b": 0.9}, beta=0.05))
    return [a, b, c]


def _find(recipe: Recipe, folder: Path | None = None) -> Ancestry:
    found = find_ancestry(recipe, RunFinder(folder))
    assert found is not None
    return found


def _refusal(recipe: Recipe, folder: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_ancestry(recipe, RunFinder(folder))
    return str(caught.value)


def _model(run: RunFolder) -> PolicySource:
    return PolicySource(str(run.model), None, run.path)


def _change(folder: Path) -> None:
    """Other weights of the same size, as training leaves them."""
    (file,) = folder.glob("*.safetensors")
    file.write_text(file.read_text()[::-1])


# --- Found --------------------------------------------------------------------------------------------------------


def test_the_stages_with_what_their_rewards_are_made_of(place: Place, chain: list[RunFolder]) -> None:
    found = _find(place.recipe(chain, {"c": 0.2, "a": 0.3, "b": 0.5}))
    assert found.dimensions == ("a", "b", "c")
    assert [stage.run for stage in found.stages] == chain
    assert [stage.run_id for stage in found.stages] == ["id-a", "id-b", "id-c"]
    assert [stage.source for stage in found.stages] == [_model(run) for run in chain]
    assert [stage.beta for stage in found.stages] == [0.1, 0.2, 0.05]
    assert [stage.lambdas for stage in found.stages] == [(), (0.7,), (0.4, 0.9)]
    assert found.lambdas == (0.3, 0.5, 0.2)  # in the order of the stages
    assert found.base == PolicySource(str(place.base))
    assert found.start == _model(chain[-1])
    assert found.earlier == (("base", found.base), ("a", _model(chain[0])), ("b", _model(chain[1])))


def test_one_earlier_stage(place: Place, chain: list[RunFolder]) -> None:
    """The base is then the only policy that is needed besides the reference."""
    found = _find(place.recipe(chain[:1]))
    assert found.stages[0].lambdas == ()
    assert found.earlier == (("base", PolicySource(str(place.base))),)


def test_what_is_told_and_written_down(place: Place, chain: list[RunFolder]) -> None:
    found = _find(place.recipe(chain[:2], {"a": 0.3, "b": 0}))
    assert found.describe() == "after a (lambda 0.3), b (lambda 0)"
    assert found.figures() == [
        {"dimension": "a", "run": str(chain[0].path), "run_id": "id-a", "beta": 0.1, "lambda": 0.3},
        {"dimension": "b", "run": str(chain[1].path), "run_id": "id-b", "beta": 0.2, "lambda": 0.0},
    ]
    naive = _find(place.recipe(chain[:2], 0)).describe()
    assert naive == "after a (lambda 0), b (lambda 0); every lambda is 0: naive sequential training"


def test_other_methods_know_of_no_stages(place: Place, chain: list[RunFolder]) -> None:
    recipe = place.recipe(chain).model_copy(update={"method": GPOSettings(name="gpo")})
    assert find_ancestry(recipe, RunFinder()) is None


def test_each_stage_has_its_own_settings(place: Place) -> None:
    """gpo after gpo knew of nothing before it; a stage trained beside self_supervised counts by its alignment loss."""
    a = place.run("a", method={**GPO, "length_normalize": True})
    b = place.run("b", a, method={**GPO, "beta": 0.3})
    beside = {"name": "self_supervised", "align": sequential({"a": a, "b": b}, {"a": 0, "b": 0}, beta=0.4)}
    stages = beside["align"].pop("previous_stages")  # which the manifest has beside the settings
    stages[1]["lambda"] = 0.6
    c = place.run("c", b, method=beside | {"previous_stages": stages})
    found = _find(place.recipe([a, b, c])).stages
    assert [stage.length_normalize for stage in found] == [True, False, False]
    assert [stage.beta for stage in found] == [0.1, 0.3, 0.4]
    assert [stage.lambdas for stage in found] == [(), (0.0,), (0.0, 0.6)]


def test_beside_self_supervised_messages_name_its_place(place: Place, chain: list[RunFolder]) -> None:
    assert _find(place.recipe(chain, beside=True)).dimensions == ("a", "b", "c")
    told = _refusal(place.recipe(["nowhere/a"], beside=True))
    assert told.startswith("method.align.previous: ")
    told = _refusal(place.recipe(chain, {"a": 1}, beside=True))
    assert told.startswith("method.align.lambdas: ")


def test_adapters_on_one_base(place: Place) -> None:
    a = place.run("a", adapter=True)
    b = place.run("b", a, method=sequential({"a": a}, {"a": 0.5}), adapter=True)
    found = _find(place.recipe([a, b]))
    weights = str(place.base)
    assert found.base == PolicySource(weights)
    assert [stage.source for stage in found.stages] == [
        PolicySource(weights, r.model, r.path) for r in (a, b)
    ]


def test_a_base_on_the_hub(place: Place) -> None:
    """Its commit was written down, and is taken on trust."""
    a = place.run("a", adapter=True)
    lineage = a.read_manifest()["lineage"]
    lineage |= {"weights": "org/model", "fingerprint": fingerprint(PolicySource("org/model"), "c0ffee")}
    a.update_manifest(lineage=lineage)
    (a.model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert _find(place.recipe([a])).base == PolicySource("org/model")
    a.update_manifest(lineage=lineage | {"weights": "org/other"})
    assert "has changed" in _refusal(place.recipe([a]))


@pytest.mark.usefixtures("toy_scheme")
def test_a_schemes_base_is_made_again(place: Place) -> None:
    base = place.path / "cache" / "toy"
    write_model(base, "")
    (base / "model.safetensors").unlink()  # as the toy scheme makes it
    a = place.run("a", base)
    a.update_manifest(lineage=a.read_manifest()["lineage"] | {"name": f"toy:{base}"})
    shutil.rmtree(base)
    assert _find(place.recipe([a])).base == PolicySource(str(base), name=f"toy:{base}")
    assert (base / "config.json").is_file()


def test_dimensions(place: Place) -> None:
    """Manifests of earlier versions have none; the folder's name stands for it."""
    run, old = place.run("a", dimension="helpful"), place.run("b", dimension=None)
    assert run_dimension(run, run.read_manifest()) == "helpful"
    assert run_dimension(old, old.read_manifest()) == "b"
    assert _find(place.recipe([run])).dimensions == ("helpful",)


# --- The runs themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_unfinished_run(place: Place, chain: list[RunFolder], status: str, which: int) -> None:
    chain[which].update_manifest(status=status)
    told = _refusal(place.recipe(chain))
    assert told.startswith(
        f"method.previous: the run {chain[which].path} has no finished policy (its status is '{status}')"
    )
    assert "--resume" in told


def test_a_run_without_its_model(place: Place, chain: list[RunFolder]) -> None:
    shutil.rmtree(chain[0].model)
    assert "has no finished policy" in _refusal(place.recipe(chain))


def test_a_folder_that_is_no_run(place: Place, chain: list[RunFolder]) -> None:
    told = _refusal(place.recipe([str(place.base), *chain]))
    assert told.startswith(f"method.previous: {place.base} is no run folder")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ({"name": "soft", "alpha": 1.0}, "soft"),
        ({"name": "self_supervised", "align": {"name": "soft", "alpha": 1.0}}, "soft"),
    ],
)
def test_a_method_without_an_implicit_reward(place: Place, method: dict[str, Any], name: str) -> None:
    a = place.run("a", method=method)
    told = _refusal(place.recipe([a]))
    assert told.startswith(
        f"method.previous: the run {a.path} was trained by method {name}, which has no implicit"
    )


def test_two_runs_about_one_dimension(place: Place) -> None:
    a = place.run("a", dimension="helpful")
    b = place.run("b", a, dimension="helpful")
    told = _refusal(place.recipe([a, b]))
    assert told.startswith("method.previous: two of the runs are about the dimension helpful")
    assert "Set `dimension`" in told


# --- Their order ----------------------------------------------------------------------------------------------------


def test_a_stage_after_itself(place: Place, chain: list[RunFolder]) -> None:
    told = _refusal(place.recipe(chain, output="runs/b"))
    assert told.startswith(f"method.previous: {chain[1].path} is this run's own output_dir")
    told = _refusal(place.recipe(chain, output="runs/x/../b"))
    assert "own output_dir" in told


def test_a_run_inside_an_earlier_one(place: Place, chain: list[RunFolder]) -> None:
    told = _refusal(place.recipe(chain, output="runs/b/model/next"))
    assert f"lies in {chain[1].path}, the run of an earlier stage" in told


def test_a_run_named_twice(place: Place, chain: list[RunFolder]) -> None:
    a, b, _ = chain
    assert f"{a.path} is named twice" in _refusal(place.recipe([a, b, a]))
    (place.path / "link").symlink_to(a.path)
    assert f"{a.path} is named twice" in _refusal(place.recipe([str(place.path / "link"), a, b]))
    assert "is named twice" in _refusal(place.recipe([f"{b.path}/../a", a]))


def test_wrong_order(place: Place, chain: list[RunFolder]) -> None:
    a, b, c = chain
    told = _refusal(place.recipe([b, a]))
    assert told.startswith(
        f"method.previous: {b.path} came after {a.path}, and here stands before it. Name the runs in"
    )
    assert "here stands before it" in _refusal(place.recipe([b, a, c]))
    assert "here stands before it" in _refusal(place.recipe([c, b, a]))


def test_a_run_that_did_not_start_from_the_one_before(place: Place, chain: list[RunFolder]) -> None:
    a, b, c = chain
    other = place.run("other")
    told = _refusal(place.recipe([a, other]))
    assert told.startswith(
        f"method.previous: {other.path} did not start from {a.path}, but from {place.base}."
    )
    told = _refusal(place.recipe([a, c]))
    assert told.startswith(f"method.previous: {c.path} did not start from {a.path}, but from {b.path}.")


@pytest.mark.parametrize("searched", [False, True])
def test_a_stage_that_a_later_one_takes_into_its_reward_must_be_named(
    place: Place, chain: list[RunFolder], searched: bool
) -> None:
    told = _refusal(place.recipe(chain[1:]), place.path / "runs" if searched else None)
    assert told.startswith(
        f"method.previous: {chain[1].path} was itself trained after a, whose reward is a part"
    )
    assert str(chain[0].path) in told


def test_a_stage_that_no_later_one_takes_into_its_reward_may_be_left_out(place: Place) -> None:
    """Rewards are then measured from the policy that the first named stage began with: another run's."""
    a = place.run("a")
    b = place.run("b", a, method=sequential({"a": a}, {"a": 0.0}))
    c = place.run("c", b)
    found = _find(place.recipe([b, c]))
    assert found.base == _model(a)
    assert [stage.lambdas for stage in found.stages] == [(), (0.0,)]
    a.path.rename(place.path / "away")
    assert f"the start of {b.path}: there is no run in {a.path}" in _refusal(place.recipe([b, c]))
    assert _find(place.recipe([b, c]), place.path).base == _model(RunFolder(place.path / "away"))


# --- Changed since ------------------------------------------------------------------------------------------------


def test_an_earlier_run_trained_anew_in_its_place(place: Place, chain: list[RunFolder]) -> None:
    a, b, _ = chain
    shutil.rmtree(a.path)
    place.run("a", run_id="id-anew")
    told = _refusal(place.recipe(chain))
    assert told.startswith(
        f"method.previous: {a.path} holds another run than the one that {b.path} started from (run id id-a)"
    )
    told = _refusal(place.recipe(chain), place.path / "runs")
    assert told.startswith(
        f"method.previous: {a.path} holds another run than the one that is meant (run id id-a)"
    )


def test_the_old_run_is_taken_where_another_lies_in_its_place(place: Place, chain: list[RunFolder]) -> None:
    a, b, _ = chain
    now = RunFolder(a.path.rename(place.path / "runs" / "a-first"))
    place.run("a", run_id="id-anew")
    found = _find(place.recipe(chain), place.path / "runs")
    assert [stage.run for stage in found.stages] == [now, *chain[1:]]
    assert found.stages[1].lambdas == (0.7,)
    assert f"{b.path} started from (run id id-a)" in _refusal(place.recipe(chain))


@pytest.mark.parametrize("adapter", [False, True])
def test_changed_weights_of_an_earlier_run(place: Place, adapter: bool) -> None:
    a = place.run("a", adapter=adapter)
    b = place.run("b", a, method=sequential({"a": a}, {"a": 0.5}), adapter=adapter)
    recipe = place.recipe([a, b])
    _find(recipe)
    _change(a.model)
    assert _refusal(recipe).startswith(
        f"The policy of {a.path} has changed since {b.path} was trained from it."
    )


@pytest.mark.parametrize("stages", [1, 3])
def test_a_changed_base(place: Place, chain: list[RunFolder], stages: int) -> None:
    """Even where no adapter lies on it: the first stage's reward is measured from it."""
    _change(place.base)
    told = _refusal(place.recipe(chain[:stages]))
    assert told.startswith(
        f"The policy that {chain[0].path} began with, {place.base}, is not there any more or has"
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_a_base_that_is_gone(place: Place, adapter: bool) -> None:
    a = place.run("a", adapter=adapter)
    shutil.rmtree(place.base)
    told = _refusal(place.recipe([a]))
    assert str(place.base) in told
    assert "not there" in told


# --- Moved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_moved_runs_are_found_again_and_used(
    place: Place, chain: list[RunFolder], which: tuple[int, ...]
) -> None:
    """Their places in the recipe, in other runs and as the start stay as they were written."""
    recipe = place.recipe(chain, 0.5)
    for index in which:
        target = place.path / "archive" / chain[index].path.name
        target.parent.mkdir(exist_ok=True)
        chain[index].path.rename(target)
    told = _refusal(recipe)
    assert told.startswith(
        f"method.previous: there is no run in {chain[2 if 2 in which else which[0]].path}."
    )
    assert f"nor below {place.path}/nothing" in _refusal_below_nothing(recipe, place)
    runs = RunFinder(place.path / "archive")
    found = find_ancestry(recipe, runs)
    assert found is not None
    wanted = [
        place.path / "archive" / run.path.name if i in which else run.path for i, run in enumerate(chain)
    ]
    assert [stage.run.path for stage in found.stages] == wanted
    assert [stage.source.weights for stage in found.stages] == [str(path / "model") for path in wanted]
    assert found.start == found.stages[-1].source
    assert runs.moved == {str(chain[i].path): str(wanted[i]) for i in which}


def _refusal_below_nothing(recipe: Recipe, place: Place) -> str:
    (place.path / "nothing").mkdir()
    return _refusal(recipe, place.path / "nothing")


def test_the_start_may_name_the_new_place(place: Place, chain: list[RunFolder]) -> None:
    now = chain[-1].path.rename(place.path / "moved")
    recipe = place.recipe([*chain[:2], str(now)])
    assert _find(recipe).start == _model(RunFolder(now))
    old = place.recipe([*chain[:2], str(now.parent / "gone" / "moved")], start=now)
    assert _find(old, place.path).start == _model(RunFolder(now))


def test_several_moved_runs_could_be_meant(place: Place, chain: list[RunFolder]) -> None:
    recipe = place.recipe(chain)
    for copy in ("one", "two"):
        shutil.copytree(chain[0].path, place.path / "archive" / copy)
    shutil.rmtree(chain[0].path)
    told = _refusal(recipe, place.path / "archive")
    assert told.startswith("method.previous: ")
    assert f"could be meant: {place.path}/archive/one, {place.path}/archive/two." in told


@pytest.mark.parametrize("order", [("b", "a", "c"), ("other", "b", "c"), ("a", "c")])
def test_a_folder_to_look_in_does_not_correct_what_is_named(
    place: Place, chain: list[RunFolder], order: tuple[str, ...]
) -> None:
    """Runs that are where the recipe says are those that it means."""
    runs = {run.path.name: run for run in (*chain, place.run("other"))}
    recipe = place.recipe([runs[name] for name in order])
    assert _refusal(recipe) == _refusal(recipe, place.path / "runs")


# --- lambdas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [(0.3, (0.3, 0.3)), (0, (0, 0)), ({"b": 2, "a": 0}, (0, 2))])
def test_lambdas(place: Place, chain: list[RunFolder], given: Any, expected: tuple[float, ...]) -> None:
    assert _find(place.recipe(chain[:2], given)).lambdas == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 1, "hepful": 1}, "no earlier stage is about 'hepful'; the earlier dimensions are a, b."),
        ({"a": 1, "b": 1, "next": 1}, "no earlier stage is about 'next'"),
        ({"b": 1}, "nothing is said about a; name every earlier dimension (a, b), 0 leaves one out."),
        ({}, "nothing is said about a, b;"),
    ],
)
def test_lambdas_that_do_not_fit(place: Place, chain: list[RunFolder], given: Any, message: str) -> None:
    assert _refusal(place.recipe(chain[:2], given)).startswith(f"method.lambdas: {message}")


# --- The start ----------------------------------------------------------------------------------------------------


def test_the_start_by_another_spelling(
    place: Place, chain: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.path / "link").symlink_to(chain[1].path)
    monkeypatch.chdir(place.path)
    for start in ("runs/b", f"{place.path}/runs/../runs/b/", "link"):
        assert _find(place.recipe(chain[:2], start=start)).start.weights.endswith("model")


def test_the_start_is_another_policy(place: Place, chain: list[RunFolder]) -> None:
    a, b, c = chain
    merged = place.merged("merged", a)
    for start in (place.base, a.path, c.path, "org/model", merged):
        told = _refusal(place.recipe([a, b], start=start))
        assert told.startswith(
            f"model.name_or_path: {start} is not the policy that the last of the earlier stages"
        )
        assert f"Write {b.path}" in told


def test_the_start_may_be_merged_from_the_last_stage(place: Place, chain: list[RunFolder]) -> None:
    """Its reward is still measured by the run's own policy."""
    merged = place.merged("merged", chain[1])
    found = _find(place.recipe(chain[:2], start=merged))
    assert found.start == PolicySource(str(merged))
    assert found.stages[-1].source == _model(chain[1])
    _change(chain[1].model)
    assert "is not the policy" in _refusal(place.recipe(chain[:2], start=merged))


def test_stages_that_started_from_merged_ones(place: Place) -> None:
    a = place.run("a", adapter=True)
    merged = place.merged("merged", a)
    b = place.run("b", merged, method=sequential({"a": a}, {"a": 0.5}))
    lineage = b.read_manifest()["lineage"]
    assert [each["run_id"] for each in lineage["ancestors"]] == ["id-a"]
    found = _find(place.recipe([a, b]))
    assert found.base == PolicySource(str(place.base))
    assert found.stages[1].lambdas == (0.5,)
    c = place.run("c", b, method=GPO)
    assert _find(place.recipe([a, b, c])).dimensions == ("a", "b", "c")
    _change(a.model)
    assert f"The policy of {a.path} has changed since {b.path}" in _refusal(place.recipe([a, b]))


def test_a_merged_model_is_where_a_later_line_may_begin(place: Place) -> None:
    """Nothing of the merged run is then needed, only the merged weights."""
    a = place.run("a")
    b = place.run("b", place.merged("merged", a))
    shutil.rmtree(a.path)
    assert _find(place.recipe([b])).base == PolicySource(str(place.path / "merged"))
    _change(place.path / "merged")
    assert "has changed" in _refusal(place.recipe([b]))


# --- The line of a run ----------------------------------------------------------------------------------------------


def test_the_line_of_a_run(place: Place, chain: list[RunFolder]) -> None:
    assert line_of(chain[2], RunFinder()) == chain
    assert line_of(chain[0], RunFinder()) == chain[:1]
    moved = RunFolder(chain[0].path.rename(place.path / "moved"))
    with pytest.raises(UserError, match=re.escape(f"an ancestor of {chain[2].path}: there is no run in")):
        line_of(chain[2], RunFinder())
    assert line_of(chain[2], RunFinder(place.path)) == [moved, *chain[1:]]
    place.run("a", run_id="id-anew")
    with pytest.raises(UserError, match="holds another run"):
        line_of(chain[2], RunFinder(place.path / "runs"))


# --- As training leaves them ----------------------------------------------------------------------------------------


def _after(run: RunFolder, earlier: list[RunFolder], lambdas: Any, **more: str) -> list[str]:
    method = {
        "name": "sequential",
        "previous": [str(each.path) for each in earlier],
        "lambdas": lambdas,
        **more,
    }
    return [f"model.name_or_path={run.path}", f"method={method}".replace("'", '"')]


def _trained(shared_run: Run, kind: str) -> list[RunFolder]:  # noqa: F811
    """Three stages of one step: all weights, one adapter that goes on, or a new one for each stage."""
    extra = ["training.max_steps=1", *([] if kind == "full" else [LORA])]
    per_stage = {"adapter_per_stage": "new"} if kind == "new" else {}
    a = shared_run(f"{kind}-a", "dimension=helpful", *extra).run
    b = shared_run(f"{kind}-b", *_after(a, [a], {"helpful": 0.5}, **per_stage), *extra).run
    c = shared_run(f"{kind}-c", *_after(b, [a, b], 0.3, **per_stage), *extra).run
    return [a, b, c]


@pytest.mark.parametrize("kind", ["full", "continue", "new"])
def test_runs_that_were_trained(kind: str, shared_run: Run, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    """What the third wrote down agrees with what a fourth would find."""
    a, b, c = _trained(shared_run, kind)
    manifest = c.read_manifest()
    ancestors = manifest["lineage"]["ancestors"]
    assert [each["dimension"] for each in ancestors] == ["helpful", f"{kind}-b"]
    assert [each["run"] for each in ancestors] == [str(a.path), str(b.path)]
    assert ancestors[0]["ended_with"] == ancestors[1]["started_from"]
    assert ancestors[1]["ended_with"] == manifest["lineage"]["fingerprint"]
    assert manifest["lineage"]["base"] == f"{tiny_world}/model"
    assert manifest["lineage"]["adapters"] == ([] if kind == "full" else [str(a.model), str(b.model)])
    assert manifest["method"]["previous_stages"] == [
        {"dimension": d, "run": str(r.path), "run_id": run_id(r), "beta": 0.1, "lambda": 0.3}
        for d, r in (("helpful", a), (f"{kind}-b", b))
    ]
    lambdas = {"helpful": 1, f"{kind}-b": 2, f"{kind}-c": 3}
    found = _find(Place(tmp_path).recipe([a, b, c], lambdas))
    assert [stage.lambdas for stage in found.stages] == [(), (0.5,), (0.3, 0.3)]
    assert found.base == PolicySource(f"{tiny_world}/model")
    assert found.lambdas == (1, 2, 3)
    assert line_of(c, RunFinder()) == [a, b, c]


@pytest.mark.parametrize("kind", ["full", "new"])
def test_trained_runs_that_were_moved(kind: str, shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    """A finished run needs nothing of the earlier ones but their folders, wherever these are."""
    runs = _trained(shared_run, kind)
    for run in runs:
        shutil.copytree(run.path, tmp_path / "archive" / run.path.name)
    gone = Place(tmp_path).recipe([str(tmp_path / run.path.name) for run in runs])
    moved = _find(gone, tmp_path / "archive")
    assert [stage.run.path.parent for stage in moved.stages] == [tmp_path / "archive"] * 3
    assert [stage.lambdas for stage in moved.stages] == [(), (0.5,), (0.3, 0.3)]
    assert moved.start == moved.stages[-1].source


def test_a_run_from_a_merged_model(shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Its lineage takes over what the merged one went through."""
    a, *_ = _trained(shared_run, "full")
    place = Place(tmp_path)
    merged = place.merged("merged", a)
    for file in a.model.iterdir():  # of a run that trained all weights, the merged policy is the policy
        shutil.copy2(file, merged / file.name)
    start = [*_after(a, [a], 0.5), f"model.name_or_path={merged}"]
    b = shared_run("after-merged", "training.max_steps=1", *start).run
    lineage = b.read_manifest()["lineage"]
    assert lineage["merged_from"] == policy_fingerprint(a.path)
    assert [each["run"] for each in lineage["ancestors"]] == [str(a.path)]
    assert lineage["base"] == lineage["origin"] == a.read_manifest()["lineage"]["base"]
    assert lineage["weights"] == str(merged)
    found = _find(place.recipe([a, b]))
    assert [stage.lambdas for stage in found.stages] == [(), (0.5,)]
    assert found.base == PolicySource(lineage["base"])


def test_manifests_made_by_hand_are_like_those_of_training(
    chain: list[RunFolder],
    shared_run: Run,  # noqa: F811
) -> None:
    trained = _trained(shared_run, "full")[1].read_manifest()
    made = chain[1].read_manifest()
    assert set(made) <= set(trained)
    assert set(made["lineage"]) == set(trained["lineage"])
    assert set(made["lineage"]["ancestors"][0]) == set(trained["lineage"]["ancestors"][0])
    assert set(made["method"]) <= set(trained["method"])
    assert set(made["method"]["previous_stages"][0]) == set(trained["method"]["previous_stages"][0])
