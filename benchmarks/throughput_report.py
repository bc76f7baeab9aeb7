"""The figures of `benchmarks.throughput` as Markdown."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.throughput_peers import LOGGING_STEPS, OURS, PEERS, PLAIN, PRECOMPUTED
from benchmarks.throughput_steps import FIRST_LOSS_TOLERANCE, TRAJECTORY_TOLERANCE

MEGABYTE = 2**20

METHOD = f"""A round is one step of each trainer in turn, on the same batch, from the same initial weights, all in one
process; each trainer runs its own `train()` and holds the processor from where it begins one step to where it would
begin the next. A step so holds forward and backward pass, clipping, AdamW, schedule, callbacks, metrics, logging
(every {LOGGING_STEPS} steps, TRL's default) and the fetching and collating of a batch. Pairs come in the data's order.
Nothing is saved, reported or drawn as a progress bar. On CUDA every turn begins and ends with the device idle.

*prefopt* reads its reference scores from columns of the data, as its score cache leaves them; *trl-precomputed* is
TRL's `precompute_ref_log_probs=True`; *trl* runs the reference policy in every step. What scoring takes before the
first step stands in a table of its own.

Speed-up: TRL's time over prefopt's for the same batch; the median over the rounds, in brackets its 95 % bootstrap
interval, then the 10th to 90th percentile of the single rounds, then the ratio of the total times, and that of the
processor's total times (user and system), which other programs on the machine disturb less. Share of peak: arithmetic
of the useful tokens (every prompt once, no padding; 3 x a forward pass), per second, over what a large matrix
multiplication reached in the same process."""

END_TO_END = """From the start of the command to its end: imports, reading, tokenising and the export of the policy are
included. The processor's seconds are those of all cores. The last loss is that of the last log. Cold: the caches of
both are empty (prefopt's scores; the `datasets` library's tables, tokens and reference scores for TRL). Warm: the run
before left them. `trl dpo` starts `accelerate launch`, which gives arithmetic on the CPU one thread unless
OMP_NUM_THREADS is set: it is set here, to the same number for both."""


def progress_line(figures: dict[str, Any]) -> str:
    """One configuration, in short."""
    peers = ", ".join(f"{name} {figures['peers'][name]['median_seconds']:.3f} s" for name in PEERS)
    ratios = ", ".join(f"{each['median']:.2f}x {name}" for name, each in figures["speedup"].items())
    return f"{figures['pairs']}, batch {figures['batch']}: {peers}; {ratios}"


def report(facts: dict[str, Any]) -> str:
    """All of it."""
    parts = ["# Training throughput: prefopt and TRL", "", _subject(facts), "", METHOD, ""]
    if facts["configurations"]:
        parts += ["## Time of a step", "", *_times(facts["configurations"]), ""]
        parts += ["## Tokens of a step", "", *_tokens(facts), ""]
        parts += ["## The same work?", "", *_losses(facts), ""]
        parts += ["## Scoring before the first step", "", *_scoring(facts), ""]
    if facts["memory"]:
        parts += ["## Peak memory", "", _memory_method(facts), "", *_memory(facts), ""]
    if facts["end_to_end"]:
        parts += ["## Whole runs", "", END_TO_END, "", *_whole(facts), ""]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value)
    return "\n".join([*parts, f"Versions: {versions}.", "", f"Machine: {machine}.", ""])


def _subject(facts: dict[str, Any]) -> str:
    each, options = facts["subject"], facts["options"]
    quick = "**A smoke run (`--quick`): its times mean nothing.** " if options["quick"] else ""
    return (
        f"{quick}Llama with random weights: {each['layers']} layers of {each['hidden']}, {each['heads']} heads, "
        f"vocabulary {each['vocabulary']}, tied embeddings; full fine-tuning, {each['dtype']}, on {each['device']}, "
        f"gradient checkpointing {'on' if each['gradient_checkpointing'] else 'off'}, "
        f"learning rate {each['learning_rate']:g}; {options['warmup']} rounds of warm-up do not count. "
        f"Matrix multiplication of {facts['matrix']} x {facts['matrix']}: "
        f"{facts['peak_flops_per_second'] / 1e12:.3g} TFLOP/s. Made by `python -m benchmarks.throughput`."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _times(configurations: Sequence[dict[str, Any]]) -> list[str]:
    def speedup(each: dict[str, float]) -> str:
        return (
            f"**{each['median']:.2f}** [{each['low']:.2f}, {each['high']:.2f}]; "
            f"{each['p10']:.2f} to {each['p90']:.2f}; {each['total']:.2f}; {each['processor']:.2f}"
        )

    rows = [
        [
            figures["pairs"],
            figures["batch"],
            figures["rounds"],
            *(f"{1000 * figures['peers'][name]['median_seconds']:.0f}" for name in PEERS),
            speedup(figures["speedup"][PRECOMPUTED]),
            speedup(figures["speedup"][PLAIN]),
        ]
        for figures in configurations
    ]
    times = [f"{name}, ms" for name in PEERS]
    return _table(["pairs", "batch", "rounds", *times, f"speed-up over {PRECOMPUTED}", f"over {PLAIN}"], rows)


def _tokens(facts: dict[str, Any]) -> list[str]:
    rows = []
    for figures in facts["configurations"]:
        useful = statistics.fmean(figures["useful_tokens"])
        for name in PEERS:
            peer = figures["peers"][name]
            through = statistics.fmean(peer["policy_tokens"])
            rows.append(
                [
                    figures["pairs"],
                    figures["batch"],
                    name,
                    f"{useful:.0f}",
                    f"{through:.0f} ({through / useful:.2f})",
                    f"{statistics.fmean(peer['reference_tokens']):.0f}",
                    f"{statistics.fmean(peer['reference_passes']):g}",
                    f"{useful / peer['mean_seconds']:.0f}",
                    f"{peer['flops_per_second'] / facts['peak_flops_per_second']:.0%}",
                ]
            )
    head = ["pairs", "batch", "trainer", "useful", "through the policy (over useful)"]
    head += ["through the reference", "reference passes", "useful tokens/s", "share of peak"]
    return [
        "Means over the rounds; counted where they enter the embedding, padding and all.",
        "",
        *_table(head, rows),
    ]


def _losses(facts: dict[str, Any]) -> list[str]:
    dtype = facts["subject"]["dtype"]

    def mark(value: float, agrees: bool) -> str:
        return f"{value:.1e}" if agrees else f"**{value:.1e}, too much**"

    rows = []
    for figures in facts["configurations"]:
        found = figures["losses"]
        rows.append(
            [
                figures["pairs"],
                figures["batch"],
                f"{found['first']:.4f}",
                f"{found['last']:.4f}",
                mark(found["first_spread"], found["first_agrees"]),
                mark(found["trajectory_difference"], found["trajectory_agrees"]),
            ]
        )
    text = (
        "The reference policy's weights are a little apart from the policy's, so that the first loss is not log 2 "
        f"whatever is computed. Allowed: {FIRST_LOSS_TOLERANCE[dtype]:g} between any two trainers at the first step, "
        f"{TRAJECTORY_TOLERANCE[dtype]:g} between prefopt and {PRECOMPUTED} on every batch, warm-up included."
    )
    head = ["pairs", "batch", "first loss", "last loss", "spread at first", "largest difference"]
    return [text, "", *_table(head, rows)]


def _scoring(facts: dict[str, Any]) -> list[str]:
    rows = [
        [each["pairs"], "prefopt, cache empty", each["count"], f"{each['seconds']:.1f}"]
        for each in facts["scoring"]
    ]
    rows += [
        [
            figures["pairs"],
            f"{PRECOMPUTED}, batch {figures['batch']}",
            figures["trl_precompute_pairs"],
            f"{figures['trl_precompute_seconds']:.1f}",
        ]
        for figures in facts["configurations"]
    ]
    return _table(["data", "by", "pairs scored", "seconds"], rows)


def _memory_method(facts: dict[str, Any]) -> str:
    if facts["subject"]["device"] == "cuda":
        return "A few steps in a process of its own: `torch.cuda.max_memory_allocated`."
    return (
        "A few steps in a process of its own: rise of its peak resident memory (VmHWM) over what it holds with the "
        "imports done and the data read, glibc's allocator as it is."
    )


def _memory(facts: dict[str, Any]) -> list[str]:
    least = next(row["bytes"] for row in facts["memory"] if row["peer"] == OURS)
    rows = [
        [
            row["peer"],
            row["pairs"],
            row["batch"],
            f"{row['bytes'] / MEGABYTE:.0f}",
            f"{row['bytes'] / least:.2f}",
        ]
        for row in facts["memory"]
    ]
    return _table(["trainer", "pairs", "batch", "MB", "over prefopt's"], rows)


def _whole(facts: dict[str, Any]) -> list[str]:
    runs = facts["end_to_end"]

    def of(
        name: str, caches: str, key: str, fold: Callable[[list[float]], float] = statistics.median
    ) -> float:
        return fold([row[key] for row in runs if (row["peer"], row["caches"]) == (name, caches)])

    def losses(name: str, caches: str) -> list[float]:
        found = [row["last_loss"] for row in runs if (row["peer"], row["caches"]) == (name, caches)]
        return [loss for loss in found if loss is not None]

    rows = []
    for caches in ("cold", "warm"):
        ours = of(OURS, caches, "seconds")
        present = {row["peer"] for row in runs if row["caches"] == caches}
        for name in (peer for peer in PEERS if peer in present):
            seconds = of(name, caches, "seconds")
            rows.append(
                [
                    name,
                    caches,
                    f"{seconds:.1f}",
                    f"{of(name, caches, 'seconds', min):.1f} to {of(name, caches, 'seconds', max):.1f}",
                    f"{seconds / ours:.2f}",
                    f"{of(name, caches, 'processor_seconds'):.1f}",
                    ", ".join(sorted({f"{loss:.3f}" for loss in losses(name, caches)})) or "none",
                ]
            )
    steps, repeats = facts["options"]["steps"], facts["options"]["repeats"]
    runs_each = "one run" if repeats == 1 else f"{repeats} runs"
    text = f"{steps} steps of {runs[0]['batch']} pairs, {runs_each} each, in turn; medians."
    return [
        text,
        "",
        *_table(
            [
                "command",
                "caches",
                "seconds",
                "least to most",
                "over prefopt's",
                "processor seconds",
                "last loss",
            ],
            rows,
        ),
    ]
