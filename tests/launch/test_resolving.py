"""`launch.config`: its file is read by all, and what the user has given beside it wins or is refused."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch.engine_variables import DEEPSPEED_FILE, EngineFacts, engine_asked, engine_facts
from prefopt_cli.launch.plan import plan_launch
from prefopt_cli.launch.resolving import ResolvedLaunch, adopt_engine, resolve_launch
from prefopt_cli.recipe import dump_recipe, load_recipe
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.schema import Recipe
from tests.conftest import REPOSITORY

TWO_MACHINES = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: 'no'
num_machines: 2
num_processes: 16
machine_rank: 1
main_process_ip: 10.0.0.1
main_process_port: 29600
use_cpu: false
"""

FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_version: 2
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.fixture
def two_machines(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_MACHINES)
    return str(path)


@pytest.fixture
def fsdp(tmp_path: Path) -> str:
    path = tmp_path / "fsdp.yaml"
    path.write_text(FSDP)
    return str(path)


def zero(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def resolve(**settings: Any) -> ResolvedLaunch:
    return resolve_launch(LaunchSettings(**settings), {})


def places(settings: LaunchSettings) -> tuple[Any, ...]:
    return settings.processes, settings.machines, settings.machine_rank, settings.rendezvous


# --- given values win


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (8, 2, 1, "10.0.0.1:29600")),
        ({"processes": 1}, (1, 2, 1, "10.0.0.1:29600")),
        ({"processes": 3}, (3, 2, 1, "10.0.0.1:29600")),
        ({"processes": "auto"}, ("auto", 2, 1, "10.0.0.1:29600")),
        ({"machines": 1}, (8, 1, 0, None)),
        ({"machines": 2, "machine_rank": 0}, (8, 2, 0, "10.0.0.1:29600")),
        ({"machine_rank": 0}, (8, 2, 0, "10.0.0.1:29600")),
        ({"machines": 3, "rendezvous": "a:1", "machine_rank": 2}, (8, 3, 2, "a:1")),
    ],
)
def test_what_is_given_wins(two_machines: str, asked: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert places(resolve(config=two_machines, **asked).settings) == expected


@pytest.mark.parametrize(
    "asked", [{"machine_rank": 5}, {"machine_rank": 2}, {"machines": 1, "machine_rank": 1}]
)
def test_ranks_are_counted_after_the_file_is_read(two_machines: str, asked: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=rf"machine_rank: expected less than .* found {asked['machine_rank']}"
    ):
        resolve(config=two_machines, **asked)


def test_a_rank_of_the_file_is_judged_too(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(TWO_MACHINES.replace("machine_rank: 1", "machine_rank: 2"))
    with pytest.raises(UserError, match=r"machine_rank: .* found 2"):
        resolve(config=str(path))


def test_a_place_to_meet_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(TWO_MACHINES.replace("29600", "70000"))
    with pytest.raises(
        UserError, match=r"main_process_port make 10\.0\.0\.1:70000, which is no place to meet"
    ):
        resolve(config=str(path))
    path.write_text(TWO_MACHINES.replace("10.0.0.1", "fe80::1"))
    assert resolve(config=str(path)).settings.rendezvous == "[fe80::1]:29600"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"engine": "ddp"}, r"launch\.engine: ddp, but .*fsdp\.yaml \(launch\.config\) asks for fsdp"),
        ({"engine": "deepspeed"}, r"launch\.engine: deepspeed, but .* asks for fsdp"),
        ({"reshard_after_forward": True}, r"launch\.reshard_after_forward: true, but .* comes to false"),
        ({"cpu_offload": False}, r"launch\.cpu_offload: false, but .* comes to true"),
    ],
)
def test_contradictions_are_refused(fsdp: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(config=fsdp, **asked)


def test_what_says_the_same_is_no_contradiction(fsdp: str) -> None:
    assert resolve(config=fsdp, engine="fsdp", cpu_offload=True).settings.engine == "fsdp"


def test_a_file_tells_all_that_the_engine_does(fsdp: str) -> None:
    found = resolve(config=fsdp)
    settings = found.settings
    assert (settings.engine, settings.processes, settings.config) == ("fsdp", 2, None)
    assert (settings.reshard_after_forward, settings.cpu_offload) == (False, True)
    assert found.besides == ("mixed_precision: bf16", "fsdp_activation_checkpointing: true")
    assert found.on_cpu


def test_fsdp_1_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        FSDP.replace("fsdp_version: 2", "fsdp_version: 1").replace("forward: false", "forward: FULL_SHARD")
    )
    with pytest.raises(UserError, match=r"old\.yaml asks for FSDP 1"):
        resolve(config=str(path))


