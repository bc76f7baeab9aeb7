"""A world on disk: base policy, prompts and the replies that preferences are made of.

It lies in the user's cache folder (``PREFOPT_CACHE`` moves it) and is made on first use. The folder's name is a
digest of everything that decides its content, so that another version makes another folder.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
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
PARTS = (
    "base/config.json",
    "base/model.safetensors",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "train.jsonl",
    "test.jsonl",
)
"""Files without which a world is of no use."""
ROOM = 20_000_000
"""Bytes that must be free; a world takes 2.5 million."""
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
        """The prompts of a split (train or test) with the base policy's replies.

        Raises:
            PrefoptError: the file was damaged or taken away since it was made.
        """
        path = self.folder / f"{split}.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [PoolRow(Prompt(**row["prompt"]), tuple(row["replies"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            seed = f" --seed {self.seed}" if self.seed else ""
            raise PrefoptError(
                f"The sandbox in the cache is damaged: {path} cannot be read ({error}). "
                f"Make it anew: prefopt sandbox build --rebuild{seed}"
            ) from error


def world_folder(seed: int, settings: WorldSettings = STANDARD) -> Path:
    """Where this world lies or will lie."""
    parts = [json.dumps(asdict(settings), sort_keys=True)]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    parts += [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return cache.cache_folder() / "sandbox" / f"{digest}-seed{seed}"


def find_world(seed: int, settings: WorldSettings = STANDARD) -> World | None:
    """The world, if it has been made and no file of it was taken away or cut off since."""
    folder = world_folder(seed, settings)
    return World(folder, seed) if _is_whole(folder) else None


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
                # Before a minute of work, and in time for libraries that report a full disk in words of their own.
                if shutil.disk_usage(folder.parent).free < ROOM:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with atomic.folder(folder) as unfinished:
                    _fill(unfinished, seed, settings, progress)
    except OSError as error:
        raise PrefoptError(
            f"The sandbox cannot be written to {folder.parent}: {error.strerror or error}. "
            f"Make room there, or set {cache.VARIABLE} to another folder."
        ) from error
    return World(folder, seed)


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["bytes"]
        return bool(sizes == _sizes(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {part: (folder / part).stat().st_size for part in PARTS}


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
        "bytes": _sizes(folder),
    }
    atomic.write_json(folder / DESCRIPTION, description)
