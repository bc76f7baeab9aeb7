"""Every command in the documentation is a real one.

In fenced ``bash`` blocks of README.md, CONTRIBUTING.md and docs/, each command that is prefopt's (also through
``torchrun -m prefopt_cli``) must parse: its subcommand and options exist. The commands of one page are then run
in their order, in one folder, where tiny stand-ins lie under the names of the hub's models and data. A recipe
that no earlier command wrote is the starter; one whose data is not there (a shipped recipe on a file of yours)
is only loaded. Pages that use the sandbox take its full world, which is built once, and so are slow; their Python
runs too. `make` targets must exist, and the quickstart and what it proposes are judged like a page.
"""

import glob
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import typer.main

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.chain.settings import Chain
from prefopt_cli.cli.main import app
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import SoftSettings
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.recipe.starter import starter_recipe
from tests.cli.conftest import (
    Prefopt,
    prefopt,  # noqa: F401  (the fixture)
)
from tests.conftest import REPOSITORY
from tests.tiny import pairs

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")
DATA = "trl-lib/ultrafeedback_binarized"
QUICK = ["training.max_steps=2", "training.gradient_accumulation_steps=1"]
FEW_PAIRS, FEW_HELD_OUT = "dataset.train.0.limit=32", "dataset.eval.{}.0.limit=16"
"""For the sandbox's recipes: their training source and their eval sets."""
SHORT_SAMPLES = ["regularizer.max_new_tokens=8", "regularizer.num_prompts=4"]
"""For alignment losses that let the policy write; the contexts of the stand-ins are short, too."""
FEW_SAMPLES = ["--prompts", "4", "--per-prompt", "2", "--exact-prompts", "1"]
"""For `prefopt sandbox score`; of an option that is given twice the later one counts."""
SANDBOX = re.compile(r"\bprefopt sandbox |\b(chain|gpo|soft|self-supervised|sequential)-sandbox\.yaml")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One prefopt command of a page."""

    arguments: list[str]
    output: str | None
    """The file that its standard output goes to."""
    launched: bool
    """Whether torchrun starts it."""

    @property
    def recipe(self) -> Path | None:
        """The recipe that it reads."""
        words = [word for word in self.arguments[1:] if not word.startswith("-")]
        return Path(words[0]) if self.arguments[0] in ("check", "train") and words else None


def _lines(blocks: list[str]) -> list[list[str]]:
    """The words of every simple command, comments left out."""
    lines = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                if words:
                    lines.append(words)
    return lines


def _blocks(page: Path) -> list[str]:
    return FENCED.findall(page.read_text(encoding="utf-8"))


def _commands(blocks: list[str]) -> list[Command]:
    commands = []
    for words in _lines(blocks):
        if "|" in words:
            words = words[: words.index("|")]
        output = None
        if ">" in words:
            output = words[words.index(">") + 1]
            words = words[: words.index(">")]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value in front
            words = words[1:]
        if words and words[0].rpartition("/")[2] == "prefopt":
            commands.append(Command(words[1:], output, launched=False))
        elif "prefopt_cli" in words:
            commands.append(Command(words[words.index("prefopt_cli") + 1 :], output, launched=True))
    return commands


def _quickstart() -> list[str]:
    """What `make quickstart` runs once everything is installed, and the commands that it proposes at its end."""
    dry = ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/.ready", "quickstart"]
    asked = subprocess.run(dry, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    proposed = text.split("define WHAT_NEXT")[1].split("endef")[0]
    return [asked, "\n".join(line for line in proposed.splitlines() if line.startswith("  "))]


def _parse(arguments: list[str]) -> None:
    """Fail as click does: no such command, no such option, an argument too many."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
    command.make_context(command.name, list(arguments))


def _page(page: Path) -> Any:
    """A page as a parameter of a test that runs its commands."""
    uses_sandbox = any(SANDBOX.search(block) for block in _blocks(page))
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if uses_sandbox else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for command in _commands(_blocks(page)):
        if any(word.startswith("-") for word in command.arguments[:1]):
            continue  # prefopt --version, --help
        _parse(command.arguments)


def test_there_are_commands_to_judge() -> None:
    """A change of the pages' style must not empty the tests."""
    found = [command for page in PAGES if page.exists() for command in _commands(_blocks(page))]
    assert {command.arguments[0] for command in found} >= {"train", "check", "recipe", "sandbox"}


