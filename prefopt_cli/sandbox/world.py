"""A world on disk: base policy, prompts and the replies that preferences are made of.

It lies in the user's cache folder (``PREFOPT_CACHE`` moves it) and is made on first use. The folder's name is a
digest of everything that decides its content, so that another version makes another folder.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt_cli.errors import PrefoptError
from prefopt_cli.recipe.schemes import Progress
from prefopt_cli.runs import atomic, cache
from prefopt_cli.sandbox.grammar import Prompt
from prefopt_cli.sandbox.settings import STANDARD, WorldSettings

LIBRARIES = ("torch", "transformers", "tokenizers")
SOURCES = ("grammar.py", "settings.py", "base.py", "sampling.py", "making.py")
"""Whatever is written in these modules may change the world's content."""

DESCRIPTION = "world.json"
PARTS = (DESCRIPTION, "base/model.safetensors", "train.jsonl", "test.jsonl")
WAIT = 5
"""Seconds between two words about waiting."""


@dataclass(frozen=True)
class PoolRow:
    """A prompt and different replies of the base policy to it, in the order in which they were drawn."""

    prompt: Prompt
    replies: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """A finished world."""

    folder: Path
    seed: int

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def pool(self, split: str) -> list[PoolRow]:
        """The prompts of a split (train or test) with the base policy's replies."""
        rows = []
        with (self.folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append(PoolRow(Prompt(**row["prompt"]), tuple(row["replies"])))
        return rows


def world_folder(seed: int, settings: WorldSettings = STANDARD) -> Path:
    """Where this world lies or will lie."""
    parts = [json.dumps(asdict(settings), sort_keys=True)]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    parts += [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return cache.cache_folder() / "sandbox" / f"{digest}-seed{seed}"


def find_world(seed: int, settings: WorldSettings = STANDARD) -> World | None:
    """The world, if it has been made."""
    folder = world_folder(seed, settings)
    complete = all((folder / part).exists() for part in PARTS)
    return World(folder, seed) if complete else None


def open_world(
    seed: int,
    settings: WorldSettings = STANDARD,
    progress: Progress | None = None,
    *,
    rebuild: bool = False,
) -> World:
    """The world, made now if it has not been made before; that takes one or two minutes.

    Raises:
        PrefoptError: the cache folder cannot be written.
    """
    folder = world_folder(seed, settings)
    if not rebuild and (world := find_world(seed, settings)):
        return world
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, progress):
            # Another process may have made it while this one waited.
            if rebuild or find_world(seed, settings) is None:
                with atomic.folder(folder) as unfinished:
                    _fill(unfinished, seed, settings, progress)
    except OSError as error:
        raise PrefoptError(
            f"The sandbox cannot be written to {folder.parent}: {error.strerror or error}. "
            f"Make room there, or set {cache.VARIABLE} to another folder."
        ) from error
    return World(folder, seed)


@contextmanager
def _alone(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Only one process makes a world; the others wait for it."""
    lock = FileLock(f"{folder}.lock")
    task, waited = "waiting for another process that builds the sandbox (seconds)", 0
    while True:
        try:
            lock.acquire(timeout=WAIT)
            break
        except Timeout:
            waited += WAIT
            if progress:
                progress(task, waited, waited + 1)  # nobody knows for how long
    if waited and progress:
        progress(task, waited, waited)
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, seed: int, settings: WorldSettings, progress: Progress | None) -> None:
    from prefopt_cli.sandbox.making import make

    make(folder, seed, settings, progress)
    description = {
        "seed": seed,
        "settings": asdict(settings),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    atomic.write_json(folder / DESCRIPTION, description)
