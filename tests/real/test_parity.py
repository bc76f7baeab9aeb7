"""Whole training trajectories against TRL's own DPOTrainer, on human preferences and a pretrained model.

Same seed, same data order, 20 optimizer steps at batch 4: every step's loss agrees to 1e-5, packed and padded.
The learning rate keeps rounding small: sums of hundreds of tokens in another order differ in the last digit of
float32, and AdamW moves a weight whose gradient is only that by a whole learning rate.
"""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt_cli import data
from prefopt_cli.recipe.schema import DatasetSettings, GPOSettings
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.gpo import GPOTrainer

pytestmark = pytest.mark.real

STEPS, BATCH = 20, 4


@pytest.fixture(scope="module")
def tokens(shared: Path) -> data.TokenizedData:
    settings = DatasetSettings(
        train=[{"source": str(shared / "data" / "hh_helpful_harmless.jsonl.gz"), "limit": 200}],
        max_length=512,
        shuffle=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return data.tokenize(data.load(settings), tokenizer, settings)


def text_rows(shared: Path, tokens: data.TokenizedData) -> Dataset:
    """The same pairs in the same order, as text for TRL to tokenise."""
    import gzip
    import json

    with gzip.open(shared / "data" / "hh_helpful_harmless.jsonl.gz", "rt") as file:
        lines = file.read().splitlines()
    rows = [json.loads(lines[int(name.rsplit(":", 1)[1])]) for name in tokens.train["row_id"]]
    return Dataset.from_list([{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows])


def arguments(folder: Path, **changes: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=3,
        **changes,
    )


def history(trainer: DPOTrainer, name: str) -> list[float]:
    trainer.train()
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.mark.parametrize(
    ("settings", "trl", "scale"),
    [
        (GPOSettings(name="gpo", loss="logistic", beta=0.1), {"loss_type": "sigmoid", "beta": 0.1}, 1.0),
        (GPOSettings(name="gpo", loss="hinge", beta=0.1), {"loss_type": "hinge", "beta": 0.1}, 1.0),
        # squared = beta^2 * ipo at tau = beta / 2; with beta = 1 the gradients are the same too, so that
        # AdamW and gradient clipping see the same numbers.
        (
            GPOSettings(name="gpo", loss="squared", beta=1.0, length_normalize=True),
            {"loss_type": "ipo", "beta": 0.5},
            1.0,
        ),
    ],
    ids=["logistic", "hinge", "squared"],
)
def test_every_step_of_a_run_equals_trls(
    shared: Path,
    tokens: data.TokenizedData,
    tmp_path: Path,
    settings: GPOSettings,
    trl: dict[str, Any],
    scale: float,
) -> None:
    folder = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = DPOTrainer(
        model=str(folder),
        args=arguments(tmp_path / "trl", max_length=512, **trl),
        train_dataset=text_rows(shared, tokens),
        processing_class=tokenizer,
    )
    expected = history(theirs, "loss")
    for layout, way in ((None, "pieces"), (Layout(), None)):
        ours = GPOTrainer(
            settings=settings,
            model=AutoModelForCausalLM.from_pretrained(folder),
            ref_model=AutoModelForCausalLM.from_pretrained(folder),
            args=arguments(tmp_path / f"prefopt-{way}", remove_unused_columns=False, max_length=None),
            train_dataset=tokens.train,
            eval_dataset={},
            processing_class=tokenizer,
            layout=layout,
        )
        assert ours.layout.way == way
        got = history(ours, "loss")
        assert len(got) == STEPS
        assert got == pytest.approx([scale * loss for loss in expected], abs=1e-5)
        assert max(got) - min(got) > 1e-3, "nothing was learnt, so agreement would mean little"
        for name in (
            "entropy",
            "logps/chosen",
            "logits/rejected",
            "mean_token_accuracy",
            "rewards/accuracies",
        ):
            theirs_named = [r[name] for r in theirs.state.log_history if name in r]
            ours_named = [r[name] for r in ours.state.log_history if name in r]
            assert ours_named == pytest.approx(theirs_named, rel=1e-4, abs=1e-5), name


def test_squared_equals_ipo_after_scaling_at_any_beta(
    shared: Path, tokens: data.TokenizedData, tmp_path: Path
) -> None:
    """beta^2 scales the gradient too: with plain SGD a learning rate divided by beta^2 undoes it."""
    folder, beta = shared / "models" / "stories260K", 0.2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    their_args = arguments(tmp_path / "trl", max_length=512, loss_type="ipo", beta=beta / 2, **sgd)
    our_args = arguments(tmp_path / "prefopt", remove_unused_columns=False, max_length=None, **sgd)
    our_args.learning_rate = their_args.learning_rate / beta**2
    theirs = DPOTrainer(
        model=str(folder),
        args=their_args,
        train_dataset=text_rows(shared, tokens),
        processing_class=tokenizer,
    )
    ours = GPOTrainer(
        settings=GPOSettings(name="gpo", loss="squared", beta=beta, length_normalize=True),
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        args=our_args,
        train_dataset=tokens.train,
        eval_dataset={},
        processing_class=tokenizer,
    )
    expected = [beta**2 * loss for loss in history(theirs, "loss")]
    assert history(ours, "loss") == pytest.approx(expected, abs=1e-5)