def test_the_quickstart_goes_all_the_way() -> None:
    """Build, check, train into a folder of its own, score that very run; and there is more to try."""
    steps, proposed = (_commands([block]) for block in _quickstart())
    run, recipe = "runs/quickstart", "recipes/gpo-sandbox.yaml"
    assert [command.arguments for command in steps] == [
        ["sandbox", "build"],
        ["check", recipe, "--pairs", "1"],
        ["train", recipe, f"output_dir={run}", "--overwrite"],
        ["sandbox", "score", run, "--show", "3", "--exact-prompts", "8"],
    ]
    assert len(proposed) >= 6
    for command in (*steps, *proposed):
        _parse(command.arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    wanted = {word for words in _lines(_blocks(page)) if words[0] == "make" for word in words[1:]}
    assert wanted <= set(targets)


@pytest.fixture
def stand_ins(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page: a folder of a hub id's name is taken before the hub is asked."""
    for model in MODELS:
        shutil.copytree(tiny_world / "model", tmp_path / model)
    sets = {"train": pairs(12, seed=3), "test": pairs(4, seed=4)}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in sets.items()}
    ).save_to_disk(tmp_path / DATA)
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _data_is_there(recipe: Path, overrides: list[str]) -> bool:
    loaded = load_recipe(recipe, overrides)
    sources = [source.source for source in loaded.dataset.train]
    sources += [source.source for each in loaded.dataset.eval.values() for source in each]
    if isinstance(align := loaded.method.alignment, SoftSettings):
        sources += [source.source for source in align.regularizer.prompts or ()]
    places = (*sources, loaded.model.name_or_path)
    return all(has_scheme(place) or Path(place).exists() for place in places)


def _few_pairs(chain: Chain) -> list[str] | None:
    """Overrides with which a chain is quick; None where its data is not there."""
    sources = [stage.recipe.dataset.train[0].source for stage in chain.stages]
    if not all(has_scheme(source) for source in sources):
        return None
    few = [
        f"stages.{number}.dataset.train={{source: {source}, limit: 32}}"
        for number, source in enumerate(sources)
    ]
    return few + [f"dataset.eval.{name}.limit=16" for name in chain.dimensions]


def _expanded(word: str) -> list[str]:
    """As a shell hands it over."""
    return sorted(glob.glob(word)) or [word] if "*" in word else [word]


@pytest.mark.parametrize("page", map(_page, PAGES))
def test_commands_run_in_their_order(page: Path, prefopt: Prefopt, stand_ins: Path) -> None:  # noqa: F811
    _run(_commands(_blocks(page)), prefopt, stand_ins)
    for code in PYTHON.findall(page.read_text(encoding="utf-8")):
        exec(code, {})


@pytest.mark.slow
def test_the_quickstart_runs(prefopt: Prefopt, stand_ins: Path) -> None:  # noqa: F811
    _run(_commands(_quickstart()), prefopt, stand_ins)
    assert (stand_ins / "runs" / "kl-win-rate.png").is_file()


def _run(commands: list[Command], prefopt: Prefopt, folder: Path) -> None:  # noqa: F811
    """All of them, quickly."""
    for command in commands:
        arguments, recipe = list(command.arguments), command.recipe
        if recipe:
            if not recipe.exists():
                recipe.write_text(starter_recipe("gpo"))
            overrides = [word for word in arguments[2:] if "=" in word and not word.startswith("-")]
            if command.launched or not _data_is_there(recipe, overrides):
                continue  # it loads
            if recipe.name.endswith("-sandbox.yaml"):
                sets = load_recipe(recipe, overrides).dataset.eval
                arguments += [FEW_PAIRS, *(FEW_HELD_OUT.format(name) for name in sets)]
            method = load_recipe(recipe, overrides).method
            if method.alignment.name == "soft":
                place = "method" if method.alignment is method else "method.align"
                arguments += [f"{place}.{each}" for each in SHORT_SAMPLES]
        if arguments[:2] == ["sandbox", "score"]:
            arguments += FEW_SAMPLES
        if arguments[0] == "compare":
            arguments = [name for word in arguments for name in _expanded(word)] + ["--kl-prompts", "8"]
        if arguments[0] == "chain":
            if (few := _few_pairs(load_chain(arguments[1]))) is None:
                continue  # it loads
            arguments += [*QUICK, *few]
        if arguments[0] == "train":
            arguments += QUICK
            if "--resume" not in arguments and "--overwrite" not in arguments:
                shutil.rmtree(load_recipe(recipe, overrides).output_dir, ignore_errors=True)
        result = prefopt(*arguments)
        assert result.code == 0, (arguments, result.err)
        if command.output:
            (folder / command.output).write_text(result.out)
