"""Which policy a recipe starts from, and therefore which policy is its reference.

Nothing here loads weights or imports anything heavy.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings, QuantizationSettings
from prefopt_cli.recipe.schemes import Progress, find_scheme
from prefopt_cli.runs.folder import RunFolder

SAMPLE = 2**20

NOT_OF_THE_POLICY = {
    "_name_or_path", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Settings in files of models and adapters that may change where the policy does not."""

MERGE_RECORD = "prefopt_merge.json"
"""In a folder that `prefopt merge` made: the run whose policy it is, and that run's lineage."""

QUANTIZATION_RECORD = "prefopt_quantization.json"
"""In the folder of a run's adapter: how the weights that it was trained on were quantised while they were loaded."""


@dataclass(frozen=True)
class PolicySource:
    """The starting policy: full weights, an adapter on top of them or not, and the run they came from."""

    weights: str
    """Hub id or folder of the full model."""
    adapter: Path | None = None
    """Folder of a trained adapter that belongs to the policy."""
    run: Path | None = None
    """Run folder that the policy was taken from."""
    name: str | None = None
    """The name of the full model, where a scheme gave it one: the folder means little to a reader."""
    quantization: QuantizationSettings | None = None
    """How the full model's weights are quantised while they are loaded; None: they are as they were saved."""

    @property
    def is_local(self) -> bool:
        """Whether the full weights lie in a folder (no hub is asked)."""
        return Path(self.weights).is_dir()

    @property
    def place(self) -> str:
        """Where the full weights are, for messages about what is wrong with them."""
        return f"{self.name} ({self.weights})" if self.name else self.weights

    def describe(self) -> str:
        """One line for logs, manifest and model card."""
        text = self.name or self.weights
        if self.quantization is not None:
            text += f", quantised: {self.quantization.describe()},"
        if self.adapter is not None:
            text += f" with the adapter {self.adapter}"
        return text.removesuffix(",") + (f" (run {self.run})" if self.run is not None else "")


def find_policy(
    settings: ModelSettings, progress: Progress | None = None, *, key: str = "model.name_or_path"
) -> PolicySource:
    """Resolve ``model.name_or_path``: run folder, adapter folder, model folder, hub id or a scheme's name.

    ``progress`` is told of a scheme's work on a model that it makes at its first use; ``key`` is what names the
    policy, for messages.

    Raises:
        UserError: a folder that is none of these, an unfinished run, or a path or name that does not exist.
    """
    name = settings.name_or_path
    if named := find_scheme(name, "model"):
        return PolicySource(str(named.scheme.model_folder(named.name, progress)), name=name)
    path = Path(name).expanduser()
    run = RunFolder(path)
    if run.is_run():
        return policy_of_run(run, progress, key=key)
    if path.is_dir():
        return _in_folder(path, None, key)
    if path.exists():
        raise UserError(f"{key}: {name} is a file; name the folder that holds config.json.")
    if not _may_be_hub_id(name):
        raise UserError(f"{key}: there is no folder {name} in {Path.cwd()}.{near_folder(path)}")
    return PolicySource(name)


def policy_of_run(
    run: RunFolder, progress: Progress | None = None, *, key: str = "model.name_or_path"
) -> PolicySource:
    """A finished run's policy. Its adapter lies on the weights that it started from, by whatever name they had, and
    as the run quantised them.

    Raises:
        UserError: the run is not finished, or what its adapter lies on is not there any more.
    """
    manifest = run.read_manifest()
    if manifest.get("status", "finished") != "finished" or not run.model.is_dir():
        raise UserError(
            f"{key}: the run {run.path} has no finished policy (its status is {manifest.get('status', 'unknown')!r}). "
            "Finish it with `prefopt train RECIPE --resume`, or name another one."
        )
    lineage = manifest.get("lineage", {})
    name, weights = lineage.get("name"), Path(lineage.get("weights", ""))
    if not (run.model / "adapter_config.json").is_file():
        return _in_folder(run.model, run.path, key)
    named = find_scheme(name, "model") if name is not None and not weights.is_dir() else None
    if named:  # the cache was moved, or the scheme makes another model now
        made = named.scheme.model_folder(named.name, progress)
        source = PolicySource(str(made), run.model, run.path, name)
    else:
        source = _in_folder(run.model, run.path, key)
        if Path(source.weights).resolve() == weights.resolve():
            source = replace(source, name=name)
    _require_same_weights(source, lineage.get("weights_fingerprint"), run)
    return replace(source, quantization=recorded_quantization(lineage))


def recorded_quantization(lineage: Mapping[str, Any]) -> QuantizationSettings | None:
    """How a run quantised the weights below its adapter, from what its manifest says of its lineage."""
    found = lineage.get("quantization")
    try:
        return QuantizationSettings.model_validate(found) if found else None
    except ValidationError as error:
        raise UserError(
            "A run's manifest.json does not say how its weights were quantised (lineage.quantization): "
            f"{error.errors()[0]['msg']}. Restore it, or train the run anew."
        ) from error


