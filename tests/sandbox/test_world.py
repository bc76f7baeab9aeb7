"""Building a world: the same bytes anywhere, whole or not at all, and without the network."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.sandbox import base, making, world
from prefopt_cli.sandbox.grammar import Prompt, parse_prompt
from prefopt_cli.sandbox.names import SPLITS
from prefopt_cli.sandbox.sampling import Sample
from prefopt_cli.sandbox.settings import BaseSettings, WorldSettings
from prefopt_cli.sandbox.world import World, find_world, open_world, world_folder
from tests.conftest import REPOSITORY
from tests.sandbox.build import TINY

PROGRAM = "from prefopt_cli.sandbox.world import open_world; from tests.sandbox.build import TINY; open_world(0, TINY)"


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder with a digest of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_another_process(cache: Path, **variables: str) -> "subprocess.Popen[str]":
    """A process that builds the tiny world in this cache folder."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        env={**os.environ, "PREFOPT_CACHE": str(cache), **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: "subprocess.Popen[str]") -> None:
    """Wait for the process; it must end well."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world of seed 0, only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("tiny-sandbox")))
        return open_world(0, TINY)


@pytest.fixture
def copied(tiny: World, cache: Path) -> World:
    """The tiny world in this test's own cache."""
    shutil.copytree(tiny.folder, world_folder(0, TINY))
    return World(world_folder(0, TINY), 0)


def left_behind(cache: Path) -> list[Path]:
    """What lies in the cache. A lock is nothing: an empty file that tells the next builder that it may begin."""
    return [path for path in (cache / "sandbox").iterdir() if path.suffix != ".lock"]


def made_up_samples(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    count: int,
    *,
    texts: tuple[str, ...],
    task: str,
    progress: Any = None,
    **rest: Any,
) -> list[list[Sample]]:
    """In the place of `sample_replies`, where it does not matter what a policy says."""
    if progress:
        progress(task, len(prompts), len(prompts))
    return [[Sample(prompt, texts[n % len(texts)], ()) for n in range(count)] for prompt in prompts]


