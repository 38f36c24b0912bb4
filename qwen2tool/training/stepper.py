"""Training steps over fixed shapes without a Trainer: for benchmarks, and for loops of one's own.

    stepper = Stepper.from_checkpoint(path, StepOptions(rank=64, quantize="nf4"))
    loss = stepper.step([ids])          # ids: (B, T) on the host; every token but the first of a row is scored

One step is `accumulation` passes, clipping of the gradient's norm, and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.load import Dtype, load_model
from qwen2tool.errors import UserError
from qwen2tool.routing.memory import Recompute
from qwen2tool.routing.swap import send_away
from qwen2tool.training.fast import embedding_to_host, put_on_fast_path
from qwen2tool.training.forward import log_probs
from qwen2tool.training.model import fresh_lora, hash_compiler
from qwen2tool.training.passes import Batch, Outcome, Passes

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How to train: LoRA on all seven linears.

    Attributes:
        quantize: "nf4" holds the frozen linears in NF4 with double quantisation.
        memory_budget_gb: of GPU memory for everything once the model is loaded, in 10^9 bytes; None: what is free.
        recompute, graphs: see `routing.memory` and `passes`.
        accumulation: passes a step.
        reference_pass: score every batch with the adapter off as well, before, as DPO does without a cache.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.0
    quantize: Literal["none", "nf4"] = "nf4"
    memory_budget_gb: float | None = None
    recompute: Recompute = "auto"
    graphs: bool = True
    accumulation: int = 1
    reference_pass: bool = False
    learning_rate: float = 2e-4
    max_grad_norm: float = 0.3
    seed: int = 0
    device: str = "cuda"
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise UserError("a Stepper scales no loss, which float16 needs", "Use bfloat16, or `train`")


class Stepper:
    """A model, its optimizer and its passes; `model` is a PeftModel, on the fast path from the first step on."""

    def __init__(self, model: Any, options: StepOptions) -> None:
        self.model, self.options = model, options
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=options.learning_rate, weight_decay=0.0, fused=options.device == "cuda"
        )
        self._passes: Passes | None = None
        self._described: dict[str, Any] = {}
        self.reference: torch.Tensor | None = None
        """The mean loss of a token with the adapter off in the last step, (), where `reference_pass` asks for it."""

    @classmethod
    def from_checkpoint(cls, path: Path, options: StepOptions) -> Stepper:
        """Loads `path` and puts a fresh LoRA on it."""
        torch.manual_seed(options.seed)
        hash_compiler(options.device)
        model = load_model(
            open_checkpoint(path), dtype=options.dtype, device=options.device, nf4=options.quantize == "nf4"
        )
        model.config.use_cache = False
        model = fresh_lora(
            model, rank=options.rank, alpha=options.alpha, dropout=options.dropout, targets=LINEARS
        ).train()
        if options.memory_budget_gb is not None:
            embedding_to_host(model)
        return cls(model, options)

    def step(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """One optimizer step over `accumulation` tensors of ids (B, T), on the host; the mean loss of a token, ()."""
        if self._passes is None:
            self._prepare(batches[0])
        assert self._passes is not None
        send_away(self.model)
        scored = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
        outcomes = [self._passes(self._batch(ids, scored)) for ids in batches]
        torch.nn.utils.clip_grad_norm_(self._parameters, self.options.max_grad_norm)
        self._optimizer.step()
        # Graphs write to tensors that stay: zeroed now, behind the optimizer, the next pass need not wait for it.
        self._optimizer.zero_grad(set_to_none=not self._passes.captured)
        if self.options.reference_pass:
            self.reference = torch.stack([outcome["reference"] for outcome in outcomes]).sum()
        return torch.stack([outcome["loss"] for outcome in outcomes]).sum()

    def describe(self) -> dict[str, Any]:
        """The routes and the memory plan, once a step was made."""
        graphs = self._passes.captured if self._passes else 0
        return {**self._described, "graphs": graphs}

    def forget_graphs(self) -> None:
        """The next pass runs eagerly, as the first one did. A replay allocates nothing that torch counts: where graphs
        were captured before the optimizer had its state, the peak that torch tells lacks that until a pass ran so."""
        if self._passes is not None:
            self._passes.forget()

    def _prepare(self, ids: torch.Tensor) -> None:
        options = self.options
        budget = int(options.memory_budget_gb * 1e9) if options.memory_budget_gb else None
        dtype = getattr(torch, options.dtype)
        plans = put_on_fast_path(
            self.model,
            tokens=ids.numel(),
            length=ids.shape[1],
            dtype=dtype,
            budget=budget,
            recompute=options.recompute,
            graphs=options.graphs,
        )
        self._described = {"routes": plans.routes.counts, "memory": plans.memory.describe()}
        self._passes = Passes(self._loss, self._parameters, nullcontext, graphs=plans.graphs)

    def _loss(self, batch: Batch) -> Outcome:
        found = {}
        if self.options.reference_pass:
            with torch.no_grad(), self.model.disable_adapter():
                found["reference"] = self._mean(batch)
        return {**found, "loss": self._mean(batch)}

    def _mean(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = -log_probs(self.model, batch, batch["labels"]).sum() / batch["scored"]
        return loss

    def _batch(self, ids: torch.Tensor, scored: int) -> dict[str, Any]:
        rows, columns = ids.shape
        slots = torch.arange(rows * columns).view(rows, columns)
        found = {
            "input_ids": ids.flatten(),
            "positions": torch.arange(columns).repeat(rows),
            "offsets": torch.arange(0, (rows + 1) * columns, columns, dtype=torch.int32),
            "rows": slots[:, :-1].flatten(),
            "labels": ids[:, 1:].flatten(),
            "scored": torch.tensor(float(scored)),
        }
        return {name: value.to(self.options.device) for name, value in found.items()} | {"longest": columns}
