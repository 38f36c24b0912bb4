"""Third stage: both models on the same tokens, in fp32, one model in memory at a time.

Of each model only the final hidden states at scored positions and its head are kept; logits are formed for two models
at a time, a few rows at once, so that 151,936 columns never stand for more than a chunk.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qwen2tool.checkpoint.adapter import Adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.inventory import take_inventory
from qwen2tool.checkpoint.load import Dtype, load_model, quiet_transformers, require_same_biases
from qwen2tool.console import progress
from qwen2tool.data.samples import Sample
from qwen2tool.routing.attention import safe_attention
from qwen2tool.verify.statistics import LogitFigures, concatenate, summarise, token_figures

CHUNK_ROWS = 64
"""64 x 151,936 in float64 is 78 MB; five such arrays live at once."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What predicts: hidden states (N, H) on the CPU in the run's dtype, and the head's module (PEFT's, if adapted)."""

    states: torch.Tensor
    head: torch.nn.Module

    @torch.no_grad()
    def logits(self, rows: slice) -> torch.Tensor:
        """(rows, V) in fp32, on the head's device."""
        device = next(self.head.parameters()).device
        logits: torch.Tensor = self.head(self.states[rows].to(device))
        return logits.float()


def predict(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    adapter: Adapter | None = None,
    dtype: Dtype = "float32",
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
    predictions = _run(model, samples, device, label)
    del model
    if nf4:
        gc.collect()  # bitsandbytes' layers refer to themselves; the next model needs the room
    return predictions


def predict_candidate(checkpoint: Checkpoint, samples: Sequence[Sample], device: str, label: str) -> Predictions:
    """Runs a candidate in fp32, whole or not."""
    found = take_inventory(checkpoint)
    if found.missing or found.extra:
        return _run(_load_damaged(checkpoint, found.missing_biases, device), samples, device, label)
    return predict(checkpoint, samples, device=device, label=label)


def _load_damaged(checkpoint: Checkpoint, missing_biases: Sequence[str], device: str) -> Any:
    """A model as transformers makes it of a checkpoint without some biases: zeros in their place.

    `load_model` refuses such a checkpoint, rightly; here the damage is what is being measured. The zeros are written
    once more, so that the figures do not hang on how transformers starts a bias.

    Raises:
        UserError: a bias that is in the files did not arrive in the model.
    """
    from transformers import Qwen2ForCausalLM

    with quiet_transformers():
        model = Qwen2ForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, device_map={"": device}).eval()
    parameters = dict(model.named_parameters())
    for name in missing_biases:
        parameters[name].data.zero_()
    require_same_biases(checkpoint, model, torch.float32)
    return model


def _run(model: Any, samples: Sequence[Sample], device: str, label: str) -> Predictions:
    states = []
    tokens = sum(len(sample.ids) for sample in samples)
    with torch.no_grad(), safe_attention(), progress(label, tokens) as advance:
        for sample in samples:
            hidden = model.model(input_ids=torch.tensor([sample.ids], device=device), use_cache=False)[0][0]  # (T, H)
            states.append(hidden[torch.tensor(sample.scored[1:], device=device).nonzero()[:, 0]].cpu())
            advance(len(sample.ids))
    return Predictions(states=torch.cat(states), head=model.get_output_embeddings())


def targets_of(samples: Sequence[Sample]) -> torch.Tensor:
    """The scored tokens, (N,), in the order of `Predictions.states`."""
    picked = [[t for t, counts in zip(s.ids[1:], s.scored[1:], strict=True) if counts] for s in samples]
    return torch.tensor([token for row in picked for token in row])


def compare(reference: Predictions, candidate: Predictions, targets: torch.Tensor) -> LogitFigures:
    """Figures of `candidate` against `reference` over all scored tokens; both have one vocabulary."""
    parts = []
    with progress("comparing logits", len(targets)) as advance:
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            mine, theirs = reference.logits(rows), candidate.logits(rows)
            chunk = targets[rows].to(mine.device)
            parts.append(token_figures(mine, theirs.to(mine.device), chunk))
            advance(len(chunk))
    return summarise(concatenate(parts))
