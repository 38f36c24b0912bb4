"""Norms of the q, k and v biases of both sides, layer by layer: what a plot shows at a glance and a hash does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen2tool.checkpoint.inventory import QKV
from qwen2tool.checkpoint.view import View, read
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import UserError

BiasNorms = Mapping[str, Sequence[tuple[float | None, float | None]]]
"""q, k or v -> (reference's, candidate's) L2 norm of the bias, layer by layer; None where there is none."""


def bias_norms(reference: View, candidate: View) -> BiasNorms:
    """Reads every q, k and v bias of two views: a few hundred kB."""
    layers = max(reference.geometry.num_hidden_layers, candidate.geometry.num_hidden_layers)
    found = {}
    for projection in QKV:
        names = [f"model.layers.{layer}.self_attn.{projection}_proj.bias" for layer in range(layers)]
        found[projection] = [(_norm(reference, name), _norm(candidate, name)) for name in names]
    return found


def norms_by_name(reference: str, candidate: str) -> BiasNorms:
    """The same of two sides by the names under which they were compared; empty where one of them is no base."""
    try:
        return bias_norms(open_qwen2(reference), open_qwen2(candidate, whole=False))
    except UserError:
        return {}


def _norm(view: View, name: str) -> float | None:
    if name not in view.tensors:
        return None
    return float(read(view.tensors[name]).double().norm())
