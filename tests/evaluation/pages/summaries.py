"""Made-up evaluations and comparisons in the shape that the commands write, for tests of their pages."""

from typing import Any

import numpy as np

from prefopt_cli.evaluation.pages.plots import PlotData

HOSTILE = "<script>alert('x')</script> $\\frac{1}{2}$ \"quoted\" & שלום\u202e\nsecond line \x00\ud800"
"""A name or text that breaks a page which trusts it."""


def estimate(value: float, spread: float) -> dict[str, float]:
    """With an interval that is not symmetric."""
    return {"value": value, "low": value - spread, "high": value + 0.9 * spread}


def plot_data(size: int, *, reference: bool = True, seed: int = 0) -> PlotData:
    """Pairs of a policy that learnt a little."""
    random = np.random.default_rng(seed)
    its = random.normal(-1, 12, size)
    change_chosen, change_rejected = random.normal(-6, 7, size), random.normal(-9, 9, size)
    own = its + change_chosen - change_rejected
    lengths = random.integers(-120, 120, size)
    if not reference:
        return PlotData(own, lengths, own)
    return PlotData(0.1 * (own - its), lengths, own, its, change_chosen, change_rejected)


def found_set(
    random: np.random.Generator, *, pairs: int = 308, reference: bool = True, lists: int = 0
) -> dict[str, Any]:
    """What a summary holds of one set."""

    def share(value: float) -> dict[str, float]:
        return estimate(value + random.normal(0, 0.01), 0.05)

    def mean(value: float) -> dict[str, float]:
        return estimate(value + random.normal(0, 0.5), 1.3)

    main = "reward" if reference else "logp"
    scores = ["logp", "logp_per_token"] + (["reward"] if reference else [])
    figures = {f"accuracy/{score}": share(0.6) for score in scores}
    figures |= {f"margin/{score}": mean(2.0) for score in scores}
    figures |= {"logp/chosen": mean(-210), "logp/rejected": mean(-190)}
    figures |= {"tokens/chosen": mean(71), "tokens/rejected": mean(66)}
    if reference:
        figures |= {"change/chosen": mean(-6), "change/rejected": mean(-9)}
        figures |= {"reference/accuracy/logp": share(0.47), "reference/margin/logp": mean(-1)}
        figures |= {"gain/accuracy/logp": share(0.08), "gain/margin/logp": mean(3)}
        figures |= {
            "flipped": share(0.2),
            "flipped/to_chosen": share(0.14),
            "flipped/to_rejected": share(0.06),
        }
    ranking = {
        "rows": lists,
        "responses": 4 * lists,
        "kendall_tau": {score: share(0.21) for score in scores},
        "best_of_n": {score: share(0.34) for score in scores},
        "best_of_n_chance": 0.25,
    }
    edges = [(-141, -58), (-57, -12), (-11, 9), (10, 47), (48, 163)]
    return {
        "data": "9f" * 32,
        "rows": pairs,
        "pairs": pairs,
        "prompts": pairs,
        "lists": lists,
        "dropped": {"too long": 3, "the same responses": 1} if lists else {},
        "train_overlap": {"prompts": 2, "pairs": 3} if reference else None,
        "main": main,
        "figures": figures,
        "baselines": {
            "length_only": {"rule": "longer", "accuracy": share(0.55)},
            "majority": {"accuracy": share(0.51)},
            "gain/length_only": share(0.07),
        },
        "calibration": _calibration(share, mean) if reference else None,
        "by_length": [
            {
                "from": low,
                "to": high,
                "pairs": 61,
                "prompts": 60,
                "accuracy": share(0.5 + 0.04 * place),
                "length_only": estimate(float(place > 1), 0.0),
            }
            for place, (low, high) in enumerate(edges)
        ],
        "ranking": ranking if lists else None,
        "notes": ["The training data is not known."] if not reference else [],
    }


def _calibration(share: Any, mean: Any) -> dict[str, Any]:
    return {
        "ece": share(0.11),
        "ece_if_calibrated": 0.0713,
        "log_loss": share(0.71),
        "brier": share(0.26),
        "scale": share(0.6),
        "bins": [
            {
                "low": 0.5 + 0.05 * place,
                "high": 0.55 + 0.05 * place,
                "pairs": 60 - 5 * place,
                "confidence": 0.524 + 0.05 * place,
                "accuracy": share(0.5 + 0.03 * place),
            }
            for place in range(10)
        ],
    }


