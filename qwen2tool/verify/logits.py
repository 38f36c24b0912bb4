"""Third stage: both models on the same tokens, in fp32, one model in memory at a time.

Of each model only the final hidden states at scored positions and its head are kept; logits are formed for both a few
rows at a time, so that 151,936 columns never stand for more than a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.load import Dtype, load_model, quiet_transformers
from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.routing.attention import safe_attention
from qwen2tool.verify.statistics import LogitFigures, concatenate, summarise, token_figures

CHUNK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What predicts: hidden states (N, H) on the CPU and the head (V, H), both in the dtype the model ran in."""

    states: torch.Tensor
    head: torch.Tensor

    def logits(self, rows: slice) -> torch.Tensor:
        """(rows, V) in fp32, on the head's device."""
        return (self.states[rows].to(self.head.device) @ self.head.T).float()


def predict(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    adapter: Adapter | None,
    dtype: Dtype,
    device: str,
    nf4: bool = False,
    attention: Literal["sdpa", "eager"] = "sdpa",
    label: str,
) -> Predictions:
    """Runs one model over `samples`; with `adapter`, through PEFT's own layers, which share no code with our merge."""
    model: Any = load_model(checkpoint, dtype=dtype, device=device, nf4=nf4, attention=attention)
    if adapter is not None:
        from peft import PeftModel

        with quiet_transformers():
            model = PeftModel.from_pretrained(model, adapter.path).eval().get_base_model()
    return _run(model, samples, device, label)


def predict_damaged(checkpoint: Checkpoint, samples: Sequence[Sample], device: str, label: str) -> Predictions:
    """Runs a candidate that may lack tensors, as transformers would: what is missing is filled in (biases with zeros).

    `load_model` refuses such a checkpoint, rightly; here the damage is what is being measured.
    """
    from transformers import Qwen2ForCausalLM

    with quiet_transformers():
        model = Qwen2ForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, device_map={"": device}).eval()
    return _run(model, samples, device, label)


def _run(model: Any, samples: Sequence[Sample], device: str, label: str) -> Predictions:
    states = []
    tokens = sum(len(sample.ids) for sample in samples)
    with torch.no_grad(), safe_attention(), progress(label, tokens) as advance:
        for sample in samples:
            hidden = model.model(torch.tensor([sample.ids], device=device), use_cache=False).last_hidden_state[0]
            states.append(hidden[torch.tensor(sample.scored[1:], device=device).nonzero()[:, 0]].cpu())
            advance(len(sample.ids))
    return Predictions(states=torch.cat(states), head=model.get_output_embeddings().weight.detach())


def targets_of(samples: Sequence[Sample]) -> torch.Tensor:
    """The scored tokens, (N,), in the order of `Predictions.states`."""
    picked = [[t for t, counts in zip(s.ids[1:], s.scored[1:], strict=True) if counts] for s in samples]
    return torch.tensor([token for row in picked for token in row])


def compare(reference: Predictions, candidate: Predictions, targets: torch.Tensor) -> LogitFigures:
    """Figures of `candidate` against `reference` over all scored tokens."""
    parts = []
    with progress("comparing logits", len(targets)) as advance:
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            mine, theirs = reference.logits(rows), candidate.logits(rows)
            width = min(mine.shape[1], theirs.shape[1])  # a resized vocabulary is the inventory's finding
            chunk = targets[rows].to(mine.device)
            parts.append(token_figures(mine[:, :width], theirs[:, :width].to(mine.device), chunk))
            advance(len(chunk))
    return summarise(concatenate(parts))
