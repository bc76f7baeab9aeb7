"""Intervals, calibration, tests and rankings: what may be said of a policy, and how surely."""

from prefopt_cli.evaluation.statistics.bootstrap import Estimate
from prefopt_cli.evaluation.statistics.means import mean_with_interval, means_with_intervals
from prefopt_cli.evaluation.statistics.proportions import LEVEL

__all__ = ["LEVEL", "Estimate", "mean_with_interval", "means_with_intervals"]