def evaluation(*, findings: bool = True) -> dict[str, Any]:
    """Two sets: one with everything, one without reference and calibration."""
    random = np.random.default_rng(3)
    told = [
        ("above_length_only", "good", "Accuracy 60.7% [55.1, 66.0] is more than length explains.", 0.07, 0.0),
        (
            "likelihood_displacement",
            "warning",
            "Chosen responses lost 6.12 nats of log-probability on average while the margin grew by 3.01 nats: part "
            "of the probability went to responses that are neither (likelihood displacement).",
            -6.12,
            0.0,
        ),
        ("depends_on_length", "note", "Accuracy depends on length: 66.1% against 50.2%.", 0.159, 0.15),
    ]
    return {
        "policy": {
            "name": "runs/gpo-hh",
            "description": "adapter over a model of 0.5 B parameters",
            "run": "runs/gpo-hh",
            "run_id": "20261122-110301-a1b2",
            "method": {"name": "gpo", "f": "squared_hellinger", "beta": 0.1},
        },
        "reference": {"name": "base", "description": "base"},
        "reward": {
            "formula": "beta * (logp - reference's logp)",
            "scale": 0.1,
            "scale_name": "beta",
            "per_token": False,
        },
        "level": 0.95,
        "sets": {"helpful": found_set(random, lists=120), "harmless": found_set(random, reference=False)},
        "findings": [
            {
                "code": code,
                "set": "helpful",
                "weight": weight,
                "text": text,
                "figure": figure,
                "threshold": limit,
            }
            for code, weight, text, figure, limit in told
        ]
        if findings
        else [],
        "scores": {"computed": 900, "from_cache": 332},
    }


def comparison(labels: tuple[str, ...] = ("dpo", "gpo-hellinger", "gpo-js")) -> dict[str, Any]:
    """Runs on two sets; the first is the baseline, and one could not be compared."""
    random = np.random.default_rng(5)
    sets = ("helpful", "harmless")
    policies = []
    for place, label in enumerate(labels):
        of_sets = {}
        for name in sets:
            found = found_set(random)
            small = place == 1
            of_sets[name] = {
                "pairs": found["pairs"],
                "figures": found["figures"],
                "calibration": found["calibration"] if name == "helpful" else None,
                "differences": {
                    "accuracy/main": {
                        **estimate(0.06, 0.03),
                        "p": 0.0004 if small else 0.21,
                        "p_holm": 0.012,
                    },
                    "accuracy/logp": {**estimate(-0.01, 0.03), "p": 0.42, "p_holm": 0.84},
                    "margin/main": {**estimate(1.4, 0.6), "p": 0.01, "p_holm": 0.03},
                }
                if place
                else None,
                "changed": {"to_chosen": 31, "to_rejected": 12} if place else None,
            }
        policies.append(
            {
                "name": f"runs/{label}",
                "label": label,
                "method": {"name": "gpo", "beta": 0.1},
                "reference": "base",
                "kl": estimate(4.0 + 3 * place, 0.8),
                "gold": {"helpful": estimate(0.31 + 0.1 * place, 0.04)},
                "skipped": None,
                "sets": of_sets,
            }
        )
    return {
        "baseline": f"runs/{labels[0]}",
        "level": 0.95,
        "kl": {"prompts": 64, "max_new_tokens": 128},
        "policies": policies,
        "skipped": [{"name": "runs/other", "reason": "its tokenizer is another one"}],
        "sets": {name: {"pairs": 308, "prompts": 307, "left_out": 2, "main": "reward"} for name in sets},
        "changed": {
            "helpful": [
                {
                    "id": f"row-{number}",
                    "policy": label,
                    "to": ("chosen", "rejected")[number % 2],
                    "prompt": "Human: What can I cook with lentils?\n\nAssistant:",
                    "chosen": " A soup, a salad or a stew. Which of them would you like?",
                    "rejected": " Lentils.",
                    "baseline_margin": -0.31,
                    "margin": 0.72,
                }
                for label in labels[1:]
                for number in range(4)
            ],
            "harmless": [],
        },
        "findings": [
            {
                "code": "best_accuracy",
                "set": "helpful",
                "weight": "good",
                "text": "gpo-hellinger has a higher accuracy than the baseline.",
                "figure": 0.06,
                "threshold": 0.0,
            }
        ],
    }
