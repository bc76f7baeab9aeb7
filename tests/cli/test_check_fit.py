"""`prefopt check --memory`: does it fit, and with which settings would it?"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from prefopt_cli.cli.check_fit import read_bytes
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe
from prefopt_cli.training.forecast import forecast
from prefopt_cli.training.memory_fit import MARGIN, Budget, Fit, fit
from prefopt_cli.training.memory_recipe import RecipeMemory
from prefopt_cli.training.objectives import find_objective
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from tests.cli.conftest import Prefopt
from tests.tiny import build_tokenizer
from tests.training.conftest import LORA

MIB = 2**20
ROWS = 32
BATCH = (f"training.per_device_train_batch_size={ROWS}", "training.use_cpu=false")


@pytest.fixture(scope="session")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 33 million numbers without any weights; none are read."""
    folder = tmp_path_factory.mktemp("middling")
    LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(middling: Path) -> str:
    return f"model.name_or_path={middling}"


class Fits:
    """`fits(100, 8)` -> what is found for 8 GPUs of 100 MiB; steps are traced once for all budgets."""

    def __init__(self, recipe: Path, *overrides: str) -> None:
        self._path, self._overrides = recipe, [*overrides, *BATCH]
        self.recipe = load_recipe(recipe, self._overrides)
        prepared = prepare(self.recipe, Silent())
        objective = find_objective(self.recipe.method, recipe.parent)
        layout = forecast(self.recipe, objective, prepared, "cuda").layout
        self.memory = RecipeMemory(self.recipe, prepared, objective, layout, "cuda")

    def change(self, more: Any) -> Any:
        return load_recipe(self._path, [*self._overrides, *more])

    def __call__(self, mebibytes: float, gpus: int | None = None) -> Fit:
        self.memory.gpus = gpus
        return fit(self.recipe, self.memory, Budget(round(mebibytes * MIB), self.change, gpus))


@pytest.fixture
def fits(recipe: Path, model: str) -> Fits:
    return Fits(recipe, model)


def test_every_proposal_fits_and_more_memory_never_means_a_worse_one(fits: Fits) -> None:
    """From a budget that is enough as it is to one that nothing meets."""
    found = [fits(size, 8) for size in (2000, 900, 600, 400, 250, 200, 120, 100, 40)]

    assert found[0].as_it_is
    assert found[0].proposal is None
    worse = []
    for each in found[1:]:
        if each.proposal is None:
            continue
        assert each.proposal.estimate.needed <= each.usable == int(each.memory * (1 - MARGIN))
        recipe = fits.change(each.proposal.overrides)
        assert fits.memory.estimate(recipe) == each.proposal.estimate
        launch, given = recipe.launch, recipe.training
        rows = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
        assert rows * launch.processes == ROWS, "the rows of a step stay the same"
        worse.append(
            (
                not each.proposal.keeps_result,
                recipe.quantization != "none",
                launch.cpu_offload,
                launch.engine == "fsdp",
                -given["per_device_train_batch_size"],
            )
        )
    assert worse == sorted(worse)
    assert len(set(worse)) > 2, "budgets of several kinds were tried"
    assert found[-1].proposal is None
    assert found[-1].smallest is not None
    assert found[-1].missing == found[-1].smallest.estimate.needed - found[-1].usable > 0


def test_one_gpu_has_no_one_to_share_with(fits: Fits) -> None:
    for size in (900, 500, 300, 200):
        found = fits(size, 1)
        best = found.proposal or found.smallest
        assert best is None or not any("engine" in each for each in best.overrides)


def test_what_changes_the_training_comes_last_and_is_marked(fits: Fits) -> None:
    found = fits(450, 1).proposal

    assert found is not None
    assert not found.keeps_result
    marks = {setting.override: setting.keeps_result for setting in found.settings}
    assert marks["adapter={type: lora, r: 16}"] is False
    assert all(keeps for override, keeps in marks.items() if override.startswith("training."))


def test_the_largest_micro_batch_that_fits(fits: Fits) -> None:
    found = fits(4000)

    assert found.as_it_is
    assert found.largest_batch in (ROWS, 2 * ROWS), "of 96 pairs"
    larger = fits.change([f"training.per_device_train_batch_size={found.largest_batch}"])
    assert fits.memory.estimate(larger).needed <= found.usable


