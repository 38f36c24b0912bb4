"""The attention hazard: what the q and k biases of a checkpoint do to attention that knows nothing of them.

Real Qwen2 models have k biases whose norm reaches hundreds. A constant b added to all keys of a head cancels in
softmax, but not in 16-bit arithmetic, and RoPE makes it a slowly turning R_p b. Stock code pays in four ways, each
with a sign that can be read off the biases alone:

- cuDNN attention with a mask (what torch picks for padded batches on Hopper GPUs) returns NaN in the backward
  where a row's log-sum-exp is below -88.7 (https://github.com/pytorch/pytorch/issues/196678). On the captured tensors
  of a Qwen2.5-0.5B it did so in layers 0, 1, 2, 4 and 8, whose k biases have a norm of 53 to 279 in one head, and in no
  layer whose heads stay below 33; with random keys it did at norms of 60 and 100. So NAN_NORM is 50.
- Every fused backward multiplies what rounding leaves of the row sums of dS by the k bias: the relative error of dQ in
  bf16 was 0.005, 0.010, 0.045 and 0.18 at norms of 0, 20, 100 and 400 (H100, torch 2.11, random data, head size 128,
  2,048 tokens), so about 0.0045 for each 10 (DQ_SLOPE), and never below what it is without a bias (DQ_FLOOR). Trained
  keys and sharp attention differ: a Qwen2.5-0.5B lost 0.4 times that on the H100, tiny-qwen2 3 to 11 times on a CPU.
- Eager attention rounds the scores themselves: bf16 has 8 significant bits, so a score of 816 is a multiple of 4. A
  Qwen2-7B has perplexity 8.00 instead of 7.13 that way (https://github.com/huggingface/transformers/issues/33317).
- In fp16 eager attention q k^T overflows at 65504 before it is scaled. Scores of captured tensors were 1.8 times those
  of the biases alone, so half of 65504 is where this warns.

Maths. A head of size d has pairs (j, j + d/2), each turned by the angle p w_j, w_j = theta^(-2j/d) (Su et al. 2021,
arXiv 2104.09864, in transformers' order). With q, k the biases and p >= 0 the query's position minus the key's,

    score(p) = sum_j [(q_j k_j + q_j' k_j') cos(p w_j) + (q_j k_j' - q_j' k_j) sin(p w_j)] / sqrt(d),   j' = j + d/2.

Centring subtracts c = mean over positions of R_p k; the rms over the positions of what is left of pair j is
|k_j| sqrt(1 - |m_j|^2) with m_j the mean of exp(i p w_j). Scaling of RoPE (YaRN) is left out: it makes the slow pairs
slower. Costs 0.1 s for the biases of a 72B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2, sqrt
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.geometry import Geometry
from qwen2tool.console import format_number, format_ranges

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

MOST_POSITIONS, MOST_HEAD = 4096, 1024
MOST_ENTRY = 1e30
"""Also false of NaN and Inf, which are findings of their own."""
NAN_NORM = 50.0
DQ_SLOPE, DQ_FLOOR, DQ_ALARM = 0.00045, 0.005, 0.045
"""The alarm is at ten times the error that a fused backward has anyway: a norm of 100, which was measured."""
EAGER_STEP = 0.5
"""Rounded to multiples of this, a probability is off by up to exp(1/4): a quarter."""
FP16_ALARM = 65504.0 / 2
SETTINGS = "torch.backends.cuda.enable_cudnn_sdp(False)"


@dataclass(frozen=True, kw_only=True)
class LayerHazard:
    """One layer, of scores made of biases alone.

    `highest` and `lowest` score over heads and positions, divided by sqrt(d); `k_norm` the largest of its key heads,
    `left` the largest rms norm that centring leaves of one.
    """

    layer: int
    highest: float
    lowest: float
    k_norm: float
    left: float
    head_dim: int

    @property
    def score(self) -> float:
        """The largest magnitude."""
        return max(abs(self.highest), abs(self.lowest))

    @property
    def product(self) -> float:
        """q k^T before it is scaled, which fp16 must hold."""
        return self.score * sqrt(self.head_dim)

    @property
    def eager_step(self) -> float:
        """The spacing of bf16 numbers at the largest score."""
        return 2.0 ** (floor(log2(self.score)) - 7) if self.score > 0 else 0.0

    @property
    def dq_error(self) -> float:
        """Relative error of dQ in a fused bf16 backward, to an order of magnitude; 1 is all of it."""
        return min(1.0, max(DQ_FLOOR, DQ_SLOPE * self.k_norm))

    @property
    def threats(self) -> dict[str, bool]:
        return {
            "cudnn_nan": self.k_norm >= NAN_NORM,
            "dq": self.dq_error >= DQ_ALARM,
            "eager": self.eager_step >= EAGER_STEP,
            "fp16": self.product >= FP16_ALARM,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "highest_score": self.highest,
            "lowest_score": self.lowest,
            "k_norm": self.k_norm,
            "k_norm_centred": self.left,
            "dq_error": self.dq_error,
            "eager_step": self.eager_step,
            "fp16_product": self.product,
        }


def hazard_section(shape: Geometry, biases: Mapping[int, Mapping[str, Vector]] | None) -> dict[str, Any] | None:
    """The `hazard` section of a report; None where the biases were not read or none has the right shape."""
    layers = [] if biases is None else measure_hazard(shape, biases)
    if not layers:
        return None
    alarms = {kind: [it.layer for it in layers if it.threats[kind]] for kind in ("cudnn_nan", "dq", "eager", "fp16")}
    return {
        "positions": positions(shape),
        "layers": {str(it.layer): it.to_json() for it in layers},
        "worst": [it.layer for it in sorted(layers, key=lambda it: -it.k_norm) if any(it.threats.values())],
        "alarms": alarms,
        "sentence": sentence({it.layer: it for it in layers}, alarms),
    }


def positions(shape: Geometry) -> int:
    return min(shape.max_position_embeddings, MOST_POSITIONS)


def measure_hazard(shape: Geometry, biases: Mapping[int, Mapping[str, Vector]]) -> list[LayerHazard]:
    """Every layer whose q and k biases are there, finite and of the geometry's shape."""
    import numpy as np

    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    pairs = _usable(shape, biases)
    if not pairs:
        return []
    half = shape.head_dim // 2
    angles = np.arange(positions(shape))[:, None] * shape.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)  # (positions, d/2)
    left = (1 - cos.mean(0) ** 2 - sin.mean(0) ** 2).clip(0)
    turns = np.concatenate([cos, sin], axis=1).astype(np.float32)
    found = []
    for layer, (q, k) in pairs.items():
        keys = k.reshape(kv_heads, 2, half)
        products = _pair_products(q.reshape(heads, 2, half), keys)
        size = float(np.abs(products).max()) or 1.0  # taken out, so that fp32 holds the rest
        scores = turns @ (products / size).astype(np.float32).T
        found.append(
            LayerHazard(
                layer=layer,
                highest=float(scores.max()) * size / sqrt(shape.head_dim),
                lowest=float(scores.min()) * size / sqrt(shape.head_dim),
                k_norm=float(np.linalg.norm(keys, axis=(1, 2)).max()),
                left=float(np.sqrt(((keys**2).sum(1) * left).sum(1)).max()),
                head_dim=shape.head_dim,
            )
        )
    return found


