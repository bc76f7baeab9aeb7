"""Which policy a recipe starts from, and what its reference is; no weights anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.models.adapters import require_same_adapter
from prefopt_cli.models.policy import (
    PolicySource,
    describe_reference,
    find_policy,
    fingerprint,
)
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings

LORA = LoraAdapter(type="lora", r=4, lora_alpha=8)


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def _adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _run(folder: Path, status: str, **others: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": status, **others}))
    return folder


def _find(name: object) -> PolicySource:
    return find_policy(ModelSettings(name_or_path=str(name)))


def test_a_model_folder(tmp_path: Path) -> None:
    model = _model(tmp_path / "m")
    assert _find(model) == PolicySource(str(model))
    assert _find(model).is_local


def test_an_adapter_folder_names_its_base(tmp_path: Path) -> None:
    base = _model(tmp_path / "base")
    adapter = _adapter(tmp_path / "a", base_model_name_or_path=str(base))
    assert _find(adapter) == PolicySource(str(base), adapter)
    on_the_hub = _adapter(tmp_path / "b", base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    assert _find(on_the_hub) == PolicySource("Qwen/Qwen2.5-0.5B", on_the_hub)
    assert not _find(on_the_hub).is_local


def test_run_folders(tmp_path: Path) -> None:
    full = _run(tmp_path / "full", "finished")
    _model(full / "model")
    assert _find(full) == PolicySource(str(full / "model"), None, full)
    lora = _run(tmp_path / "lora", "finished")
    _adapter(lora / "model", base_model_name_or_path=str(full / "model"))
    assert _find(lora) == PolicySource(str(full / "model"), lora / "model", lora)


@pytest.mark.usefixtures("toy_scheme")
def test_a_schemes_model_is_called_by_its_name(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    name = f"toy:{tmp_path}/m"
    found = find_policy(ModelSettings(name_or_path=name), lambda *step: seen.append(step))
    assert found == PolicySource(f"{tmp_path}/m", name=name)
    assert found.is_local
    assert describe_reference(found, "none") == f"{name}, as it is at the start"
    assert seen == [("making a toy model", 1, 1)]


@pytest.mark.usefixtures("toy_scheme")
def test_an_adapter_on_a_schemes_model(tmp_path: Path) -> None:
    """It keeps the model's name through its run, and the model is made again where it is gone."""
    base, name = tmp_path / "cache" / "m", f"toy:{tmp_path}/cache/m"
    run = _run(tmp_path / "run", "finished", lineage={"name": name, "weights": str(base)})
    adapter = _adapter(run / "model", base_model_name_or_path=str(base))
    assert _find(run) == PolicySource(str(base), adapter, run, name)
    assert (base / "config.json").is_file()
    elsewhere = _model(tmp_path / "elsewhere")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(elsewhere)}))
    assert _find(run) == PolicySource(str(elsewhere), adapter, run)


@pytest.mark.usefixtures("toy_scheme")
def test_an_adapter_follows_its_schemes_model_to_another_place(tmp_path: Path) -> None:
    """As after the cache was moved; but only onto the very weights that it was trained on."""
    now, gone = _model(tmp_path / "now"), tmp_path / "gone"
    (now / "model.safetensors").write_bytes(b"the same weights")
    lineage = {
        "name": f"toy:{now}",
        "weights": str(gone),
        "weights_fingerprint": fingerprint(PolicySource(str(now)), None),
    }
    run = _run(tmp_path / "run", "finished", lineage=lineage)
    adapter = _adapter(run / "model", base_model_name_or_path=str(gone))
    assert _find(run) == PolicySource(str(now), adapter, run, f"toy:{now}")
    (now / "model.safetensors").write_bytes(b"other weights..")
    with pytest.raises(UserError, match="other weights"):
        _find(run)


def test_an_adapter_stays_on_the_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    base = _model(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"the weights then")
    lineage = {"weights": str(base), "weights_fingerprint": fingerprint(PolicySource(str(base)), None)}
    run = _run(tmp_path / "run", "finished", lineage=lineage)
    adapter = _adapter(run / "model", base_model_name_or_path=str(base))
    assert _find(run) == PolicySource(str(base), adapter, run)
    (base / "model.safetensors").write_bytes(b"trained anew....")
    with pytest.raises(UserError, match=r"trained an adapter on .*base as it was then.*other weights"):
        _find(run)


