"""What all methods share: a `DPOTrainer` that takes tokenised comparisons, packs them and reports exactly.

TRL's internals are touched in three places, guarded by `tests/invariants/test_trl_contract.py`:
`_prepare_dataset` here (the data is tokenised already), its head kernel in `prefopt_cli.scoring.head`, and its
fused head for experts' losses in `prefopt_cli.scoring.forward`. Besides, `prefopt_cli.recipe.training_fields`
reads the source of its settings.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from prefopt_cli.models.adapters import activate_adapters, restore_dropout
from prefopt_cli.scoring.choice import choose_layout
from prefopt_cli.scoring.forward import ResponseScores, plain_model, score_responses
from prefopt_cli.scoring.head import add_response_head
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.batches import ComparisonCollator, Lists, examples_of, padding_id
from prefopt_cli.training.engines import AbsentReference, engines_on_any_device
from prefopt_cli.training.extent import longest_row
from prefopt_cli.training.guard import FiniteGuard
from prefopt_cli.training.last_batch import counted, mean_over_rows, weigh_rows
from prefopt_cli.training.metrics import EvalMeans, TrainMeans
from prefopt_cli.training.row_metrics import RowMetrics, policy_metrics

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of a dataset whose reference log-probabilities are known already."""

RUN_SUMMARY = "train_runtime"
"""The record that the library logs once, when training ends, holds this figure."""


