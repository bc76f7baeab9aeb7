"""Every mistake of every stage is told at once, with its line in the chain's file."""

import subprocess
import sys
from pathlib import Path

import pytest

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.errors import UserError
from tests.cli.conftest import environment

CHAIN = """\
model: {name_or_path: some/model}
dataset:
  eval: {helpful: a.jsonl, harmless: b.jsonl}
  max_length: 64
method: {loss: logistic, beta: 0.1}
training: {learning_rate: 1.0e-5}
output_dir: runs/x
stages:
  - dimension: helpful
    dataset: {train: c.jsonl}
  - dimension: harmless
    dataset: {train: d.jsonl}
    lambdas: {helpful: 0.5}
    training: {max_steps: 3}
"""

THIRD = "  - {dimension: tone, dataset: {train: e.jsonl}, lambdas: %s}\n"
THREE = CHAIN.replace("harmless: b.jsonl", "harmless: b.jsonl, tone: f.jsonl")

# (what to replace, by what, the line told, parts of the message)
MISTAKES = [
    ("beta: 0.1", "betta: 0.1", 5, ["  method.betta:", "unknown key", "'beta'"]),
    ("max_steps: 3", "max_step: 3", 14, ["stages.1.training.max_step:", "'max_steps'"]),
    ("learning_rate: 1.0e-5", "learning_rate: fast", 6, ["  training.learning_rate:", "a number"]),
    ("    lambdas: {helpful: 0.5}\n", "", 11, ["stages.1.lambdas", "missing", "{helpful: 0.5}"]),
    ("lambdas: {helpful: 0.5}", "lambdas: {helpfull: 1}", 13, ["stages.1.lambdas.helpfull", "did you mean 'helpful'"]),
    ("lambdas: {helpful: 0.5}", "lambdas: {harmless: 1}", 13, ["own dimension", "cannot come after itself"]),
    ("lambdas: {helpful: 0.5}", "lambdas: {helpful: -1}", 13, ["stages.1.lambdas.helpful", "at least 0"]),
    ("lambdas: {helpful: 0.5}", "lambdas: much", 13, ["stages.1.lambdas"]),
    ("train: c.jsonl}", "train: c.jsonl}\n    lambdas: 0.5", 11, ["stages.0.lambdas", "first stage"]),
    ("dataset: {train: c.jsonl}", "dataset: {holdout: 0.1}", 9, ["stages.0:", "has no data", "train"]),
    ("dimension: harmless", "dimension: helpful", 11, ["stages.1.dimension", "stage 1", "of its own"]),
    ("dimension: harmless", "dimension: harm/less", 11, ["stages.1.dimension", "'harm/less'"]),
    ("dimension: harmless", "dimension: base", 11, ["stages.1.dimension", "another name"]),
    ("dimension: harmless", "dimenson: harmless", 11, ["stages.1.dimenson", "did you mean 'dimension'"]),
    ("harmless: b.jsonl", "harmles: b.jsonl", 3, ["dataset.eval", "harmless", "did you mean it by 'harmles'"]),
    ("beta: 0.1}", "beta: 0.1, name: soft}", 5, ["method.name", "set by the chain", "'soft'"]),
    ("beta: 0.1}", "beta: 0.1, previous: [x]}", 5, ["method.previous", "set by the chain"]),
    ("beta: 0.1}", "beta: 0.1, lambdas: 0.5}", 5, ["method.lambdas", "stages.1.lambdas"]),
    ("training: {max", "output_dir: runs/y\n    training: {max", 14, ["stages.1.output_dir", "set by the chain"]),
    ("training: {max", "model: {name_or_path: y}\n    training: {max", 14, ["stages.1.model.name_or_path", "before"]),
    (
        "training: {max",
        "launch: {processes: 2}\n    training: {max",
        14,
        ["stages.1.launch.processes", "same processes"],
    ),
    ("training: {max", "previous: [x]\n    training: {max", 14, ["stages.1.previous", "set by the chain"]),
    ("stages:", "dimension: helpful\nstages:", 8, ["dimension", "entries of stages"]),
    ("stages:", "lambdas: 0.5\nstages:", 8, ["lambdas", "entries of stages"]),
    ("stages:", "stges:", 8, ["stges", "did you mean 'stages'"]),
    ("stages:", "outputdir: x\nstages:", 8, ["outputdir", "unknown key", "'output_dir'"]),
    ("name_or_path: some/model", "name_or_path: runs/x/helpful", 1, ["model.name_or_path", "come after itself"]),
    ("output_dir: runs/x\n", "", 1, ["output_dir", "missing"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"), MISTAKES, ids=[row[1] or row[0] for row in MISTAKES]
)
def test_a_mistake_is_told_once_at_its_line(
    tmp_path: Path, old: str, new: str, line: int, parts: list[str]
) -> None:
    assert old in CHAIN
    (told,) = mistakes(tmp_path, CHAIN.replace(old, new, 1))
    assert f"chain.yaml:{line}  " in told
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    ("lambdas", "parts"),
    [
        ("{helpful: 1}", ["stages.2.lambdas", "nothing is said about harmless", "{helpful: 0.5, harmless: 0.5}"]),
        ("{helpful: 1, tone: 1}", ["stages.2.lambdas.tone", "own dimension"]),
        ("{helpful: 1, harmless: x}", ["stages.2.lambdas.harmless", "a number"]),
    ],
)  # fmt: skip
def test_lambdas_of_a_third_stage(tmp_path: Path, lambdas: str, parts: list[str]) -> None:
    (told,) = mistakes(tmp_path, THREE + THIRD % lambdas)
    assert "chain.yaml:15 " in told
    assert all(part in told for part in parts), told


def test_a_dimension_that_comes_later(tmp_path: Path) -> None:
    text = THREE.replace("{helpful: 0.5}", "{helpful: 0.5, tone: 1}") + THIRD % 0.5
    (told,) = mistakes(tmp_path, text)
    assert "chain.yaml:13 " in told
    assert "tone comes later (stage 3)" in told


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = THREE.replace("beta: 0.1", "beta: 0").replace("{helpful: 0.5}", "{helpfull: 1}")
    text = text.replace("max_steps: 3", "max_steps: x") + THIRD % "-1"
    told = mistakes(tmp_path, text)
    assert [int(each.split("chain.yaml:")[1].split()[0]) for each in told] == [5, 13, 14, 15]


def test_mistakes_of_overrides_name_the_override(tmp_path: Path) -> None:
    (told,) = mistakes(tmp_path, CHAIN, "stages.1.lambdas.helpful=-3")
    assert "override 'stages.1.lambdas.helpful=-3'" in told
    (told,) = mistakes(tmp_path, CHAIN, "stages.4.lambdas.helpful=1")
    assert "a list of 2" in told


ADAPTER = "adapter: {type: lora, r: 8}\n"


def test_an_adapter_that_is_trained_on_stays_as_it_is(tmp_path: Path) -> None:
    (told,) = mistakes(tmp_path, ADAPTER + CHAIN + "    adapter: {r: 16}\n")
    assert "chain.yaml:16 " in told
    assert "stages.1.adapter.r: 16, but the stage before has 8" in told
    load(tmp_path, ADAPTER + CHAIN + "    adapter: {r: 16}\n", "method.adapter_per_stage=new")


def test_adapters_that_cannot_be_stacked(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        ADAPTER + CHAIN + "    adapter: {use_dora: true, target_modules: 'q|v'}\n",
        "method.adapter_per_stage=new",
    )
    assert any("adapter.use_dora" in each for each in told)
    assert any("adapter.target_modules" in each for each in told)


def test_an_adapter_stays_on_the_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    bits = ADAPTER + "quantization: {bits: 4}\n"
    for quantization, wanted in (("{bits: 8}", "{bits: 4}"), ("none", "{bits: 4}")):
        (told,) = mistakes(tmp_path, bits + CHAIN + f"    quantization: {quantization}\n")
        assert f"the stage before trains an adapter with quantization: {wanted}" in told
    (told,) = mistakes(tmp_path, ADAPTER + CHAIN + "    quantization: {bits: 4}\n")
    assert "quantization: none, and this stage goes on with it" in told
    told = mistakes(tmp_path, bits + CHAIN + "    adapter: none\n    quantization: none\n")
    assert any("on quantised weights, which cannot be trained themselves" in each for each in told)
    load(tmp_path, bits + CHAIN + "    quantization: {compute_dtype: bfloat16}\n")


def test_a_sound_chain_becomes_one_recipe_for_each_stage(tmp_path: Path) -> None:
    chain = load(tmp_path, THREE + THIRD % 0.25, "stages.1.lambdas.helpful=0.3", "training.seed=7")
    first, second, third = (stage.recipe for stage in chain.stages)
    assert chain.dimensions == ("helpful", "harmless", "tone")
    assert [each.method.name for each in (first, second, third)] == ["gpo", "sequential", "sequential"]
    assert [each.output_dir for each in (first, third)] == ["runs/x/helpful", "runs/x/tone"]
    assert first.model.name_or_path == "some/model"
    assert third.model.name_or_path == "runs/x/harmless"
    assert third.method.model_dump()["previous"] == ["runs/x/helpful", "runs/x/harmless"]
    assert [stage.lambdas for stage in chain.stages] == [None, {"helpful": 0.3}, 0.25]
    assert second.training == {"learning_rate": 1.0e-5, "max_steps": 3, "seed": 7}
    assert list(third.dataset.eval) == ["helpful", "harmless", "tone"]


def test_self_supervised_has_the_stages_losses_in_its_align(tmp_path: Path) -> None:
    text = CHAIN.replace("{loss: logistic, beta: 0.1}", "{name: self_supervised, align: {loss: hinge}}")
    first, second = (stage.recipe.method for stage in load(tmp_path, text).stages)
    assert (first.name, first.alignment.name) == ("self_supervised", "gpo")
    assert (second.name, second.alignment.name) == ("self_supervised", "sequential")
    assert second.alignment.model_dump()["loss"] == "hinge"


def test_mistakes_are_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.replace("{helpful: 0.5}", "{helpfull: 0.5}"))
    code = (
        "import sys\nfrom prefopt_cli.chain.loader import load_chain\n"
        f"try: load_chain({str(path)!r})\nexcept Exception: print(sorted(set(sys.modules) & {{'torch', 'datasets'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "[]", done.stderr


def load(folder: Path, text: str, *overrides: str):
    path = folder / "chain.yaml"
    path.write_text(text)
    return load_chain(path, overrides)


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the message, one for each mistake."""
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    head, *told = str(error.value).splitlines()
    assert head.split(": ")[1].startswith(str(len(told)))
    return told
