"""transformers.Trainer with our passes and losses: SFT and DPO share the guard and the metrics.

Everything else (accumulation, clipping, AdamW, schedule, distribution, resuming) is the Trainer's own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.routing.swap import send_away
from qwen2tool.training.fast import settle
from qwen2tool.training.forward import log_probs, sum_by_owner
from qwen2tool.training.guard import (
    Whereabouts,
    norms_of,
    on_host,
    require_finite_gradients,
    require_finite_loss,
    require_finite_weights,
)
from qwen2tool.training.losses import dpo_sigmoid, reward_accuracy
from qwen2tool.training.passes import Outcome, Passes

Batch = dict[str, Any]
ON_HOST = {"records", "tokens", "scored"}
"""What a pass does not read."""
NORMS = "norms of gradients"
"""Beside what a pass reports, for the one wait of both."""
MOST_OVERFLOWS = 20
"""Skipped steps on end in float16; a scale of 65,536 is down to 1 after 16."""


class GuardedTrainer(Trainer):
    """Common ground: names the batch, refuses what is not finite, runs passes eagerly or from graphs.

    Args:
        places: sentence for each record of the data file, for errors that name a batch.
        graphs, reserve: see `passes.Passes`.
        autocast: makes the context of the forward.
        options: what transformers.Trainer takes.

    Attributes:
        step_losses: of each optimizer step, nats.
        tokens, seconds: what batches held, without what only fills them up, and how long `train` took.
    """

    def __init__(
        self,
        *,
        places: list[str],
        graphs: bool = False,
        reserve: int = 0,
        autocast: Callable[[], Any] = nullcontext,
        **options: Any,
    ) -> None:
        # Trainer would spread one process over all visible GPUs (DataParallel), which NF4 layers are not made for, and
        # multiply the batch by their number; it reads this when it is made.
        options["args"]._n_gpu = min(options["args"].n_gpu, 1)
        super().__init__(**options)
        self.where = Whereabouts(places)
        self._graphs, self._reserve, self._autocast = graphs, reserve, autocast
        self._passes: Passes | None = None
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self._counted: int | None = None
        self._scale, self._overflows, self._watched_step = 0.0, 0, -1
        self.step_losses: dict[int, float] = defaultdict(float)
        self.tokens, self.seconds = 0, 0.0
        self._sums: dict[str, list[float]] = defaultdict(list)

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[list[Batch]], torch.Tensor | int | None]:
        """Adds what the step's loss is a mean over, in all its batches; Trainer's own counts labels it has to shift."""
        batches, _ = super().get_batch_samples(*arguments, **options)
        return batches, sum(self.weight(one) for batch in batches for one in batch)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's loop, with the seconds it took in `seconds`."""
        start = time.perf_counter()
        try:
            return super().train(*arguments, **options)
        finally:
            self.seconds = time.perf_counter() - start

    def training_step(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of each pass of a batch, checked; their share of the step's loss, (), detached."""
        passes = self._passes_over(model)
        device = next(iter(self._trainable.values())).device
        divisor = torch.full((), float(num_items_in_batch), device=device)
        return torch.stack([self._one_pass(passes, one, divisor) for one in inputs]).sum()

    def _one_pass(self, passes: Passes, inputs: Batch, divisor: torch.Tensor) -> torch.Tensor:
        self.where.enter(self.state.global_step + 1, inputs["records"])
        batch = {name: value for name, value in self._prepare_inputs(inputs).items() if name not in ON_HOST}
        outcome = passes(batch | {"divisor": divisor})
        scaler = self.accelerator.scaler
        # A loss scaler looks for gradients that overflowed itself, and skips their step.
        watched = {} if scaler is not None else {n: p.grad for n, p in self._trainable.items() if p.grad is not None}
        noted = on_host(outcome | ({NORMS: norms_of(watched.values())} if watched else {}))
        (loss,), norms = noted.pop("loss"), noted.pop(NORMS, [])
        require_finite_loss(loss, self.where)
        require_finite_gradients(dict(zip(watched, norms, strict=True)), self.where)
        if scaler is not None:
            self._watch_scale(scaler)
        for name, values in noted.items():
            self._sums[name] += values[: len(inputs["records"])]  # what fills up comes last
        self.step_losses[self.state.global_step] += loss
        self.tokens += inputs["tokens"]
        return outcome["loss"]

    def _passes_over(self, model: torch.nn.Module) -> Passes:
        """Made at the first step, when the Trainer has placed the model and made its loss scaler."""
        if self._passes is None:
            model.train()  # a model's own flag may be that of training while its layers' is not
            settle(self.accelerator.unwrap_model(model))
            scaler = self.accelerator.scaler
            self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._passes = Passes(
                partial(self.batch_loss, model),
                list(self._trainable.values()),
                self._autocast,
                graphs=self._graphs,
                scale=scaler.scale if scaler is not None else lambda loss: loss,
                ready=lambda: bool(self.optimizer.state),
                reserve=self._reserve,
            )
        elif not model.training:
            model.train()
        send_away(model)
        return self._passes

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        """Trainer's own estimate; it would count the parameters anew in every pass, which takes longer than a replay
        does to launch."""
        if self._counted is None:
            self._counted = self.model.num_parameters(exclude_embeddings=True)
        return int(6 * sum(one["input_ids"].numel() for one in inputs) * self._counted)

    def release(self) -> None:
        """Gives back what captured passes hold of the GPU, once training is over."""
        self._passes = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _watch_scale(self, scaler: Any) -> None:
        """fp16's loss scaler skips a step whose gradients overflow and halves its scale; that must come to an end.

        Raises:
            UserError: MOST_OVERFLOWS steps on end overflowed: it is not the scale.
        """
        if self.state.global_step == self._watched_step:
            return
        self._watched_step, before, self._scale = self.state.global_step, self._scale, float(scaler.get_scale())
        self._overflows = self._overflows + 1 if self._scale < before else 0
        if self._overflows >= MOST_OVERFLOWS:
            raise UserError(
                f"{self.where}: the last {MOST_OVERFLOWS} steps overflowed in float16 and were skipped",
                "Lower --learning-rate, or train in bfloat16 or float32",
                EXIT_FINDING,
            )

    def weight(self, batch: Batch) -> int:
        """How many of what the loss is a mean over are in a batch. A sum over it is divided by those of all batches of
        the step, so that each weighs the same however the step is cut into batches; the last one is often smaller."""
        raise NotImplementedError

    def batch_loss(self, model: Any, batch: Batch) -> Outcome:
        """The batch's share of the step's loss, with gradient, and what is worth a note; each task has its own."""
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

    def weight(self, batch: Batch) -> int:
        """Scored tokens."""
        return int(batch["scored"])

    def batch_loss(self, model: Any, batch: Batch) -> Outcome:
        """Sum over this batch's scored tokens / scored tokens of all batches of the step."""
        return {"loss": -log_probs(model, batch, batch["labels"]).sum() / batch["divisor"]}


class DpoTrainer(GuardedTrainer):
    """Sigmoid DPO against reference log-probs that come with the batch: mean over the pairs of the accumulated batch.

    Args:
        beta: see `losses.dpo_sigmoid`.
        options: see GuardedTrainer.
    """

    def __init__(self, *, beta: float, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["records"])

    def batch_loss(self, model: Any, batch: Batch) -> Outcome:
        """Sum over this batch's pairs / pairs of all batches of the step."""
        pairs = len(batch["reference_chosen"])
        scored = log_probs(model, batch, batch["labels"])
        chosen, rejected = sum_by_owner(scored, batch["owners"], 2 * pairs).chunk(2)
        terms = dpo_sigmoid(chosen, rejected, batch["reference_chosen"], batch["reference_rejected"], self.beta)
        return {
            "loss": torch.where(batch["real"], terms.loss, 0.0).sum() / batch["divisor"],
            "rewards/chosen": terms.rewards_chosen,
            "rewards/rejected": terms.rewards_rejected,
            "rewards/margins": terms.rewards_chosen - terms.rewards_rejected,
            "rewards/accuracies": reward_accuracy(terms),
        }
