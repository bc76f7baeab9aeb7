"""A task file for SkyPilot, from a recipe: machines of a cloud, prefopt on them, and one run on all of them."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import alone, job_name, require_one_line, run_manifest, words
from prefopt_cli.launch.installation import installation
from prefopt_cli.launch.local_files import absent_files
from prefopt_cli.launch.skypilot_mounts import as_file_mounts, output_mount, read_mounts
from prefopt_cli.recipe.schema import Recipe

ENVIRONMENT = "~/prefopt-environment"
SOURCE = "~/prefopt-source"
"""Where the folder that prefopt is installed from lies on the machines."""
PYTHON = ">=3.11,<3.14"
PORT = 29500
"""SkyPilot opens all ports between a cluster's own machines."""
ACCELERATORS = re.compile(r"[A-Za-z][A-Za-z0-9._-]*(:\d+)?")


@dataclass(frozen=True)
class SkyOptions:
    """What the task asks SkyPilot for."""

    nodes: int
    accelerators: str | None = None
    """H100:8; None: no GPUs."""
    cloud: str | None = None
    """As in SkyPilot's `infra`: aws, gcp/us-central1, k8s, lambda, ..."""
    spot: bool = False
    disk_size: int | None = None
    """GB."""
    mounts: Sequence[str] = ()
    """PLACE=SOURCE: buckets are mounted, local files and folders are copied."""
    volumes: Sequence[str] = ()
    """PLACE=NAME, of volumes that SkyPilot manages."""


def skypilot_task(recipe_path: str, overrides: Sequence[str], recipe: Recipe, options: SkyOptions) -> str:
    """The task file's text, in YAML.

    Args:
        recipe_path: as on a command line in the present folder, which becomes the task's working folder.
        overrides: of the recipe.
        recipe: what they make together.
        options: what to ask SkyPilot for.

    Raises:
        UserError: an option is nothing that SkyPilot understands, the recipe lies outside the present folder, or its
            output_dir where a run folder cannot lie.
    """
    path = _within_workdir(recipe_path)
    task: dict[str, Any] = {
        "name": job_name(recipe_path),
        "resources": _resources(options),
        "num_nodes": options.nodes,
        "workdir": ".",
    }
    installed = installation()
    mounts = read_mounts(options.mounts, options.volumes)
    copied = as_file_mounts(mounts, output_mount(recipe.output_dir, mounts, options.nodes))
    source = shlex.quote(installed.prefopt)
    if installed.folder is not None:
        in_workdir = installed.folder.resolve() == Path.cwd().resolve()
        source = "." if in_workdir else SOURCE  # whose ~ must stay unquoted
        if not in_workdir:
            copied[SOURCE] = str(installed.folder)
    if copied:
        task["file_mounts"] = copied
    if volumes := {each.place: each.source for each in mounts if each.kind == "volume"}:
        task["volumes"] = volumes
    arguments = [path, *overrides, *alone(recipe, options.nodes)]
    install = [
        "set -euo pipefail",
        # A machine's own Python may be too old; uv, which SkyPilot brings along, finds or fetches another.
        "export PATH=~/.local/bin:$PATH",
        "command -v uv > /dev/null || python3 -m pip install --user uv",
        f'[[ -e {ENVIRONMENT} ]] || uv venv --python "{PYTHON}" --seed {ENVIRONMENT}',
        f". {ENVIRONMENT}/bin/activate",
        *([f"pip install {words(installed.first)}"] if installed.first else []),
        f"pip install {words(installed.then)} {source}",
        f"prefopt doctor --quick {words(arguments)} || true",
    ]
    task["setup"] = "\n".join(install) + "\n"
    task["run"] = _run(arguments, recipe, options)
    trained = " ".join(recipe_path.split())
    head = [f"prefopt train {trained} on SkyPilot: {start_command(recipe_path, options, 'FILE')}"]
    head += [SPOT] if options.spot else []
    return "".join(f"# {line}\n" for line in head) + _as_yaml(task)