def test_a_reference_in_every_step_is_computed_before(recipe: Path, model: str) -> None:
    fits = Fits(recipe, model, "training.precompute_ref_log_probs=false")
    lightest = fits.change(
        [
            "training.per_device_train_batch_size=1",
            f"training.gradient_accumulation_steps={ROWS}",
            "training.gradient_checkpointing=true",
        ]
    )
    needed = fits.memory.estimate(lightest).needed / MIB
    found = fits((needed - 20) / (1 - MARGIN), 1).proposal

    assert found is not None
    assert found.keeps_result
    assert "training.precompute_ref_log_probs=true" in found.overrides


def test_deepspeed_goes_on_to_its_next_stages(recipe: Path, model: str) -> None:
    fits = Fits(recipe, model, "launch={engine: deepspeed, zero_stage: 1, processes: 8}")
    found = fits(100)

    tried = found.proposal or found.smallest
    assert tried is not None
    assert not any("fsdp" in each for each in tried.overrides)


def test_rows_that_do_not_divide_use_fewer_gpus(recipe: Path, model: str) -> None:
    fits = Fits(recipe, model)
    fits.recipe = fits.change(["training.per_device_train_batch_size=6"])
    found = fits(500, 4)

    assert found.proposal is not None
    assert "launch.processes=3" in found.proposal.overrides


def test_samples_are_shared_out_like_rows(recipe: Path, model: str) -> None:
    soft = "method={name: soft, regularizer: {num_prompts: 16, max_new_tokens: 8}}"
    fits = Fits(recipe, model, soft)
    found = fits(600, 4)

    best = found.proposal or found.smallest
    assert best is not None
    assert "method.regularizer.num_prompts=4" in best.overrides


def test_a_proposal_passes_check_itself(prefopt: Prefopt, recipe: Path, model: str) -> None:
    command = ["check", str(recipe), model, *BATCH, "--pairs", "0"]
    budget = ["--memory", "300MiB", "--gpus", "8"]
    shown = prefopt(*command, *budget)
    assert shown.code == 0, shown.err
    assert "which is too much. These settings fit:" in shown.out
    assert "The result stays the same, up to rounding:" in shown.out
    line = next(each for each in shown.out.splitlines() if each.startswith(f"prefopt train {recipe} "))
    found = json.loads(prefopt(*command, *budget, "--json").out)["fit"]
    proposed = found["proposal"]["overrides"]
    keys = {each.partition("=")[0] for each in proposed}
    kept = [each for each in [model, *BATCH] if each.partition("=")[0] not in keys]
    assert shlex.split(line)[3:] == [*kept, *proposed]
    assert found["proposal"]["memory"]["needed"] <= found["usable"]

    again = prefopt("check", str(recipe), *kept, *proposed, "--pairs", "0", *budget)
    assert again.code == 0, again.err
    assert (
        "Budget of 8 times 300.0 MiB, of which 276.0 MiB may be used: the recipe fits as it is, with"
        in again.out
    )


def test_nothing_fits(prefopt: Prefopt, recipe: Path, model: str) -> None:
    shown = prefopt("check", str(recipe), model, *BATCH, "--pairs", "0", "--memory", "20MB", "--gpus", "2")
    assert shown.code == 0, shown.err
    assert "Nothing fits. What takes the least misses by" in shown.out
    assert "prefopt train" not in shown.out


def test_evaluation_in_smaller_batches_where_it_is_the_peak(fits: Fits) -> None:
    found = fits(70, 8).proposal

    assert found is not None
    assert found.estimate.phase != "evaluation" or found.estimate.needed <= 70 * MIB * (1 - MARGIN)
    assert any(each.startswith("training.per_device_eval_batch_size=") for each in found.overrides)


def test_the_table_names_the_engine(prefopt: Prefopt, recipe: Path, model: str) -> None:
    launch = "launch={processes: 4, engine: fsdp, cpu_offload: true}"
    shown = prefopt("check", str(recipe), model, *BATCH, launch, LORA, "--pairs", "0", "--device", "cuda").out
    assert "fsdp on 4 processes, shards in the machine's memory" in shown
    assert "optimizer, in the machine's memory" in shown
    assert "Steps: 6 of 32 pairs per process, 128 on 4." in shown


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("80GB", 80 * 10**9),
        ("24G", 24 * 10**9),
        ("24Gi", 24 * 2**30),
        ("500 M", 500 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-3GiB", "0GiB", "24 Gibs", "", "1e3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--memory: expected a number and its unit"):
        read_bytes(text)


def test_mistakes(prefopt: Prefopt, recipe: Path) -> None:
    for arguments, message in (
        (["--memory", "24"], "for example 24GiB, found '24'"),
        (["--gpus", "8"], "add --memory"),
        (["--memory", "1GiB", "--gpus", "0"], "--gpus"),
    ):
        result = prefopt("check", str(recipe), *arguments)
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
