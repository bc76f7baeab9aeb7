"""The examination of a machine: what is found where something is wrong, and that nothing spoils the rest."""

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement

from prefopt_cli.launch.doctor import devices, disk, driver, examination, hub, machine, quantization, versions
from prefopt_cli.launch.doctor.checkpoints import checkpoint_bytes, shapes
from prefopt_cli.launch.doctor.examination import Examined, Section, examine, sections
from prefopt_cli.launch.doctor.finding import Finding, note
from prefopt_cli.launch.doctor.needs import needs_of
from prefopt_cli.launch.doctor.of_recipe import of_recipe
from prefopt_cli.launch.doctor.rendezvous import rendezvous
from prefopt_cli.recipe import load_recipe
from tests.cli.conftest import Prefopt, prefopt  # noqa: F401  (a fixture)
from tests.launch.test_resolving import FSDP, TWO_MACHINES
from tests.training.conftest import LORA, RECIPE, Run, make_recipe, run  # noqa: F401  (fixtures)

# --- sections in processes of their own


class Program(Section):
    """A section that is a program of the test's."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.name]


SAYS = """\
import json, os, signal, sys, time
print(json.dumps({"state": "ok", "text": "first"}), flush=True)
"""


def examined(*programs: str, patience: float = 20.0, needs: dict[str, str] | None = None) -> list[Examined]:
    return list(examine([Program("title", SAYS + each) for each in programs], needs, patience=patience))


def test_a_section_that_hangs_spoils_no_other(tmp_path: Path) -> None:
    """What it had found is kept, and what it had started does not outlive it."""
    place = tmp_path / "pid"
    hangs = (
        "import subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(place)!r}, 'w').write(str(child.pid))\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(600)"
    )
    begin = time.monotonic()
    hanging, fine = examined(hangs, "", patience=5.0)
    assert time.monotonic() - begin < 60
    assert [finding.text for finding in fine.findings] == ["first"]
    assert [finding.state for finding in hanging.findings] == ["ok", "note"]
    assert "no answer within 5 s" in hanging.findings[1].text
    child = int(place.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it was killed by SIGSEGV"),
        ("print('noise'); raise RuntimeError('no such kernel')", "RuntimeError: no such kernel"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_a_section_that_fails_says_how(program: str, words: str) -> None:
    (found,) = examined(program)
    assert found.findings[0].text == "first"
    assert words in found.findings[-1].text
    assert found.findings[-1].remedy


def test_a_note_is_a_problem_where_the_recipe_needs_the_thing() -> None:
    lacks = "print(json.dumps({'state': 'note', 'text': 'no x', 'remedy': 'get x', 'feature': 'x'}))"
    (alone,), (with_recipe,) = examined(lacks), examined(lacks, needs={"x": "training.x"})
    assert [finding.state for finding in alone.findings] == ["ok", "note"]
    assert [finding.state for finding in with_recipe.findings] == ["ok", "problem"]
    assert with_recipe.findings[1].text == "no x (training.x needs it)"


def test_what_needs_a_thing_is_told_once() -> None:
    missing = note("deepspeed is not installed; it is for launch.engine: deepspeed", "pip install deepspeed")
    judged = missing.needed_by("launch.engine: deepspeed")
    assert (judged.state, judged.text) == ("problem", missing.text)


def test_what_is_not_well_needs_a_remedy() -> None:
    with pytest.raises(ValueError, match="needs a remedy"):
        note("something is missing", "")


def test_a_broken_torch_is_a_problem_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = [each for each in sections() if each.name in ("machine", "devices", "quantization")]
    machine_found, devices_found, quantization_found = examine(wanted)
    (finding,) = devices_found.findings
    assert finding.state == "problem"
    assert "libcudart.so.12: cannot open" in finding.text
    assert "did not come to its end" in quantization_found.findings[-1].text
    assert len(machine_found.findings) > 1


def test_two_processes_really_meet() -> None:
    (section,) = [each for each in sections() if each.name == "processes"]
    (found,) = examine([section])
    texts = [finding.text for finding in found.findings if finding.state == "ok"]
    assert "two processes meet and add up (gloo)" in texts, found.findings
    (quick,) = [each for each in sections(quick=True) if each.name == "processes"]
    assert quick.arguments == ("quick",)


# --- versions, machine, disks


@pytest.mark.parametrize(
    ("requirement", "state", "remedy"),
    [
        ("typer>=0.16", "ok", None),
        ("typer>=999", "problem", 'pip install "typer>=999"'),
        ("no-such-package>=2,<3", "problem", 'pip install "no-such-package<3,>=2"'),
    ],
)
def test_packages(requirement: str, state: str, remedy: str | None) -> None:
    found = versions.of_package(Requirement(requirement))
    assert (found.state, found.remedy) == (state, remedy)


def test_versions_know_all_that_is_required() -> None:
    said = " ".join(finding.text for finding in versions.versions())
    for name in ("Python", "torch", "trl", "transformers", "peft", "typer", "pydantic", "deepspeed"):
        assert name in said
    assert "tensorboard" not in said, "which only an extra asks for"


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The narrowest of the groups around this process counts, in both versions."""
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    for name, text in {
        "memory/jobs/memory.limit_in_bytes": "4000000000\n",
        "memory/jobs/17/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "jobs/memory.max": "max\n",
        "memory.max": "5000000000\n",
        "jobs/cpu.max": "150000 100000\n",
        "cpu.max": "max 100000\n",
    }.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    own.write_text("0::/jobs\n")
    assert machine.memory_limit(groups, own) == 5_000_000_000
    assert machine.core_limit(groups, own) == 1.5
    own.write_text("9:memory:/jobs/17\n8:cpu,cpuacct:/\n")
    assert machine.memory_limit(groups, own) == 4_000_000_000
    assert machine.core_limit(groups, own) is None
    assert machine.memory_limit(groups, tmp_path / "none") is None