SPOT = "Only managed jobs replace a machine that is taken away; output_dir must outlive it, as in a bucket."


def start_command(recipe_path: str, options: SkyOptions, file: str) -> str:
    """What starts a task file: a managed job on spot machines, else a cluster that a second start finds again."""
    name, file = job_name(recipe_path), shlex.quote(file)
    return f"sky jobs launch --name {name} {file}" if options.spot else f"sky launch --cluster {name} {file}"


def notes(recipe_path: str, recipe: Recipe, options: SkyOptions) -> list[str]:
    """What may go wrong with the task on the machines, each with what to do."""
    mounts = read_mounts(options.mounts, options.volumes)
    found = absent_files(recipe_path, recipe, mounts)
    if output_mount(recipe.output_dir, mounts, options.nodes) is not None:
        return found
    place = f"output_dir {recipe.output_dir} lies on the machines' own disks, unless they have a shared one there."
    if options.nodes > 1:
        return [*found, f"{place} Several machines must share it: {IN_VOLUME}"]
    if options.spot:
        return [*found, f"{place} What is there is gone with a machine, at the job's end too: {IN_BUCKET}"]
    return found


IN_BUCKET = "mount a bucket, --mount /runs=s3://BUCKET, and add output_dir=/runs/NAME."
IN_VOLUME = "mount a volume of SkyPilot's, --volume /runs=VOLUME, and add output_dir=/runs/NAME."


def _within_workdir(recipe_path: str) -> str:
    """The recipe's path from the present folder, which is what is copied."""
    path, here = Path(recipe_path).expanduser().absolute(), Path.cwd()
    try:
        return str(path.resolve().relative_to(here.resolve()))
    except ValueError:
        raise UserError(
            f"{recipe_path} lies outside the present folder, which is what SkyPilot copies to its machines. Go to a "
            "folder that holds the recipe and its data."
        ) from None


def _resources(options: SkyOptions) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if options.accelerators is not None:
        if not ACCELERATORS.fullmatch(options.accelerators):
            raise UserError(
                f"--accelerators: expected NAME:COUNT, as in H100:8, found {options.accelerators!r}."
            )
        resources["accelerators"] = options.accelerators
    if options.cloud is not None:
        require_one_line("--cloud", options.cloud)
        resources["infra"] = options.cloud
    if options.spot:
        resources["use_spot"] = True
    if options.disk_size is not None:
        resources["disk_size"] = options.disk_size
    return resources


def _run(arguments: Sequence[str], recipe: Recipe, options: SkyOptions) -> str:
    lines = ["set -euo pipefail", f". {ENVIRONMENT}/bin/activate"]
    lines.append(f"command=(prefopt train {words(arguments)})")
    if options.accelerators is not None:
        lines.append('command+=("launch.processes=$SKYPILOT_NUM_GPUS_PER_NODE")')
    if options.nodes > 1:
        lines += [
            "# Machine 0 is the first one; prefopt uses its port and the next.",
            'mapfile -t hosts <<< "$SKYPILOT_NODE_IPS"',
            f'command+=("launch.machines=$SKYPILOT_NUM_NODES" "launch.rendezvous=${{hosts[0]}}:{PORT}")',
            'command+=("launch.machine_rank=$SKYPILOT_NODE_RANK")',
        ]
    lines += [
        "# A run that has begun is gone on with: a spot machine may be taken away.",
        f"manifest={run_manifest(recipe)}",
        'if [[ -e "$manifest" ]]; then command+=(--resume); fi',
        'exec "${command[@]}"',
    ]
    return "\n".join(lines) + "\n"


def _as_yaml(task: dict[str, Any]) -> str:
    """Scripts as blocks, one line a line."""
    import yaml

    class Blocks(yaml.SafeDumper):
        pass

    def scalar(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Blocks.add_representer(str, scalar)
    return yaml.dump(task, Dumper=Blocks, sort_keys=False, allow_unicode=True, width=10_000)
