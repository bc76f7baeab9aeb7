"""The trainer of Soft Preference Optimization."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_cli.losses.gpo import length_normalized
from prefopt_cli.losses.soft import pair_weights, sampled_kl, soft_pair_loss, soft_ranked_loss
from prefopt_cli.recipe.schema import SoftSettings
from prefopt_cli.scoring.forward import ResponseScores
from prefopt_cli.training.batches import Lists
from prefopt_cli.training.last_batch import mean_over_rows
from prefopt_cli.training.row_metrics import reward_metrics
from prefopt_cli.training.samples import SampleWindow
from prefopt_cli.training.sampling_prompts import SamplingPrompts
from prefopt_cli.training.trainer import PreferenceTrainer


class SoftTrainer(PreferenceTrainer):
    """Minimises L_pref + kl_coef KL(policy || reference) (Sharifnassab et al., arXiv 2405.00747).

    The preference term is the softmax loss of pairs, best-of-n choices and ranked lists and knows of no reference.
    The KL is over responses that the policy writes itself now and then (see `SampleWindow`); an evaluation reports the
    preference term alone, without weights.

    Args:
        settings: the recipe's method section.
        sampling: what the policy is asked; None where `kl_coef` is 0.
        stop_ids: tokens that end a response.
        samples_file: where a few samples of every draw are kept; None keeps none.
        **arguments: see `PreferenceTrainer`; `ref_model` is the reference of the KL.

    Raises:
        ValueError: `kl_coef` is positive, and there are no prompts to sample.
    """

    def __init__(
        self,
        *,
        settings: SoftSettings,
        sampling: SamplingPrompts | None = None,
        stop_ids: tuple[int, ...] = (),
        samples_file: Path | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments, needs_reference=settings.samples)
        self.settings = settings
        self.samples: SampleWindow | None = None
        if settings.samples:
            if sampling is None:
                raise ValueError(
                    "With kl_coef > 0 the policy is sampled, and nothing says for which prompts."
                )
            self.samples = SampleWindow(
                self, settings.regularizer, sampling, stop_ids=stop_ids, file=samples_file
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean preference loss of a batch's rows, in training plus the weighted KL on this micro-batch's samples."""
        if self.samples is not None and self.model.training:
            # Before anything else: writing takes memory, and the activations of this batch would lie beside it.
            self.samples.begin(self.state.global_step)
        lists = Lists.of(inputs)
        scores = self.score_policy(model, inputs)
        logps = self._row_logps(scores, lists)
        weights = self._weights(logps, inputs)
        losses = self._losses(logps, lists, weights)
        with torch.no_grad():
            metrics = {
                **reward_metrics(self.settings.alpha * logps, lists),
                "soft/gradient_weight": (self._pull(logps, lists, weights), torch.ones_like(losses)),
            }
        loss = self.finish_loss(losses, scores, inputs, metrics)
        if self.samples is not None and self.model.training:
            loss = loss + self.settings.kl_coef * self._kl(model, self.samples)
        return (loss, {}) if return_outputs else loss

    def _row_logps(self, scores: ResponseScores, lists: Lists) -> Tensor:
        """(B, N) log-probabilities, per token where the recipe asks for it."""
        lengths = scores.lengths if self.settings.length_normalize else None
        return lists.by_row(length_normalized(scores.logps, lengths))

    def _losses(self, logps: Tensor, lists: Lists, weights: Tensor | None) -> Tensor:
        """(B,) from log-probabilities (B, N); a best-of-n choice is a ranking whose other responses all tie."""
        alpha = self.settings.alpha
        if not lists.are_pairs:
            return soft_ranked_loss(logps, lists.ranks, lists.mask, alpha=alpha)
        chosen, rejected = logps.unbind(1)
        return soft_pair_loss(chosen, rejected, alpha=alpha, weights=weights)

    def _weights(self, logps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(B,) mu of pairs (B, 2), relative to the mean over all processes' batches; None where all count alike.

        In an evaluation they do: no figure of it may depend on how the pairs are batched.
        """
        if self.settings.mu == "none" or not self.model.training:
            return None
        chosen, rejected = logps.detach().unbind(1)
        mean = self.accelerator.reduce(mean_over_rows(torch.logaddexp(chosen, rejected), inputs), "mean")
        return pair_weights(
            chosen, rejected, gamma=self.settings.mu.gamma, clamp=self.settings.mu_clamp, mean=mean
        )

    def _pull(self, logps: Tensor, lists: Lists, weights: Tensor | None) -> Tensor:
        """(B,) half the sum of |d loss / d logp| over a row's responses: for a pair mu sigma(-alpha Delta)."""
        with torch.enable_grad():
            at = logps.detach().clone().requires_grad_()
            slopes = torch.autograd.grad(self._losses(at, lists, weights).sum(), at)[0]
        return 0.5 * slopes.abs().sum(1)

    def _kl(self, model: nn.Module, samples: SampleWindow) -> Tensor:
        """() this micro-batch's part of the KL: over the micro-batches of a step it is the mean over all samples."""
        total = torch.zeros((), device=self.accelerator.device)
        micro_batches = self.current_gradient_accumulation_steps
        for group in samples.groups(micro_batches):
            scores = samples.score(model, group)
            divergences = sampled_kl(
                scores.kl, scores.log_probs, scores.mask, estimator=self.settings.regularizer.estimator
            )
            self.guard.watch_samples(divergences)
            self.note_training(samples.metrics(group, scores, divergences), group.batch["num_tokens"])
            # The trainer takes the mean over the micro-batches.
            total = total + divergences.sum() * micro_batches / samples.size
        return total

    def complete_means(self, means: dict[str, float]) -> None:
        """The objective, with the KL that belongs to it."""
        if "kl/ref" in means:
            means["soft/preference_loss"] = means["loss"]
            means["loss"] += self.settings.kl_coef * means["kl/ref"]

    def passing_figures(self) -> dict[str, float]:
        """The share of the training time that went into sampling, in [0, 1]."""
        return {} if self.samples is None else {"sampling_share": self.samples.time_share}

    def progress_state(self, folder: Path) -> dict[str, Any]:
        """With the samples in use, which the weights of a later step would not draw again."""
        state = super().progress_state(folder)
        return state if self.samples is None else {**state, "samples": self.samples.state()}

    def load_progress_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Every process takes up its own samples."""
        super().load_progress_state(state, folder)
        if self.samples is not None and "samples" in state:
            self.samples.load_state(state["samples"])
