"""Chains of two stages on the tiny world."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.chain.plan import Plan, make_plan
from prefopt_cli.chain.run import ChainOutcome, run_plan
from prefopt_cli.chain.settings import Chain
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Reporter, Silent

CHAIN = """\
model: {{name_or_path: {world}/model}}
dataset:
  eval:
    tone: {{source: {world}/heldout.jsonl, where: {{dimension: tone}}}}
    facts: {{source: {world}/heldout.jsonl, where: {{dimension: facts}}}}
  max_length: 256
method: {{loss: logistic, beta: 0.1}}
training:
  per_device_train_batch_size: 4
  max_steps: 3
  learning_rate: 1.0e-2
  save_steps: 1
  eval_strategy: "no"
  gradient_checkpointing: false
  use_cpu: true
output_dir: {out}
stages:
  - dimension: tone
    dataset: {{train: {{source: {world}/pairs.jsonl, where: {{dimension: tone}}}}}}
  - dimension: facts
    dataset: {{train: {{source: {world}/pairs.jsonl, where: {{dimension: facts}}}}}}
    lambdas: {{tone: 0.5}}
"""


class Chains:
    """Plans and runs of the chain whose file and folder lie in one place."""

    def __init__(self, folder: Path, world: Path) -> None:
        self.folder, self.world = folder, world
        self.out = folder / "out"
        self.file = folder / "chain.yaml"
        self.file.write_text(CHAIN.format(world=world, out=self.out))

    def load(self, *overrides: str) -> Chain:
        return load_chain(self.file, overrides)

    def plan(self, *overrides: str, runs_dir: Path | None = None, **options: Any) -> Plan:
        return make_plan(self.load(*overrides), reporter=Silent(), runs=RunFinder(runs_dir), **options)

    def run(
        self, *overrides: str, runs_dir: Path | None = None, reporter: Reporter | None = None, **options: Any
    ) -> ChainOutcome:
        runs = RunFinder(runs_dir)
        plan = make_plan(self.load(*overrides), reporter=Silent(), runs=runs, **options)
        return run_plan(plan, reporter=reporter or Silent(), runs=runs, told=lambda *_: None)

    def actions(self, *overrides: str, **options: Any) -> list[str]:
        return [step.action for step in self.plan(*overrides, **options).steps]

    def reasons(self, *overrides: str, **options: Any) -> list[str]:
        return [step.reason for step in self.plan(*overrides, **options).steps]

    def files(self) -> dict[Path, tuple[int, int]]:
        """Every file in the chain's folder, with size and time of change."""
        found = (path for path in sorted(self.out.rglob("*")) if path.is_file())
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def chains(tmp_path: Path, tiny_world: Path) -> Chains:
    """A chain of which nothing is trained yet."""
    return Chains(tmp_path, tiny_world)


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Chains:
    made = Chains(tmp_path_factory.mktemp("chain"), tiny_world)
    made.run()
    return made


@pytest.fixture
def trained(_trained: Chains) -> Chains:
    """A finished chain, to be looked at only."""
    return _trained


@pytest.fixture
def finished(_trained: Chains, tmp_path: Path, tiny_world: Path) -> Chains:
    """A finished chain of one's own, as if it had been trained there."""
    mine = Chains(tmp_path, tiny_world)
    shutil.copytree(_trained.out, mine.out)
    for written in (
        *mine.out.glob("*/manifest.json"),
        *mine.out.glob("*/recipe.yaml"),
        mine.out / "chain.json",
    ):
        written.write_text(written.read_text().replace(str(_trained.out), str(mine.out)))
    return mine