def test_sizes_of_caches(tmp_path: Path) -> None:
    """As the hub's cache has it: links to files that are counted once."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/a").write_bytes(b"x" * 1000)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/a").symlink_to(tmp_path / "blobs/a")
    (tmp_path / "snapshots/all").symlink_to(tmp_path)
    assert disk.folder_size(tmp_path) == (1000, True)
    assert disk.folder_size(tmp_path, patience=-1.0) == (0, False)


def test_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.room("there", tmp_path / "not" / "yet", "another").text.startswith("there: ")
    (tmp_path / "file").write_text("")
    in_the_way = disk.room("blocked", tmp_path / "file" / "below", "another")
    assert (in_the_way.state, in_the_way.remedy) == ("problem", "another")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: _Usage(50 * 2**20))
    assert disk.room("full", tmp_path, "another").state == "problem"
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: _Usage(2**30))
    assert disk.room("nearly full", tmp_path, "another").state == "note"


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = self.total = free


# --- the hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A hub that answers with the statuses that the test puts down by path; 404 to all else."""
    statuses: dict[str, int] = {}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    for name in (*hub.PROXIES, *map(str.lower, hub.PROXIES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://someone:secret@127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield statuses
    listening.shutdown()
    listening.server_close()


def said(findings: Iterator[Finding]) -> list[tuple[str, str]]:
    """State and text of each; no secret is ever among them."""
    found = list(findings)
    assert "secret" not in json.dumps([finding.to_dict() for finding in found])
    return [(finding.state, finding.text) for finding in found]


def test_a_hub_that_takes_the_token(server: dict[str, int]) -> None:
    server["/api/whoami-v2"] = 200
    (reached, token) = said(hub.hub())
    assert reached[0] == "ok"
    assert "http://127.0.0.1:" in reached[1]
    assert token == ("ok", "there is a token, and the hub takes it")


def test_a_hub_that_refuses_the_token(server: dict[str, int]) -> None:
    server["/api/whoami-v2"] = 401
    assert [state for state, _ in said(hub.hub())] == ["ok", "note"]


def test_a_hub_without_a_token(
    server: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server["/api/whoami-v2"] = 401  # as it answers those whom it does not know
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    (_, token) = said(hub.hub())
    assert token[0] == "ok"
    assert token[1].startswith("no token")


def test_a_hub_behind_a_proxy_that_is_not_there(
    server: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://someone:secret@127.0.0.1:9")
    proxy, unreached = said(hub.hub())
    assert proxy == ("ok", "HTTP_PROXY is set: requests go through 127.0.0.1")
    assert unreached[0] == "note"
    assert "does not answer" in unreached[1]


WRONG_PROXIES = {
    "a port that is none": "http://someone:secret@host:80a",
    "half an address": "http://someone:secret@[::1",
    "a slash in the password": "http://someone:sec/secret@host:8080",
    "a port too high": "someone:secret@host:99999",
    "an unknown scheme": "socks4://someone:secret@host:1080",
}


@pytest.mark.parametrize("value", WRONG_PROXIES.values(), ids=WRONG_PROXIES.keys())
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_a_proxy_that_is_no_address(
    server: dict[str, int], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    (found,) = hub.hub()
    assert said(iter([found])) == [("problem", found.text)]
    assert found.text.startswith(f"{name} is no address of a proxy")
    assert found.remedy == f"export {name}=http://HOST:PORT, or unset {name}"


def test_a_proxy_that_needs_a_package(server: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_installed", lambda package: False)
    monkeypatch.setenv("ALL_PROXY", "socks5://someone:secret@host:1080")
    (found,) = hub.hub()
    assert said(iter([found])) == [
        ("problem", "ALL_PROXY names a SOCKS proxy, for which a package is not installed")
    ]
    assert found.remedy is not None
    assert found.remedy.startswith("pip install socksio, or export ALL_PROXY=")


@pytest.mark.parametrize(
    "value", ["someone:secret@host", "ftp://someone:secret@host", "https://someone:secret@host:port"]
)
def test_an_endpoint_that_is_no_address(
    server: dict[str, int], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", value)
    (found,) = said(hub.hub())
    assert found == ("problem", "HF_ENDPOINT is no address of a hub (https://HOST)")


def test_what_a_client_quotes_is_not_shown(server: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that makes no header is quoted by the client's own message."""
    monkeypatch.setenv("HF_TOKEN", "hf_\x01secret")

    def refuses(*_: object, headers: dict[str, str], **__: object) -> object:
        raise ValueError(f"{'x' * 90} illegal header value {headers['Authorization']}, {constants.ENDPOINT}")

    monkeypatch.setattr(hub.httpx2, "Client", refuses)
    (found,) = said(hub.hub())
    assert found[0] == "note"


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_no_secret_in_what_is_printed(
    prefopt: Prefopt,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    form: tuple[str, ...],
) -> None:
    """By the command itself, whose sections are processes that read the environment for themselves."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:secret@127.0.0.1:9")
    for proxy, words in (
        ("http://someone:secret@127.0.0.1:9", "requests go through 127.0.0.1"),
        ("http://someone:secret@host:80a", "HTTPS_PROXY is no address of a proxy"),
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        monkeypatch.setattr(
            examination, "sections", lambda *_, **__: [Section("Hub", "hub"), Section("Disks", "disks")]
        )
        shown = prefopt("doctor", *form)
        assert words in shown.out
        assert "secret" not in shown.out + shown.err


def test_a_hub_that_is_not_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [state for state, text in said(hub.hub()) if "HF_HUB_OFFLINE" in text] == ["note"]


# --- devices and quantisation


def test_the_drivers_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1\nGCC version: gcc version 12.3.0\n"
    )
    assert driver.driver_version(file) == "570.86.15"
    assert driver.driver_version(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("cuda", "build", "wanted", "hidden", "words"),
    [
        (None, "the CPU", None, None, "no GPU"),
        ((12, 8), "the CPU", None, None, "torch cannot use it"),
        ((11, 8), "CUDA 12.8", "12.8", None, "the driver ends at 11.8"),
        ((12, 4), "CUDA 12.8", "12.8", None, "torch finds no GPU"),
        ((12, 8), "CUDA 12.8", "12.8", "", "CUDA_VISIBLE_DEVICES hides"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    cuda: tuple[int, int] | None,
    build: str,
    wanted: str | None,
    hidden: str | None,
    words: str,
) -> None:
    monkeypatch.setattr(devices, "cuda_of_driver", lambda: cuda)
    monkeypatch.setattr(devices.torch.version, "cuda", wanted)
    monkeypatch.setattr(devices.torch.backends.mps, "is_available", lambda: False)
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = devices._why_no_gpu(build)
    assert words in found.text
    assert (found.state, found.feature) == ("note", "gpu")


def test_few_bits_come_back() -> None:
    found = list(quantization.quantization())
    assert {finding.feature for finding in found} == {"4-bit", "8-bit"}
    assert all(finding.state == "ok" for finding in found), found


def test_bits_that_come_back_wrong_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda bits, state: state.absmax.new_zeros(64, 64)
    )
    four, eight = quantization.quantization()
    assert (four.state, eight.state) == ("note", "ok")
    assert "100.0%, which is too much" in four.text


# --- what a recipe needs


def test_needs() -> None:
    recipe = load_recipe(
        "recipes/gpo-hh.yaml",
        [
            *("training.bf16=true", "training.optim=paged_adamw_8bit", "adapter={type: lora}"),
            *("quantization={bits: 4}", "model.attn_implementation=flash_attention_2"),
            "launch={engine: deepspeed, machines: 2, rendezvous: 'a:1'}",
        ],
    )
    assert set(needs_of(recipe)) == {
        *("gpu", "bf16", "4-bit", "8-bit", "deepspeed", "processes", "flash_attention_2"),
    }
    assert needs_of(load_recipe("recipes/gpo-hh.yaml")) == {}
    on_cpu = load_recipe("recipes/gpo-hh.yaml", ["training.bf16=true", "training.use_cpu=true"])
    assert "gpu" not in needs_of(on_cpu)


Judged = Callable[..., dict[str, str]]


@pytest.fixture
def judged(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Text -> state of what is found about the tiny world's recipe with some overrides."""
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "run"))

    def judge(*overrides: str) -> dict[str, str]:
        return {text: state for state, text in said(of_recipe(str(path), overrides))}

    return judge


def problems(found: dict[str, str]) -> list[str]:
    return [text for text, state in found.items() if state == "problem"]


def test_a_recipe_with_everything_there(judged: Judged) -> None:
    found = judged()
    assert problems(found) == []
    assert any("a checkpoint takes about" in text for text in found)


def test_what_is_missing_is_told(judged: Judged, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = judged(
        "dataset.train=no/such/pairs.jsonl", f"output_dir={tmp_path}/file/run", "training.report_to=clearml"
    )
    data, output, report = problems(found)
    assert "pairs.jsonl is not there" in data
    assert "output_dir" in output
    assert "clearml is not installed" in report


def test_a_disk_that_is_too_small_for_checkpoints(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: _Usage(200_000))
    assert any("too little for 3 of them" in text for text in problems(judged("training.save_total_limit=2")))


def test_models_of_the_hub(judged: Judged, server: dict[str, int]) -> None:
    """What is not in the cache is asked for, so that a gated model is not found out about after the queue."""
    server["/owner/free/resolve/main/config.json"] = 200
    server["/owner/gated/resolve/main/config.json"] = 403
    server["/api/datasets/owner/pairs"] = 200
    assert problems(judged("model.name_or_path=owner/free", "dataset.train=owner/pairs")) == []
    (gated,) = problems(judged("model.name_or_path=owner/gated"))
    assert "gated or private" in gated
    (missing,) = problems(judged("model.name_or_path=owner/misspelt"))
    assert "the hub has none of this name" in missing


def test_models_of_the_hub_without_the_hub(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = problems(judged("model.name_or_path=owner/model"))
    assert "HF_HUB_OFFLINE is set" in found


def test_a_launch_that_would_be_refused(judged: Judged, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(FSDP)
    there = f"launch.config={path}"
    for asked, words in (
        (("launch.config=nope.yaml",), "launch.config: there is no file nope.yaml."),
        (("launch.engine=fsdp",), "fsdp shards a model over several processes, and there is one."),
        (("launch.engine=fsdp", "launch.processes=auto"), "fsdp shards a model over several processes"),
        ((there, "launch.processes=1"), "fsdp shards a model over several processes"),
        ((there, "launch.machine_rank=5"), "launch.machine_rank: expected less than"),
        ((there, LORA, "quantization={bits: 4}"), "launch.config asks for fsdp, which takes weights apart"),
    ):
        (found,) = problems(judged(*asked))
        assert words in found, asked


def test_a_launch_in_a_file(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(FSDP)
    found = judged(f"launch.config={path}")
    assert problems(found) == []
    assert found[f"launch.config {path} can be used: processes: 2, engine: fsdp"] == "ok"
    path.write_text(TWO_MACHINES.replace("main_process_ip: 10.0.0.1\n", ""))
    found = judged(f"launch.config={path}")
    assert problems(found) == []
    assert any("must know where to meet" in text for text, state in found.items() if state == "note")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems(judged("launch.engine=fsdp")) == []


def test_machines_that_are_to_meet() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        here = [finding.state for finding in rendezvous(f"127.0.0.1:{port}", 0)]
        assert here[0] == "problem"
        assert len(here) == 2, "the next port is prefopt's too"
        (there,) = rendezvous(f"127.0.0.1:{port}", 1)
        assert there.state == "note"
        assert "something answers" in there.text
    assert next(iter(rendezvous(f"127.0.0.1:{port}", 0))).state == "ok"
    (there,) = rendezvous(f"127.0.0.1:{port}", 1)
    assert there.state == "ok"
    assert "nothing waits" in there.text
    (unknown,) = rendezvous("no-such-host.invalid:29500", 1)
    assert unknown.state == "problem"
    foreign = list(rendezvous("192.0.2.1:29500", 0))
    assert "no address of this machine" in foreign[0].text


@pytest.mark.parametrize("adapter", [(), (LORA,)], ids=["all weights", "an adapter"])
def test_checkpoints_are_as_large_as_foretold(
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
    adapter: tuple[str, ...],
) -> None:
    # Of a rank at which files' heads, which are not foretold, do not matter.
    adapter = tuple(each.replace("r: 4", "r: 32") for each in adapter)
    outcome = run("sized", *adapter, "training.max_steps=1", "training.save_steps=1")
    recipe = load_recipe(outcome.run.recipe)
    foretold = checkpoint_bytes(recipe, shapes(tiny_world / "model"))
    (checkpoint,) = outcome.run.checkpoints.glob("checkpoint-*")
    names = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt")
    real = sum(file.stat().st_size for file in checkpoint.iterdir() if file.name in names)
    assert foretold == pytest.approx(real, rel=0.25)


def test_weights_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 500) + b"{")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert shapes(tmp_path) == {}