# --- recipes of run folders


def recipe(*overrides: str) -> Recipe:
    return load_recipe(REPOSITORY / "recipes" / "gpo-hh.yaml", overrides)


@pytest.mark.parametrize(
    "asked", [(), ("launch.processes=1",), ("launch.machines=1", "launch.machine_rank=0")]
)
def test_a_run_folder_keeps_what_was_given(two_machines: str, tmp_path: Path, asked: tuple[str, ...]) -> None:
    """Its recipe asks for what the run was asked for: no default becomes a wish, no wish a default."""
    begun = recipe(f"launch.config={two_machines}", *asked)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(begun))
    again = load_recipe(path)
    assert again == begun
    assert places(resolve_launch(again.launch, {}).settings) == places(
        resolve_launch(begun.launch, {}).settings
    )
    alone = load_recipe(path, ["launch.processes=1"])
    assert resolve_launch(alone.launch, {}).settings.processes == 1


def test_a_run_folder_without_a_file_can_be_given_one(two_machines: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe()))
    asked = [f"launch.config={two_machines}"]
    assert resolve_launch(load_recipe(path, asked).launch, {}).settings.processes == 8
    alone = load_recipe(path, [*asked, "launch.processes=1"])
    assert resolve_launch(alone.launch, {}).settings.processes == 1


def test_a_recipe_that_spells_every_default_out_leaves_the_file_its_say(two_machines: str) -> None:
    """As run folders of earlier versions do."""
    spelled = {name: field.default for name, field in LaunchSettings.model_fields.items()}
    found = resolve(**{**spelled, "config": two_machines})
    assert places(found.settings) == (8, 2, 1, "10.0.0.1:29600")
    assert resolve(**{**spelled, "config": two_machines, "processes": 3}).settings.processes == 3


# --- DeepSpeed's JSON


@pytest.mark.parametrize(
    ("content", "stage", "offload", "besides"),
    [
        ({"zero_optimization": {"stage": 3}}, 3, False, ()),
        ({"zero_optimization": {"stage": 1}}, 1, False, ()),
        ({"zero_optimization": {"stage": "auto"}}, 2, False, ()),
        ({"zero_optimization": {}}, 0, False, ()),
        ({}, 0, False, ()),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 2, True, ()),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            3,
            False,
            ("offload_optimizer: cpu",),
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            },
            3,
            True,
            (),
        ),
    ],
)
def test_deepspeeds_file(
    tmp_path: Path, content: Any, stage: int, offload: bool, besides: tuple[str, ...]
) -> None:
    found = resolve(config=zero(tmp_path, content), engine="deepspeed", processes=2)
    assert (found.settings.zero_stage, found.settings.cpu_offload) == (stage, offload)
    assert found.besides == besides
    assert found.variables == {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n "zero_optimization": {"stage": 3},\n}', r"ds\.json:3: this is no JSON: "),
        ("", r"ds\.json:1: this is no JSON: "),
        ("[1]", r"ds\.json holds no keys"),
        (
            {"zero_optimization": {"stage": 7}},
            r"ds\.json: zero_optimization\.stage: expected 0, 1, 2 or 3, found 7",
        ),
        ({"zero_optimization": {"stage": [3]}}, r"stage: expected 0, 1, 2 or 3, found \[3\]"),
        ({"zero_optimization": True}, r"zero_optimization: expected a mapping, found True"),
        ({"zero_optimization": {"offload_param": "cpu"}}, r"offload_param: expected a mapping, found 'cpu'"),
    ],
)
def test_what_deepspeed_could_not_use(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_launch(
            LaunchSettings(config=zero(tmp_path, content), engine="deepspeed", processes=2),
            ["train"],
            environ={},
        )


def test_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"ds\.json: this is no JSON"):
        resolve(config=str(path), engine="deepspeed")