class PreferenceTrainer(DPOTrainer):
    """Base of the methods' trainers; a subclass overrides `compute_loss`.

    Args:
        model: the policy.
        ref_model: a frozen copy of the policy to serve as the reference. None when the datasets have
            `REFERENCE_COLUMNS`, or when the model carries an adapter, and the reference is the model without it
            (or with the copy of it that TRL keeps, if it was trained before).
        args: training arguments.
        train_dataset, eval_dataset: columns `row_id`, `prompt_ids`, `response_ids`, `ranks`, and for pairs the
            `REFERENCE_COLUMNS` where they are known.
        processing_class: the tokenizer, for its padding token and for checkpoints.
        peft_config: a new adapter to be added to the model.
        callbacks: more callbacks.
        card: the model card that lies beside the checkpoints.
        layout: how batches are laid out; None chooses (see `prefopt_cli.scoring.choice`).
        needs_reference: whether the reference policy is run while training, where its scores are not known.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Mapping[str, Dataset],
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        card: str = "",
        layout: Layout | None = None,
        needs_reference: bool = True,
    ) -> None:
        self.guard = FiniteGuard(lambda indices: [train_dataset[i]["row_id"] for i in indices])
        self._tokens: Tensor | int = 0
        self._card = card
        self._train_means = TrainMeans()
        self._eval_means = EvalMeans()
        self._eval_prefix = "eval"
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        scored = _are_scored([train_dataset, *eval_dataset.values()])
        absent = scored or not needs_reference
        if absent:  # nothing is left for TRL to precompute, and no reference model has to be in memory
            args.precompute_ref_log_probs = False
        for each in (model, ref_model):  # before the trainer wraps them in its precision
            if each is not None:
                add_response_head(plain_model(each))
        self.padding_id = padding_id(processing_class, model.config)
        collator = self.make_collator(self.padding_id, args)
        super().__init__(
            model=model,
            ref_model=AbsentReference(model.config) if absent else ref_model,
            args=args,
            data_collator=collator,
            train_dataset=_numbered(train_dataset),
            eval_dataset={name: _numbered(data) for name, data in eval_dataset.items()} or None,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=[*(callbacks or []), self.guard],
        )
        self.remove_callback(PrinterCallback)
        restore_dropout(self.model)
        if absent:
            self.ref_model = None
        self.layout = layout or self._choose_layout()
        collator.layout = self.layout
        for each in (self.model, self.ref_model):
            if each is not None:
                self.layout.prepare(self.accelerator.unwrap_model(each))

    def create_accelerator_and_postprocess(self) -> None:
        """With all engines on the CPU too."""
        with engines_on_any_device():
            super().create_accelerator_and_postprocess()

    def make_collator(self, padding_id: int, args: DPOConfig) -> ComparisonCollator:
        """What makes rows into batches; it gets its layout when that is chosen."""
        return ComparisonCollator(Layout(), padding_id, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """The data room has decided all boundaries; TRL must not tokenise again."""
        return dataset

    def _choose_layout(self) -> Layout:
        sets = [self.train_dataset, *(self.eval_dataset or {}).values()]
        first = self.train_dataset.select(range(min(self.args.train_batch_size, len(self.train_dataset))))
        return choose_layout(
            self.model,
            examples_of(first),
            longest=max(longest_row(rows) for rows in sets),
            autocast=self.accelerator.autocast,
            router_loss=self.aux_loss_enabled,
            neftune=self.args.neftune_noise_alpha is not None,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Of the weights that are trained, after loading a checkpoint too."""
        activate_adapters(self.accelerator.unwrap_model(self.model))
        return super().create_optimizer(model)

    @contextmanager
    def reference_policy(self) -> Iterator[nn.Module]:
        """The frozen reference, in eval mode and without gradients: the copy, or the policy without its adapter."""
        model, adapter = self.ref_model, nullcontext()
        if model is None:
            model = self.model
            if isinstance(model, PeftModel):
                plain = self.accelerator.unwrap_model(model)
                adapter = use_adapter(plain, adapter_name="ref" if "ref" in plain.peft_config else None)
        training = model.training
        model.eval()  # the policy and its reference may be one model, and only the policy drops out
        try:
            with torch.no_grad(), adapter:
                yield model
        finally:
            model.train(training)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities (B,) of the chosen and the rejected responses of B pairs.

        Args:
            model: taken by TRL's own method; the trainer knows its reference.
            inputs: a batch of this trainer's layout.
        """
        with self.reference_policy() as reference:
            chosen, rejected = score_responses(reference, inputs, self.layout).logps.chunk(2)
        return chosen, rejected

    def score_policy(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> ResponseScores:
        """Scores of the K responses under the policy."""
        return score_responses(model, inputs, self.layout, router_logits=self.aux_loss_enabled)

    def score_pairs(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[ResponseScores, Tensor, Tensor]:
        """Scores of the 2B responses under the policy, and (B,) log-probabilities of both sides under the reference."""
        scores = self.score_policy(model, inputs)
        if "ref_chosen_logps" in inputs:
            return scores, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return scores, *self.compute_ref_log_probs(model, inputs)

    def finish_loss(
        self, losses: Tensor, scores: ResponseScores, inputs: Mapping[str, Tensor], metrics: RowMetrics
    ) -> Tensor:
        """The objective () of per-row losses (B,), after noting them and the metrics."""
        ones = torch.ones_like(losses)
        metrics = {"loss": (losses.detach(), ones), **policy_metrics(scores, Lists.of(inputs)), **metrics}
        if self.model.training:
            self.guard.watch(losses, inputs["row_index"])
            self._tokens = self._tokens + inputs["num_tokens"]
        self.note_rows(metrics, inputs)
        loss = mean_over_rows(losses, inputs)
        if scores.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.router_loss
        return loss

    def note_rows(self, metrics: RowMetrics, inputs: Mapping[str, Tensor]) -> None:
        """Add figures of a batch's rows to those of the next log, or of the evaluation."""
        if self.model.training:
            self._add({name: (counted(t, inputs), counted(n, inputs)) for name, (t, n) in metrics.items()})
        else:
            self._eval_means.add(inputs["row_index"], metrics)

    def note_training(self, metrics: RowMetrics, tokens: Tensor) -> None:
        """Add figures to those of the next log, and the tokens () of a batch to those put through the policy."""
        self._tokens = self._tokens + tokens
        self._add(metrics)

    def _add(self, metrics: RowMetrics) -> None:
        for name, (totals, counts) in metrics.items():
            self._train_means.add(name, totals, counts)

    def complete_means(self, means: dict[str, float]) -> None:
        """Change the means of a training log, where a method's objective is more than the mean of its rows' losses."""

    def passing_figures(self) -> dict[str, float]:
        """Figures of the moment, to be shown but not recorded."""
        return {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, with what each row counts."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        weigh_rows(batches, self.accelerator)
        return batches, items

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, with every metric under the prefix of its own set (`eval_<set>_...`)."""
        self._eval_prefix = metric_key_prefix
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the exact means since the last log (the summary at the end of training has none)."""
        if RUN_SUMMARY in logs:
            means, prefix = {}, ""
        elif any(key.startswith("eval") for key in logs):
            means, prefix = self._eval_means.pop(), f"{self._eval_prefix}_"
        else:
            means, prefix = self._train_means.pop(), ""
            if means:
                means["num_tokens"] = self._num_tokens()
                self.complete_means(means)
        if self.aux_loss_enabled:
            means.pop("loss", None)  # the library's figure holds the router's loss too
        logs.update({f"{prefix}{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """With the folder there: the library takes none for the best checkpoint whose folder an engine makes later."""
        if output_dir is not None and self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Put prefopt's card beside the checkpoints instead of TRL's draft."""
        if self.is_world_process_zero() and self._card:
            Path(self.args.output_dir, "README.md").write_text(self._card, encoding="utf-8")

    def _num_tokens(self) -> int:
        """Tokens put through the policy so far, without padding, over all processes."""
        tokens = torch.as_tensor(self._tokens, device=self.accelerator.device)
        return int(self.accelerator.reduce(tokens))

    def progress_state(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint holds besides weights, optimizer and RNG, so that metrics go on seamlessly.

        Every process must call it; the state is that of all of them. What is too large for it goes into files of
        `folder`, which is the checkpoint's.
        """
        return {"num_tokens": self._num_tokens(), "train_means": self._train_means.state()}

    def load_progress_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Take up `progress_state` of the checkpoint in `folder`: the main process for all."""
        if self.accelerator.is_main_process:
            self._tokens = state["num_tokens"]
            self._train_means.load_state(state["train_means"], self.accelerator.device)


def _are_scored(sets: list[Dataset]) -> bool:
    """Whether the reference log-probabilities of all sets are known.

    Raises:
        ValueError: those of some sets are, those of others not.
    """
    scored = {set(REFERENCE_COLUMNS) <= set(rows.column_names) for rows in sets}
    if len(scored) > 1:
        raise ValueError(f"{' and '.join(REFERENCE_COLUMNS)} must be in all sets or in none")
    return scored.pop()


def _numbered(dataset: Dataset) -> Dataset:
    """With the position of every row, by which metrics and messages know it again."""
    return dataset.add_column("row_index", list(range(len(dataset))))
