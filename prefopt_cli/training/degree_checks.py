"""What a recipe asks of the degrees of its data, seen once there are any."""

from prefopt_cli.data.receipt import Receipt
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Recipe

OF_LEVEL = "ssl/accuracy_level_"


def require_metric(recipe: Recipe, receipt: Receipt) -> None:
    """Refuse to choose the best model by a figure of degrees that an eval set does not have.

    Args:
        recipe: the recipe.
        receipt: of its data in tokens.

    Raises:
        UserError: no response of the set takes part, or none has the level that the metric is about.
    """
    metric = str(recipe.training.get("metric_for_best_model")).removeprefix("eval_")
    for name, record in receipt.sets.items():
        figure = metric.removeprefix(f"{name}_")
        if record.degrees is None or figure == metric or not figure.startswith("ssl/"):
            continue
        levels = record.degrees["levels"]
        found = [level for level, count in levels.items() if count]
        if not found:
            raise UserError(
                f"training.metric_for_best_model: there is no {metric}, as none of the "
                f"{record.degrees['responses']} responses of {name} has degrees. Choose another metric, for example "
                f"{name}_loss."
            )
        if figure.startswith(OF_LEVEL) and figure.removeprefix(OF_LEVEL) not in found:
            raise UserError(
                f"training.metric_for_best_model: there is no {metric}, as no response of {name} has that level, only "
                f"{', '.join(found)}. Choose one of these, or {name}_ssl/accuracy."
            )
