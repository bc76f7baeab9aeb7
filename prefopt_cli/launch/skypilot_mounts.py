"""Where files lie on SkyPilot's machines: in buckets, in volumes, as copies, in the copied present folder."""

import os.path
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from prefopt_cli.errors import UserError

WORKDIR = "~/sky_workdir"
"""What the present folder is called on the machines; scripts run in it."""
MOUNT = re.compile(r"(?P<place>[/~][^=]*)=(?P<source>.+)", re.DOTALL)
BUCKET = re.compile(r"[a-z0-9]+://.+")
VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Mount:
    """Something that a path of the machines leads to."""

    place: str
    """The path, without a slash at its end."""
    source: str
    """A bucket's address, a volume's name, or a path here."""
    kind: Literal["bucket", "volume", "files"]


def read_mounts(mounts: Iterable[str], volumes: Iterable[str]) -> list[Mount]:
    """What --mount and --volume say.

    Raises:
        UserError: one of them is not written as PLACE=SOURCE or PLACE=NAME.
    """
    found = []
    for text in mounts:
        match = MOUNT.fullmatch(text)
        if match is None:
            raise UserError(f"--mount: expected PLACE=SOURCE, as in /data=s3://bucket, found {text!r}.")
        source = match["source"]
        kind: Literal["bucket", "files"] = "bucket" if BUCKET.fullmatch(source) else "files"
        found.append(Mount(_bare(match["place"]), _bare(source), kind))
    for text in volumes:
        match = MOUNT.fullmatch(text)
        if match is None or not match["place"].startswith("/") or not VOLUME.fullmatch(match["source"]):
            raise UserError(
                f"--volume: expected PLACE=NAME, a path from the root and a volume of `sky volumes ls`, as in "
                f"/runs=my-volume, found {text!r}."
            )
        found.append(Mount(_bare(match["place"]), match["source"], "volume"))
    return found


def _bare(path: str) -> str:
    """Without slashes at the end, which SkyPilot refuses."""
    return path.rstrip("/") or "/"


def place_of(path: str) -> PurePosixPath:
    """Where the machines look for a path of the recipe."""
    return PurePosixPath(os.path.normpath(path if path.startswith(("/", "~")) else f"{WORKDIR}/{path}"))


def mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that holds a path of the recipe: the deepest of several."""
    place = place_of(path)
    holding = [each for each in mounts if place.is_relative_to(each.place)]
    return max(holding, key=lambda each: len(PurePosixPath(each.place).parts), default=None)


def output_mount(output_dir: str, mounts: Sequence[Mount], nodes: int) -> Mount | None:
    """What keeps the run folder when the machines are gone: a bucket or a volume; None where nothing does.

    Raises:
        UserError: the run folder cannot lie there.
    """
    found = mount_of(output_dir, mounts)
    if found is None or found.kind == "files":
        return None
    if place_of(output_dir) == PurePosixPath(found.place):
        raise UserError(
            f"output_dir {output_dir} is the very place of a mount, which a run folder cannot take: add "
            f"output_dir={found.place}/NAME."
        )
    if nodes > 1 and found.kind == "bucket":
        raise UserError(
            f"output_dir {output_dir} lies in the bucket {found.source}, where several machines cannot share a run "
            "folder: each would see late, or never, what another one writes. Put a volume of SkyPilot's there "
            f"instead (--volume {found.place}=NAME; on Kubernetes with access mode ReadWriteMany), or name a folder of "
            "a disk that the machines share already, as NFS."
        )
    return found


def as_file_mounts(mounts: Iterable[Mount], output: Mount | None) -> dict[str, Any]:
    """The entries of `file_mounts`, for all but volumes."""
    entries: dict[str, Any] = {}
    for each in mounts:
        if each.kind == "files":
            entries[each.place] = each.source
        elif each.kind == "bucket":
            entries[each.place] = {"source": each.source, **(WRITTEN if each == output else READ)}
    return entries


READ = {"mode": "MOUNT"}
"""Files are fetched as they are read. Nothing can be appended to one."""
WRITTEN = {"mode": "MOUNT_CACHED", "config": {"mount_cached": {"transfers": 1}}}
"""Files lie on the machine's disk and are uploaded in the background, in the order in which they were written: the mark
of a checkpoint, which says that it is complete, comes last."""
