"""Shipped recipes and starters load, name themselves, and agree with the schema."""

import ast
import importlib.util
import json
import re
from importlib.metadata import version

import pytest

from prefopt_cli import data
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import diff_recipes, load_recipe, recipe_json_schema, shipped_recipes
from prefopt_cli.recipe.schema import (
    METHODS,
    DatasetSettings,
    GPOSettings,
    LaunchSettings,
    LoraAdapter,
    ModelSettings,
    QuantizationSettings,
    Recipe,
    Regularizer,
    Source,
    Weighting,
)
from prefopt_cli.recipe.shipped import describe_recipes, recipes_folder, shipped_file
from prefopt_cli.recipe.starter import starter_methods, starter_recipe, write_starter
from prefopt_cli.recipe.training_settings import GOVERNED
from tests.conftest import REPOSITORY
from tests.data.build import jsonl

SCHEMA_LINE = "# yaml-language-server: $schema=./recipe.schema.json"


@pytest.mark.parametrize(("name", "path"), shipped_recipes().items(), ids=list(shipped_recipes()))
def test_a_shipped_recipe_names_its_command_and_loads(name, path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].split()[:4] == ["#", "prefopt", "train", f"recipes/{name}.yaml"]
    assert lines[1] == SCHEMA_LINE
    load_recipe(path)
    assert max(map(len, lines)) <= 110


def test_the_recipes_are_those_of_the_checkout():
    assert recipes_folder() == REPOSITORY / "recipes"
    assert {"gpo-sandbox", "gpo-hh", "gpo-ultrafeedback", "gpo-ultrafeedback-lora", "gpo-custom-loss"} <= set(
        shipped_recipes()
    )
    assert {"soft-sandbox", "soft-hh", "soft-ranked", "soft-ultrafeedback-lora"} <= set(shipped_recipes())
    assert {f"self-supervised-{name}" for name in ("sandbox", "hh", "ultrafeedback-lora")} <= set(
        shipped_recipes()
    )


@pytest.mark.parametrize("name", ["gpo-sandbox", "soft-sandbox", "self-supervised-sandbox"])
def test_the_sandbox_recipes_need_nothing_from_outside(name):
    recipe = load_recipe(shipped_recipes()[name])
    (train,), (heldout,) = recipe.dataset.train, recipe.dataset.eval["heldout"]
    assert recipe.model.name_or_path == "sandbox:base"
    assert train.source == heldout.source == "sandbox:helpful"
    assert (train.split, heldout.split) == ("train", "test")


def test_each_has_a_purpose_and_its_method():
    for described in describe_recipes():
        assert len(described.purpose) > 20, described
        assert described.method in {*METHODS, "chain"}
        assert described.name.startswith(described.method.replace("_", "-") + "-")


EVALUATION_BATCH = "per_device_eval_batch_size"
"""Evaluations carry all levels of the responses, so they may have to be of fewer rows."""


@pytest.mark.parametrize("method", ["soft", "self-supervised"])
@pytest.mark.parametrize("name", ["hh", "ultrafeedback-lora"])
def test_a_twin_differs_in_the_method_alone(method, name):
    """What the methods make of the same model and data can then be compared."""
    gpo, twin = (load_recipe(shipped_recipes()[f"{each}-{name}"]) for each in ("gpo", method))
    for section in ("model", "adapter", "dataset"):
        assert getattr(gpo, section) == getattr(twin, section), section
    assert gpo.training == {key: each for key, each in twin.training.items() if key != EVALUATION_BATCH}


@pytest.mark.parametrize("name", ["sandbox", "hh", "ultrafeedback-lora"])
def test_without_its_own_loss_a_self_supervised_recipe_is_that_of_gpo(name):
    """As their comments say of ssl_coef: 0: the difference is what the second loss adds."""
    gpo, own = (load_recipe(shipped_recipes()[f"{each}-{name}"]) for each in ("gpo", "self-supervised"))
    assert own.method.align == gpo.method
    differing = {
        path.partition(".")[0] for path in diff_recipes(gpo, own) if path != f"training.{EVALUATION_BATCH}"
    }
    assert differing == {"method", "output_dir"}


def test_every_micro_batch_of_a_soft_recipe_has_a_sample():
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        if recipe.method.name == "soft":
            micro_batches = recipe.training.get("gradient_accumulation_steps", 1)
            assert recipe.method.regularizer.num_prompts % micro_batches == 0, name


def test_lists_of_numbers_from_best_to_worst_are_read_by_their_scores(tmp_path, monkeypatch):
    """As the recipe's comment says: `format: ranked` would make another order of them."""
    row = {"prompt": "Question: Why?\nAnswer:", "responses": [" a", " b", " c", " d"]}
    row |= {"scores": [1.5, 2.0, 0.0, 2.5], "ranking": [3, 1, 0, 2]}
    recipe = load_recipe(
        shipped_recipes()["soft-ranked"], ["dataset.holdout=null", "training.eval_strategy=no"]
    )
    (source,) = recipe.dataset.train
    (tmp_path / source.source).parent.mkdir()
    jsonl(tmp_path / source.source, [row])
    monkeypatch.chdir(tmp_path)
    (found,) = data.load(recipe.dataset).train
    assert found.responses == (" d", " b", " a", " c")
    as_ranks = load_recipe(
        shipped_recipes()["soft-ranked"],
        ["dataset.holdout=null", "training.eval_strategy=no", "dataset.train.0.format=ranked"],
    )
    (other,) = data.load(as_ranks.dataset).train
    assert other.responses == (" c", " b", " d", " a")


