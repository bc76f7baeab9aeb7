"""``sandbox:`` as a scheme of model and dataset names (see ``prefopt_cli.recipe.schemes``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.recipe.schemes import Progress
from prefopt_cli.sandbox import names

if TYPE_CHECKING:
    import datasets


def check_model(name: str) -> None:
    """Raise UserError if no policy of the sandbox has this name."""
    names.parse_model(name)


def check_dataset(name: str, config: str | None) -> None:
    """Raise UserError if no preferences of the sandbox have this name."""
    names.parse_dataset(name, config)


def model_folder(name: str, progress: Progress | None) -> Path:
    """The folder of the policy; the world is made if it has not been made yet."""
    from prefopt_cli.sandbox.world import open_world

    return open_world(names.parse_model(name).seed, progress=progress).base


def dataset(name: str, config: str | None, progress: Progress | None) -> "datasets.DatasetDict":
    """The splits ``train`` and ``test``, whose prompts differ; the world is made if it has not been made yet."""
    import datasets

    from prefopt_cli.sandbox.preferences import BY_KIND
    from prefopt_cli.sandbox.world import open_world

    wanted = names.parse_dataset(name, config)
    world = open_world(wanted.seed, progress=progress)
    rows = BY_KIND[config or names.KINDS[0]]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(list(rows(world.pool(split), split, wanted)))
            for split in names.SPLITS
        }
    )
