"""What `prefopt launch print` says of several machines."""

import shlex
from pathlib import Path

import pytest

from prefopt_cli.launch import plan as planning
from prefopt_cli.launch.addresses import INTERFACES
from tests.cli.conftest import Prefopt
from tests.launch.test_resolving import TWO_MACHINES

MACHINES = ("launch.machines=2", "launch.rendezvous=127.0.0.1:29500")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interface_that_is_not_known_is_left_to_train(prefopt: Prefopt, recipe: Path, rank: int) -> None:
    out = prefopt("launch", "print", str(recipe), *MACHINES, f"launch.machine_rank={rank}").out
    *comments, command = out.splitlines()
    assert all(line.startswith("# ") for line in comments)
    said = " ".join(line.removeprefix("# ") for line in comments)
    assert "prefopt train finds by itself the network interface" in said
    assert said.endswith("GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0")
    assert not any(name in command for name in INTERFACES)
    assert shlex.split(command)[-1] == f"launch.machine_rank={rank}"


def test_one_that_is_known_or_set_needs_no_word(
    prefopt: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as here:
        here.setattr(planning, "own_address_towards", lambda *_: "10.9.8.7")
        here.setattr(planning, "interface_variables", lambda _: dict.fromkeys(INTERFACES, "eth7"))
        comment, command = prefopt("launch", "print", str(recipe), *MACHINES).out.splitlines()
        assert "NCCL_SOCKET_IFNAME=eth7" in command
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    comment, command = prefopt("launch", "print", str(recipe), *MACHINES).out.splitlines()
    assert "GLOO_SOCKET_IFNAME" not in comment + command


def test_a_file_and_what_is_said_beside_it(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_MACHINES)
    shown = prefopt("launch", "print", str(recipe), f"launch.config={path}", "launch.processes=1").out
    assert shown.startswith("# 1 process; engine: ddp. Machine 1 of 2;")
    refused = prefopt("launch", "print", str(recipe), f"launch.config={path}", "launch.machine_rank=5")
    assert refused.code == 2
    assert "launch.machine_rank: expected less than the number of machines (2," in refused.err