def test_unknown_names_get_a_suggestion_and_the_list():
    with pytest.raises(UserError, match=r"did you mean 'gpo-hh'.*gpo-ultrafeedback"):
        shipped_file("gpo_hh.yaml")
    assert shipped_file("gpo-hh") == shipped_file("gpo-hh.yaml")
    assert shipped_file("custom_loss.py").name == "custom_loss.py"


def test_the_custom_losses_fulfil_their_contract_and_figures():
    import torch

    spec = importlib.util.spec_from_file_location("custom_loss", shipped_file("custom_loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = load_recipe(shipped_recipes()["gpo-custom-loss"])
    names = {"smoothed_hinge": (-0.854, 0.207), "noisy_logistic": (-0.4, 0.625)}
    assert recipe.method.loss.removeprefix("custom_loss:") in names
    grid = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for name, (slope, ratio) in names.items():
        f = getattr(module, name)
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(f(zero), zero, create_graph=True)
        (second,) = torch.autograd.grad(first, zero)
        assert first.item() == pytest.approx(slope, abs=1e-3)
        assert abs(second.item() / first.item()) == pytest.approx(ratio, abs=1e-3)
        assert (f(grid).diff().diff() > -1e-12).all()
        far = torch.tensor([-1e4, 1e4], requires_grad=True)
        f(far).sum().backward()
        assert far.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_loads_and_explains_every_key(tmp_path, method):
    path = tmp_path / "first-try.yaml"
    write_starter(method, path)
    text = path.read_text(encoding="utf-8")
    assert load_recipe(path).method.name == method
    assert load_recipe(path).output_dir == "runs/first-try"
    assert text.splitlines()[0] == f"# prefopt train {path}"
    assert text.splitlines()[1] == SCHEMA_LINE
    sections = [Recipe, ModelSettings, LoraAdapter, DatasetSettings, Source, METHODS[method], LaunchSettings]
    sections.append(QuantizationSettings)
    sections += {"soft": [Regularizer, Weighting], "self_supervised": [GPOSettings]}.get(method, [])
    assert max(map(len, starter_recipe(method).splitlines())) <= 110
    for section in sections:
        for key in section.model_fields:
            assert re.search(rf"(^|[\s{{#-]){key}:", text, re.MULTILINE), f"{section.__name__}.{key}"
    with pytest.raises(UserError, match="exists"):
        write_starter(method, path)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_that_a_starter_states_are_the_defaults(method):
    text, compared = starter_recipe(method), 0
    sections = [ModelSettings, LoraAdapter, Source, DatasetSettings, METHODS[method]]
    inner = {"soft": [Regularizer], "self_supervised": [GPOSettings]}.get(method, [])
    for section in (*sections, *inner):
        for key, field in section.model_fields.items():
            if field.is_required():
                continue
            for stated in re.findall(rf"^ *# +{key}: ([^#\n]*?) +#", text, re.MULTILINE):
                default = field.get_default(call_default_factory=True)
                is_json = re.fullmatch(r"[\d.]+|true|false|null|\{\}", stated)
                assert (json.loads(stated) if is_json else stated) == default, key
                compared += 1
    assert compared > 25


def test_a_starter_puts_no_odd_file_name_into_its_text():
    assert starter_recipe("gpo", "a b\nc: d.yaml").splitlines()[0] == "# prefopt train my.yaml"
    with pytest.raises(
        UserError, match=r"did you mean 'gpo'.*there are: gpo, self_supervised, sequential, soft"
    ):
        starter_recipe("gop")
    assert starter_methods() == sorted(METHODS)


def pinned() -> bool:
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(trl|transformers)==(\S+)", text, re.MULTILINE))
    return all(version(name) == pin for name, pin in pins.items())


@pytest.mark.skipif(not pinned(), reason="other versions of trl or transformers than constraints.txt names")
def test_the_committed_schema_is_what_the_code_makes():
    committed = json.loads((recipes_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(recipe_json_schema())), (
        "run: prefopt recipe schema > recipes/recipe.schema.json"
    )


def test_the_schema_covers_training_fields_and_sections():
    schema = recipe_json_schema()
    training = schema["properties"]["training"]["properties"]
    assert training["learning_rate"]["type"] == "number"
    assert training["learning_rate"]["minimum"] == 0
    assert "cosine" in training["lr_scheduler_type"]["enum"]
    assert training["bf16"]["description"]
    assert not set(GOVERNED) & set(training)
    assert schema["required"] == ["model", "dataset", "method", "output_dir"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["GPOSettings"]["properties"]["loss"]["description"]
    for name in ("SoftSettings", "Regularizer", "Weighting", "SelfSupervisedSettings"):
        described = schema["$defs"][name]
        assert described["additionalProperties"] is False
        assert all(
            "description" in each or "$ref" in each or key == "name"
            for key, each in described["properties"].items()
        )
    assert schema["$defs"]["SoftSettings"]["properties"]["alpha"]["exclusiveMinimum"] == 0


def test_the_schema_tells_what_an_alignment_loss_may_be():
    own = recipe_json_schema()["$defs"]["SelfSupervisedSettings"]
    names = [each["$ref"].rpartition("/")[2] for each in own["properties"]["align"]["anyOf"]]
    assert names == ["GPOSettings", "SoftSettings", "SequentialSettings"]
    assert own["required"] == ["name", "align"]
    assert own["properties"]["levels"]["minimum"] == 2


def test_nothing_in_the_recipe_room_imports_anything_heavy():
    heavy = {"torch", "transformers", "trl", "datasets", "peft", "accelerate"}
    for path in (REPOSITORY / "prefopt_cli" / "recipe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, path