def _require_same_weights(source: PolicySource, recorded: str | None, run: RunFolder) -> None:
    """Refuse to put a trained adapter on weights that it was not trained on; of the hub's only the name is known."""
    from_folder = recorded is not None and "@" not in recorded
    if source.is_local and from_folder and fingerprint(PolicySource(source.weights), None) != recorded:
        raise UserError(
            f"The run {run.path} trained an adapter on {source.place} as it was then, and that is not there any more: "
            "other weights lie there now. Put the old ones back, or train the run anew."
        )


def _in_folder(folder: Path, run: Path | None, key: str = "model.name_or_path") -> PolicySource:
    if (folder / "adapter_config.json").is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{folder}/adapter_config.json does not name its base model (base_model_name_or_path)."
            )
        if not Path(base).is_dir() and not _may_be_hub_id(base):
            raise UserError(
                f"The adapter {folder} belongs to the base model {base}, which is not there. Put it back, or "
                "correct base_model_name_or_path in its adapter_config.json."
            )
        return PolicySource(base, folder, run, quantization=_below(folder) if run is None else None)
    if (folder / "config.json").is_file():
        return PolicySource(str(folder), None, run)
    raise UserError(
        f"{key}: the folder {folder} holds no model (neither config.json nor adapter_config.json)."
    )


def _below(folder: Path) -> QuantizationSettings | None:
    """How the weights below a run's adapter are quantised, where the adapter's own folder is named, or a copy of it."""
    path = folder / QUANTIZATION_RECORD
    if path.is_file():
        try:
            return QuantizationSettings.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise UserError(
                f"{path} does not say how the weights below the adapter were quantised: {reason}. Restore it from "
                "the run that trained the adapter."
            ) from error
    run = RunFolder(folder.parent)
    if run.model != folder or not run.is_run():
        return None
    return recorded_quantization(run.read_manifest().get("lineage", {}))


def write_quantization(folder: Path, quantization: QuantizationSettings) -> None:
    """Say in an adapter's folder how the weights below it are quantised: wherever the folder goes, that goes along."""
    text = json.dumps(quantization.model_dump(), indent=2)
    (folder / QUANTIZATION_RECORD).write_text(f"{text}\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a trained adapter.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/adapter_config.json cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def merge_record(folder: str | Path) -> dict[str, Any] | None:
    """What `prefopt merge` wrote down of the run whose policy lies in the folder; None where it made none.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(folder) / MERGE_RECORD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else None


def has_fingerprint(source: PolicySource, recorded: str | None) -> bool:
    """Whether the policy is the one with this fingerprint; the commit of a hub model is taken on trust."""
    if recorded is None:
        return False
    own = fingerprint(source, None)
    if source.is_local:
        return own == recorded
    return recorded.startswith(f"{source.weights}@") and recorded.split(" ")[-1] == own.split(" ")[-1]


def fingerprint(source: PolicySource, commit: str | None) -> str:
    """What tells the policy from one that later lies in the same place.

    Of local weights and adapters, size and the first and last mebibyte of every file are hashed, which a
    training run changes, and their settings; of a hub model the commit is taken. How the weights are quantised while
    they are loaded counts, too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in (Path(source.weights), source.adapter):
        if folder is None or not folder.is_dir():
            continue
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(SAMPLE))
                opened.seek(max(size - SAMPLE, 0))
                digest.update(opened.read(SAMPLE))
        for name in ("config.json", "adapter_config.json"):
            digest.update(_settings(folder / name))
    if source.quantization is not None:
        digest.update(json.dumps(source.quantization.of_weights(), sort_keys=True).encode())
    return digest.hexdigest() if source.is_local else f"{source.weights}@{commit} {digest.hexdigest()}"


def _settings(file: Path) -> bytes:
    """What a settings file says of the policy: without names of places and versions."""
    if not file.is_file():
        return b""
    content = file.read_bytes()
    try:
        found = json.loads(content)
    except ValueError:
        return content
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key not in NOT_OF_THE_POLICY}
    return json.dumps(found, sort_keys=True).encode()


def describe_reference(source: PolicySource, adapter: LoraAdapter | str, *, stacked: bool = False) -> str:
    """Exactly which policy is the reference, in words; `stacked`: a new adapter goes on top of the policy's own."""
    if stacked:
        return f"{source.describe()}; that adapter stays, and a new one is trained on top"
    if isinstance(adapter, LoraAdapter):
        if source.adapter is None:
            return f"{source.describe()}, computed with the new adapter switched off"
        return f"{source.describe()}: that adapter as it is at the start, on the same weights"
    merged = ", the adapter merged into the weights" if source.adapter else ""
    return f"{source.describe()}{merged}, as it is at the start"


def _may_be_hub_id(name: str) -> bool:
    """`name` or `owner/name`, and nothing that can only be a path."""
    return name.count("/") <= 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def near_folder(path: Path) -> str:
    """A sentence that suggests a folder of nearly this name, or nothing."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(
        path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()], 1
    )
    return f" Did you mean {path.parent / near[0]}?" if near else ""