@pytest.fixture
def quick_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy gives the same four replies at once."""
    texts = (" Hello.", " Hello. Hello.", " What is it now?", " We will refund your lamp.")
    monkeypatch.setattr(making, "sample_replies", partial(made_up_samples, texts=texts))


def test_what_lies_there(tiny: World) -> None:
    assert set(digests(tiny.folder)) == {
        "base/config.json",
        "base/generation_config.json",
        "base/model.safetensors",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "test.jsonl",
        "train.jsonl",
        "world.json",
    }
    description = json.loads((tiny.folder / "world.json").read_text())
    assert description["seed"] == 0
    assert description["settings"]["base_prompts"] == 64
    assert description["libraries"]["torch"] == torch.__version__


def test_the_same_bytes_again(tiny: World, cache: Path) -> None:
    """In another folder, with another random state and number of threads, none of which it disturbs."""
    threads = torch.get_num_threads()
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    torch.set_num_threads(3)
    try:
        again = open_world(0, TINY)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.folder.is_relative_to(cache)
    assert digests(again.folder) == digests(tiny.folder)


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_same_bytes_whatever_the_environment_says(tiny: World, cache: Path, threads: str) -> None:
    finished(in_another_process(cache, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, PYTHONHASHSEED="7"))
    assert digests(world_folder(0, TINY)) == digests(tiny.folder)


def test_another_seed_is_another_world(tiny: World, cache: Path) -> None:
    other = open_world(1, TINY)
    own = digests(tiny.folder)
    different = {name for name, digest in digests(other.folder).items() if digest != own[name]}
    assert different == {"base/model.safetensors", "test.jsonl", "train.jsonl", "world.json"}


def test_every_setting_and_version_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {
        world_folder(0, TINY),
        world_folder(1, TINY),
        world_folder(0),
        world_folder(0, WorldSettings(base=BaseSettings(steps=899))),
    }
    monkeypatch.setattr(world.importlib.metadata, "version", lambda name: "99.0")
    folders.add(world_folder(0, TINY))
    assert len(folders) == 5


def test_prompts_of_the_splits_and_of_the_base_are_different(
    cache: Path, monkeypatch: pytest.MonkeyPatch, quick_sampling: None
) -> None:
    learned: list[Prompt] = []
    build = base.build

    def spy(folder: Path, prompts: list[Prompt], *rest: Any) -> None:
        learned.extend(prompts)
        build(folder, prompts, *rest)

    monkeypatch.setattr(making.base, "build", spy)
    made = open_world(0, TINY)
    texts = [{prompt.text for prompt in learned}]
    texts += [{row.prompt.text for row in made.pool(split)} for split in SPLITS]
    assert [len(one) for one in texts] == [64, 8, 4]
    assert len(set.union(*texts)) == 64 + 8 + 4


def test_pool_rows_are_read_as_they_were_made(tiny: World) -> None:
    for split in SPLITS:
        for row in tiny.pool(split):
            assert parse_prompt(row.prompt.text) == row.prompt
            assert len(set(row.replies)) == len(row.replies) == 4


def test_a_prompt_with_too_few_different_replies_is_left_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "sample_replies", partial(made_up_samples, texts=(" Hello.",)))
    assert open_world(0, TINY).pool("train") == []


def test_it_is_made_once(copied: World, quick_sampling: None) -> None:
    told: list[str] = []

    def progress(task: str, done: int, total: int) -> None:
        told.append(task)

    assert open_world(0, TINY, progress) == copied
    assert told == []
    mark = copied.folder / "mark"
    mark.touch()
    assert open_world(0, TINY, progress) == copied
    assert mark.exists()
    open_world(0, TINY, progress, rebuild=True)
    assert not mark.exists()
    assert set(told) == {
        "training the sandbox's base policy",
        "sampling the sandbox's train replies",
        "sampling the sandbox's test replies",
    }


def interrupt(beginning: str) -> Callable[[str, int, int], None]:
    """Ctrl-C in the task that begins like this."""

    def progress(task: str, done: int, total: int) -> None:
        if task.startswith(beginning):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("part", [*world.PARTS, world.DESCRIPTION])
def test_a_world_that_lacks_something_is_none(copied: World, part: str) -> None:
    """Somebody emptied the cache half, or a disk ran full under it: such a world is made anew."""
    whole = (copied.folder / part).read_bytes()
    (copied.folder / part).write_bytes(whole[:-2])
    assert find_world(0, TINY) is None
    (copied.folder / part).unlink()
    assert find_world(0, TINY) is None
    (copied.folder / part).write_bytes(whole)
    assert find_world(0, TINY) == copied


@pytest.mark.parametrize(
    "text", ["{\n", "3\n", "{}\n", '{"prompt": {}, "replies": []}\n', "\udcff"], ids=lambda text: repr(text)
)
def test_a_damaged_file_is_named_and_the_remedy_with_it(copied: World, text: str) -> None:
    path = copied.folder / "test.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        PrefoptError, match=r"test\.jsonl cannot be read .*: prefopt sandbox build --rebuild$"
    ):
        copied.pool("test")
    with pytest.raises(PrefoptError, match=r" --rebuild --seed 7$"):
        World(copied.folder, 7).pool("test")
    path.unlink()
    with pytest.raises(PrefoptError, match=r"--rebuild$"):
        copied.pool("test")


@pytest.mark.parametrize("beginning", ["training", "sampling"])
def test_an_interrupted_build_leaves_nothing(cache: Path, quick_sampling: None, beginning: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_world(0, TINY, interrupt(beginning))
    assert find_world(0, TINY) is None
    assert left_behind(cache) == []
    assert len(open_world(0, TINY).pool("train")) == 8
    assert left_behind(cache) == [world_folder(0, TINY)]


def test_an_interrupted_rebuild_keeps_the_old_world(tiny: World, copied: World, cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_world(0, TINY, interrupt("training"), rebuild=True)
    assert find_world(0, TINY) == copied
    assert digests(copied.folder) == digests(tiny.folder)
    assert left_behind(cache) == [copied.folder]


@pytest.mark.slow
def test_a_killed_build_does_not_hinder_the_next(tiny: World, cache: Path) -> None:
    """What cannot clean up after itself is cleaned up by who comes next."""
    process = in_another_process(cache)
    deadline = time.monotonic() + 120
    while not list(cache.glob("sandbox/.*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert find_world(0, TINY) is None
    made = open_world(0, TINY)
    assert digests(made.folder) == digests(tiny.folder)
    assert left_behind(cache) == [made.folder]


@pytest.mark.slow
def test_two_builders_at_once(tiny: World, cache: Path) -> None:
    for process in [in_another_process(cache), in_another_process(cache)]:
        finished(process)
    assert digests(world_folder(0, TINY)) == digests(tiny.folder)
    assert left_behind(cache) == [world_folder(0, TINY)]


@pytest.mark.parametrize("blocked", ["", "sandbox"])
def test_a_cache_that_cannot_be_written(cache: Path, blocked: str) -> None:
    """A file stands where a folder should be, which stops every user, root too."""
    in_the_way = cache / blocked
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_text("no folder")
    with pytest.raises(PrefoptError, match="PREFOPT_CACHE") as caught:
        open_world(0, TINY)
    assert not isinstance(caught.value, UserError)
    assert str(cache / "sandbox") in str(caught.value)
    assert in_the_way.read_text() == "no folder"


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch, quick_sampling: None) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "_write", full)
    with pytest.raises(PrefoptError, match=r"No space left on device.*PREFOPT_CACHE"):
        open_world(0, TINY)
    assert left_behind(cache) == []


def test_nothing_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch, quick_sampling: None) -> None:
    """Nobody opens a connection, even where the hub may be asked."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **named: Any) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    open_world(0, TINY)
    assert asked == []


def test_a_world_can_be_moved_with_its_cache(tiny: World, copied: World) -> None:
    """No file says where it lies."""
    assert find_world(0, TINY) == copied
    assert copied.pool("test") == tiny.pool("test")
    for name in digests(copied.folder):
        assert str(tiny.folder).encode() not in (copied.folder / name).read_bytes()


def test_whoever_waits_for_another_builder_is_told_and_takes_its_world(
    tiny: World, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy:
        """The lock of another process, which finishes while this one waits for the second time."""

        waits = 0

        def __init__(self, path: str) -> None: ...

        def acquire(self, timeout: float) -> None:
            Busy.waits += 1
            if Busy.waits < 3:
                raise world.Timeout("lock")
            shutil.copytree(tiny.folder, world_folder(0, TINY))

        def release(self) -> None: ...

    told: list[str] = []
    monkeypatch.setattr(world, "FileLock", Busy)
    found = open_world(0, TINY, lambda task, done, total: told.append(f"{task}: {done}"))
    assert found.pool("train") == tiny.pool("train")
    assert told == [
        f"waiting for another process that builds the sandbox (seconds): {seconds}" for seconds in (5, 10, 10)
    ]


def test_a_full_disk_is_told_before_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(world.shutil, "disk_usage", lambda place: full)
    told: list[str] = []
    with pytest.raises(PrefoptError, match=r"No space left on device.*PREFOPT_CACHE"):
        open_world(0, TINY, lambda task, done, total: told.append(task))
    assert told == []
    assert not world_folder(0, TINY).exists()