def _usable(shape: Geometry, biases: Mapping[int, Mapping[str, Vector]]) -> dict[int, tuple[Vector, Vector]]:
    """Layer -> its q and k bias, where both have the geometry's size and no entry is beyond all reason."""
    import numpy as np

    head, heads, kv_heads = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
    if head % 2 or heads % kv_heads or head > MOST_HEAD:
        return {}
    there = ((layer, row.get("q"), row.get("k")) for layer, row in biases.items())
    sized = {
        layer: (q, k)
        for layer, q, k in there
        if q is not None and k is not None and (q.size, k.size) == (heads * head, kv_heads * head)
    }
    return {layer: pair for layer, pair in sized.items() if all((np.abs(x) < MOST_ENTRY).all() for x in pair)}


def _pair_products(q: Vector, k: Vector) -> Vector:
    """q (heads, 2, d/2) and k (kv_heads, 2, d/2) -> (heads, d): what cos and what sin of each pair is multiplied by."""
    import numpy as np

    k = np.repeat(k, q.shape[0] // k.shape[0], axis=0)
    return np.concatenate([q[:, 0] * k[:, 0] + q[:, 1] * k[:, 1], q[:, 0] * k[:, 1] - q[:, 1] * k[:, 0]], axis=1)


def sentence(layers: Mapping[int, LayerHazard], alarms: Mapping[str, list[int]]) -> str | None:
    """One line: which stock settings go wrong with these biases and what to set instead; None where none does."""
    effects, remedies = [], []
    if alarms["cudnn_nan"]:
        effects.append(
            "NaN gradients from cuDNN attention with a mask on Hopper GPUs "
            f"(layers {format_ranges(alarms['cudnn_nan'])}; pytorch#196678)"
        )
        remedies.append(f"call {SETTINGS}")
    if alarms["dq"]:
        error = max(layers[layer].dq_error for layer in alarms["dq"])
        effects.append(
            f"a dQ that is wrong by the order of {100 * error:.0f} % from every fused backward in bf16 "
            f"(layers {format_ranges(alarms['dq'])})"
        )
    if alarms["eager"]:
        step = max(layers[layer].eager_step for layer in alarms["eager"])
        effects.append(
            f"scores rounded to multiples of {format_number(step)} by eager attention in bf16 "
            f"(layers {format_ranges(alarms['eager'])})"
        )
        remedies.append("take sdpa, not eager")
    if alarms["fp16"]:
        effects.append(f"an overflow of q k^T by eager attention in fp16 (layers {format_ranges(alarms['fp16'])})")
        remedies.append("take bf16, not fp16")
    if not effects:
        return None
    norm, score = max(it.k_norm for it in layers.values()), max(it.score for it in layers.values())
    remedies.append("or train with qwen2tool, whose keys are centred")
    return (
        f"k biases of norm {format_number(round(norm))} in one head, scores of {format_number(round(score))} of biases "
        f"alone: in training, stock settings give {'; '.join(effects)}. What to do: {'; '.join(remedies)}"
    )
