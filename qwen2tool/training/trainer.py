"""transformers.Trainer with our losses: SFT and DPO share the guard, the safe attention and the metrics.

Everything else (accumulation, clipping, AdamW, schedule, distribution, resuming) is the Trainer's own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import Trainer

from qwen2tool.routing.attention import safe_attention
from qwen2tool.training.forward import answer_log_probs, score, sum_nll
from qwen2tool.training.guard import (
    Whereabouts,
    require_finite_gradients,
    require_finite_loss,
    require_finite_weights,
)
from qwen2tool.training.losses import dpo_sigmoid, reward_accuracy

Batch = dict[str, torch.Tensor]


class GuardedTrainer(Trainer):
    """Common ground: names the batch, refuses what is not finite, keeps cuDNN attention away.

    Args:
        places: sentence for each record of the data file, for errors that name a batch.
        options: what transformers.Trainer takes.
    """

    def __init__(self, *, places: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.where = Whereabouts(places)
        # Makes Trainer count the labels of the whole accumulated batch and hand the number to compute_loss.
        self.model_accepts_loss_kwargs = True
        # Trainer would spread one process over all visible GPUs (DataParallel), which NF4 layers are not made for.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self.step_losses: dict[int, float] = defaultdict(float)
        self._sums: dict[str, list[float]] = defaultdict(list)

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch, checked."""
        self.where.enter(self.state.global_step + 1, inputs["records"])
        with safe_attention():
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        require_finite_gradients(model, self.where)
        self.step_losses[self.state.global_step] += loss.item()
        return loss

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of one batch, scaled so that the batches of one optimizer step add up."""
        if return_outputs:
            raise NotImplementedError("evaluation runs through qwen2tool.training.evaluate")
        loss: torch.Tensor = self.batch_loss(model, inputs, num_items_in_batch)
        require_finite_loss(loss.detach(), self.where)
        return loss

    def batch_loss(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """A scalar with gradient; each task has its own."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of what the loss noted since the last log."""
        noted = {name: sum(values) / len(values) for name, values in self._sums.items() if values}
        self._sums.clear()
        super().log({**logs, **noted}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        require_finite_weights(self.model)
        super()._save(output_dir, state_dict)


class SftTrainer(GuardedTrainer):
    """Mean negative log-likelihood over the scored tokens of the whole accumulated batch."""

    def batch_loss(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """Sum over this batch's scored tokens / scored tokens of all batches (and processes) of the step."""
        scored = score(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        # Gradients are averaged over processes; the count is already the sum over them.
        loss: torch.Tensor = sum_nll(scored) / num_items_in_batch * self.accelerator.num_processes
        return loss


class DpoTrainer(GuardedTrainer):
    """Sigmoid DPO against reference log-probs that come with the batch.

    Args:
        beta: see `losses.dpo_sigmoid`.
        places, options: see GuardedTrainer.
    """

    def __init__(self, *, beta: float, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta

    def batch_loss(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """Mean over this batch's pairs; without a token count, Trainer divides by the number of batches of the step."""
        chosen, rejected = answer_log_probs(
            score(model, inputs["input_ids"], inputs["attention_mask"], inputs["targets"])
        ).chunk(2)
        terms = dpo_sigmoid(chosen, rejected, inputs["reference_chosen"], inputs["reference_rejected"], self.beta)
        self._note("rewards/chosen", terms.rewards_chosen)
        self._note("rewards/rejected", terms.rewards_rejected)
        self._note("rewards/margins", terms.rewards_chosen - terms.rewards_rejected)
        self._note("rewards/accuracies", reward_accuracy(terms))
        return terms.loss.mean()

    def _note(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] += values.tolist()