def test_a_stage_that_the_file_contradicts(tmp_path: Path) -> None:
    path = zero(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(
        UserError, match=r"launch\.zero_stage: 2, but .*ds\.json \(launch\.config\) comes to 3"
    ):
        resolve(config=path, engine="deepspeed", zero_stage=2)


def test_deepspeeds_file_within_accelerates(tmp_path: Path) -> None:
    inner = zero(tmp_path, {"zero_optimization": {"stage": 3}})
    path = tmp_path / "accelerate.yaml"
    text = FSDP[: FSDP.index("fsdp_config")].replace("FSDP", "DEEPSPEED")
    path.write_text(
        f"{text}deepspeed_config:\n  deepspeed_config_file: {inner}\n  zero3_init_flag: false\n"
        "num_machines: 1\nnum_processes: 2\n"
    )
    found = resolve(config=str(path)).settings
    assert (found.engine, found.zero_stage, found.processes) == ("deepspeed", 3, 2)
    Path(inner).unlink()
    with pytest.raises(UserError, match=r"there is no file .*ds\.json"):
        resolve(config=str(path))


# --- what an environment says


def test_variables_are_read_as_they_are_written() -> None:
    asked = LaunchSettings(processes=2, engine="deepspeed", zero_stage=3, cpu_offload=True)
    found = plan_launch(asked, ["train"], environ={})
    assert found is not None
    facts = engine_facts(found.environment)
    assert (facts.engine, facts.zero_stage, facts.cpu_offload, facts.besides) == ("deepspeed", 3, True, ())
    sharded = LaunchSettings(processes=2, engine="fsdp", reshard_after_forward=False)
    found = plan_launch(sharded, ["train"], environ={})
    assert found is not None
    facts = engine_facts(found.environment)
    assert (facts.engine, facts.reshard_after_forward, facts.cpu_offload) == ("fsdp", False, False)


# --- under other launchers

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE, {**TORCHRUN, "ACCELERATE_USE_FSDP": "false"}])
def test_the_recipes_engine_holds_under_a_launcher_that_asks_for_none(launcher: dict[str, str]) -> None:
    environ = dict(launcher)
    adopt_engine(LaunchSettings(engine="fsdp", cpu_offload=True, processes=4), environ)
    assert engine_facts(environ) == EngineFacts("fsdp", cpu_offload=True)
    assert environ["FSDP_VERSION"] == "2"
    assert environ["WORLD_SIZE"] == "2"


def test_so_does_that_of_its_file_but_for_what_the_launcher_says(two_machines: str, fsdp: str) -> None:
    environ = dict(ACCELERATE)
    adopt_engine(LaunchSettings(config=fsdp, machines=2), environ)
    assert engine_asked(environ) == "fsdp"
    assert environ["ACCELERATE_MIXED_PRECISION"] == "no"
    environ = dict(TORCHRUN)
    adopt_engine(LaunchSettings(config=two_machines), environ)
    assert engine_asked(environ) == "ddp"


def test_what_a_shell_has_exported_does_not_decide_how_the_engine_works(tmp_path: Path) -> None:
    environ = {**TORCHRUN, "FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"}
    adopt_engine(LaunchSettings(engine="fsdp"), environ)
    assert (environ["FSDP_VERSION"], engine_facts(environ)) == ("2", EngineFacts("fsdp"))
    environ = {**TORCHRUN, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", DEEPSPEED_FILE: str(tmp_path / "old.json")}
    adopt_engine(LaunchSettings(engine="deepspeed", zero_stage=2), environ)
    assert engine_facts(environ) == EngineFacts("deepspeed", zero_stage=2)


def test_devices_are_the_launchers(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(FSDP.replace("use_cpu: true", "use_cpu: false\ngpu_ids: '0,1'"))
    environ = dict(TORCHRUN)
    adopt_engine(LaunchSettings(config=str(path)), environ)
    assert engine_asked(environ) == "fsdp"
    assert {name for name in environ if not name.startswith(("FSDP_", "ACCELERATE_"))} == set(TORCHRUN)


@pytest.mark.parametrize("environ", [{}, {"PREFOPT_LAUNCH": "/tmp/x", **TORCHRUN}])
def test_prefopts_own_processes_and_a_single_one_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_engine(LaunchSettings(engine="fsdp"), environ)
    assert environ == before


ZERO_3 = {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"engine": "fsdp"},
            r"launch\.engine: fsdp, but .* accelerate started .* asks for deepspeed; leave",
        ),
        ({"engine": "ddp"}, r"launch\.engine: ddp, but .* asks for deepspeed"),
        ({"zero_stage": 2}, r"launch\.zero_stage: 2, but the environment of accelerate comes to 3"),
        (
            {"cpu_offload": True},
            r"launch\.cpu_offload: true, but the environment of accelerate comes to false",
        ),
    ],
)
def test_what_a_launcher_asks_for_is_not_contradicted(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        adopt_engine(LaunchSettings(**settings), dict(ZERO_3))


def test_what_a_launcher_asks_for_is_obeyed(fsdp: str) -> None:
    for settings in (LaunchSettings(), LaunchSettings(engine="deepspeed", zero_stage=3)):
        environ = dict(ZERO_3)
        adopt_engine(settings, environ)
        assert environ == ZERO_3
    by_content = {
        **ZERO_3,
        DEEPSPEED_FILE: b64encode(
            json.dumps({"zero_optimization": {"stage": 1}, "x": 999 * "x"}).encode()
        ).decode(),
    }
    adopt_engine(LaunchSettings(zero_stage=1), by_content)