@pytest.mark.usefixtures("toy_scheme")
def test_full_weights_of_a_run_are_no_longer_the_schemes_model(tmp_path: Path) -> None:
    base = tmp_path / "gone"
    run = _run(tmp_path / "run", "finished", lineage={"name": f"toy:{base}", "weights": str(base)})
    model = _model(run / "model")
    assert _find(run) == PolicySource(str(model), None, run)
    assert not base.exists()


def test_hub_ids() -> None:
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B"):
        assert _find(name) == PolicySource(name)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _model(tmp_path / "m")
    assert _find("~/m").weights == str(tmp_path / "m")


def test_places_that_hold_no_policy(tmp_path: Path) -> None:
    _model(tmp_path / "tiny-model")
    (tmp_path / "weights.bin").write_text("")
    (tmp_path / "void").mkdir()
    missing_base = _adapter(tmp_path / "a", base_model_name_or_path="/gone/base")
    unnamed_base = _adapter(tmp_path / "b")
    broken = _adapter(tmp_path / "c")
    (broken / "adapter_config.json").write_text("{oops")
    for place, words in {
        tmp_path / "tiny-modle": "Did you mean .*tiny-model",
        tmp_path / "no" / "such" / "place": "there is no folder",
        tmp_path / "weights.bin": "is a file",
        tmp_path / "void": "holds no model",
        missing_base: "/gone/base, which is not there",
        unnamed_base: "base_model_name_or_path",
        broken: "cannot be read",
        _run(tmp_path / "run", "interrupted"): "'interrupted'.*--resume",
        "./nothing": "there is no folder",
        "a/b/c": "there is no folder",
        "moon:base": "'moon' is not a known kind of model",
        "sandbox:helpful": "sandbox:helpful is a dataset",
    }.items():
        with pytest.raises(UserError, match=words):
            _find(place)


@pytest.mark.parametrize(
    ("trained", "adapter", "expected"),
    [
        (None, "none", "base, as it is at the start"),
        (None, LORA, "base, computed with the new adapter switched off"),
        (
            Path("old"),
            "none",
            "base with the adapter old, the adapter merged into the weights, as it is at the start",
        ),
        (
            Path("old"),
            LORA,
            "base with the adapter old: that adapter as it is at the start, on the same weights",
        ),
    ],
)
def test_the_reference_in_words(trained: Path | None, adapter: LoraAdapter | str, expected: str) -> None:
    assert describe_reference(PolicySource("base", trained), adapter) == expected


def test_the_adapter_in_place_must_be_the_one_described(tmp_path: Path) -> None:
    saved = {
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "use_dora": False,
        "target_modules": ["v_proj", "q_proj"],
    }
    source = PolicySource("base", _adapter(tmp_path / "a", **saved))
    require_same_adapter(source, LORA)
    require_same_adapter(source, LORA.model_copy(update={"target_modules": ["q_proj", "v_proj"]}))
    require_same_adapter(PolicySource("base"), LORA.model_copy(update={"r": 64}))
    for change, words in (
        ({"r": 8}, "r is 4, not 8"),
        ({"lora_alpha": 16}, "lora_alpha is 8, not 16"),
        ({"use_dora": True}, "use_dora is False, not True"),
        ({"target_modules": ["q_proj"]}, "target_modules is"),
        ({"r": 8, "lora_alpha": 16}, "r is 4, not 8; lora_alpha is 8, not 16"),
    ):
        with pytest.raises(UserError, match=words):
            require_same_adapter(source, LORA.model_copy(update=change))


def test_an_adapter_with_trained_biases_does_not_go_on(tmp_path: Path) -> None:
    """Switched off or copied, its biases would stay trained in the reference."""
    source = PolicySource("base", _adapter(tmp_path / "a", r=4, lora_alpha=8, bias="all"))
    with pytest.raises(UserError, match="bias is all, not none"):
        require_same_adapter(source, LORA)
