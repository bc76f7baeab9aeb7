"""accelerate's own configuration files, read by accelerate itself: a change of its internals shows here."""

from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch.accelerate_file import read_accelerate_file
from prefopt_cli.launch.plan import plan_launch
from prefopt_cli.recipe.launch_settings import LaunchSettings

COMMON = """\
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: {cpu}
distributed_type: {kind}
"""

FSDP = """\
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
"""

DEEPSPEED = """\
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
"""


def write(folder: Path, kind: str, more: str = "", *, cpu: bool = False) -> str:
    path = folder / "accelerate.yaml"
    path.write_text(COMMON.format(kind=kind, cpu=str(cpu).lower()) + more)
    return str(path)


def test_ddp_on_the_cpu(tmp_path: Path) -> None:
    found = read_accelerate_file(write(tmp_path, "MULTI_CPU", cpu=True))
    assert (found.engine, found.processes, found.machines) == ("ddp", 2, 1)
    assert found.variables["ACCELERATE_USE_CPU"] == "true"
    assert found.variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "OMP_NUM_THREADS" not in found.variables


def test_ddp_on_gpus(tmp_path: Path) -> None:
    found = read_accelerate_file(write(tmp_path, "MULTI_GPU", "gpu_ids: '2,3'\n"))
    assert found.engine == "ddp"
    assert found.variables["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_fsdp(tmp_path: Path) -> None:
    found = read_accelerate_file(write(tmp_path, "FSDP", FSDP))
    assert found.engine == "fsdp"
    assert found.variables["ACCELERATE_USE_FSDP"] == "true"
    assert found.variables["FSDP_VERSION"] == "2"
    assert found.variables["FSDP_RESHARD_AFTER_FORWARD"] == "false"
    assert found.variables["FSDP_OFFLOAD_PARAMS"] == "true"


def test_deepspeed(tmp_path: Path) -> None:
    found = read_accelerate_file(write(tmp_path, "DEEPSPEED", DEEPSPEED))
    assert found.engine == "deepspeed"
    assert found.variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert found.variables["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"
    assert "zero_stage" in found.variables["ACCELERATE_CONFIG_DS_FIELDS"]


def test_machines(tmp_path: Path) -> None:
    text = COMMON.format(kind="MULTI_CPU", cpu="true").replace("num_machines: 1", "num_machines: 2")
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        text.replace("num_processes: 2", "num_processes: 8")
        + "main_process_ip: 127.0.0.1\nmain_process_port: 29600\n"
    )
    found = read_accelerate_file(str(path))
    assert (found.processes, found.machines, found.rendezvous) == (4, 2, "127.0.0.1:29600")
    plan = plan_launch(LaunchSettings(config=str(path), machine_rank=1), ["train", "r.yaml"], environ={})
    assert plan is not None
    assert (plan.processes, plan.machines, plan.machine_rank) == (4, 2, 1)
    assert plan.rendezvous == "127.0.0.1:29600"


def test_the_recipe_counts_more_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "FSDP", FSDP)
    plan = plan_launch(LaunchSettings(config=path, processes=3), ["train", "r.yaml"], environ={})
    assert plan is not None
    assert (plan.processes, plan.engine) == (3, "fsdp")
    with pytest.raises(UserError, match=r"launch\.engine: deepspeed, but .* asks for fsdp"):
        plan_launch(LaunchSettings(config=path, engine="deepspeed"), ["train", "r.yaml"], environ={})


@pytest.mark.parametrize("text", ["[1, 2", "no_such_key: 1\n", "distributed_type: NO_SUCH_KIND\n", "", "7\n"])
def test_what_accelerate_cannot_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"launch\.config: .*broken\.yaml"):
        read_accelerate_file(str(path))


def test_what_prefopt_does_not_train_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distributed_type may be"):
        read_accelerate_file(write(tmp_path, "MEGATRON_LM"))


@pytest.mark.parametrize(
    ("text", "words"), [("", "is empty"), ("# nothing\n", "is empty"), ("7\n", "holds no keys")]
)
def test_a_file_without_keys_is_told_of_in_plain_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"empty\.yaml {words}; expected a configuration"):
        read_accelerate_file(str(path))


def test_a_file_chooses_the_engine_over_what_a_shell_has_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plan = plan_launch(LaunchSettings(config=write(tmp_path, "FSDP", FSDP)), ["train", "r.yaml"])
    assert plan is not None
    assert plan.environment["ACCELERATE_USE_DEEPSPEED"] == "false"
    assert plan.environment["ACCELERATE_USE_FSDP"] == "true"
