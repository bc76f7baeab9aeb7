"""A small sound recipe, and how to load variations of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import Recipe, load_recipe

SOUND = """\
model: {name_or_path: some/model}
adapter: none
dataset:
  train:
    - source: pairs.jsonl
      limit: 10
  eval:
    helpful: {source: held.jsonl}
  max_length: 512
method:
  name: gpo
  loss: logistic
  beta: 0.1
training:
  learning_rate: 1e-6
  per_device_train_batch_size: 4
output_dir: runs/x
"""

OF_GPO = "  name: gpo\n  loss: logistic\n  beta: 0.1\n"
"""The method's section of the sound recipe, lines 11 to 13."""

Load = Callable[..., Recipe]


@pytest.fixture
def sound() -> str:
    return SOUND


@pytest.fixture
def soft(sound: str) -> str:
    """A sound recipe of method soft, with alpha in line 12."""
    return sound.replace(OF_GPO, "  name: soft\n  alpha: 0.1\n")


@pytest.fixture
def beside_gpo(sound: str) -> str:
    """A sound recipe of method self_supervised, with the alignment loss in lines 12 to 14 and levels in line 15."""
    return sound.replace(
        OF_GPO, "  name: self_supervised\n  align:\n    name: gpo\n    beta: 0.1\n  levels: 3\n"
    )


@pytest.fixture
def beside_soft(beside_gpo: str) -> str:
    """The same beside soft."""
    return beside_gpo.replace("name: gpo\n    beta: 0.1", "name: soft\n    alpha: 0.1")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a recipe from its text."""

    def load_text(text: str = SOUND, *overrides: str) -> Recipe:
        path = tmp_path / "my.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(path, overrides)

    return load_text


@pytest.fixture
def refusal(load: Load, tmp_path: Path) -> Callable[..., str]:
    """The message with which a recipe is refused, with the folder left out of it."""

    def message(text: str = SOUND, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message
