"""What the memory plan has to know of a model: shapes, bytes and operations, read off the model, loaded or on the meta
device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qwen2tool.kernels.group import padded

HEAD_BYTES_PER_LOGIT = 6
"""fp32 logits and their 16-bit gradient."""
BUS_SHARE = 0.8
"""Of the time that a forward takes at least; layers come in lumps. A 7B's step took the same at 0.8, 0.9 and 1.0 (549
to 557 ms, H200), and at 0.8 less waits on the host."""
PRODUCTS, COPIES = 650e12, 2.5e12
"""Operations a second of products, and bytes a second of device memory: a Hopper GPU's, rounded down."""
GROUPS = frozenset({"qkv", "o", "gate_up", "down"})
OPTIMIZER_BYTES = 12
"""Beside an fp32 parameter: its gradient and AdamW's two moments, fp32 each."""


@dataclass(frozen=True)
class Sizes:
    """What the plan needs to know of a model under training; bytes and counts.

    Attributes:
        tokens, length: of a pass, and of its longest sequence.
        static: weights, adapters, their gradients and AdamW's two moments.
        embedding: the embedding table where it could wait on the host (untied, frozen), else 0.
        bus: bytes a second from device to host; PCIe 5 reaches 47e9.
        embedding_on_host: the table is there already (and not in `static`).
        stream_itemsize: bytes of a number between layers, 0: `itemsize`.
        packed: the frozen linears are in 4 bits.
        layer_packed: bytes of one layer's 4-bit weights where they could wait on the host, else 0.
        masked: the adapters have dropout.
        repeated_kv: attention keeps k and v once a query head besides (`kernels.attention.repeats_kv`).
        adapted: which groups of a layer's linears have adapters.
    """

    tokens: int
    length: int
    layers: int
    hidden: int
    intermediate: int
    query_columns: int
    kv_columns: int
    heads: int
    vocabulary: int
    rank_columns: int
    itemsize: int
    static: int
    embedding: int
    bus: float = 40e9
    embedding_on_host: bool = False
    stream_itemsize: int = 0
    packed: bool = False
    layer_packed: int = 0
    masked: bool = False
    repeated_kv: bool = False
    adapted: frozenset[str] = GROUPS

    @cached_property
    def input(self) -> int:
        """Bytes of one layer's input."""
        return self.tokens * self.hidden * (self.stream_itemsize or self.itemsize)

    @cached_property
    def tails(self) -> int:
        """Bytes of drop(x) A^T of one layer's seven linears, kept on the device."""
        return self.tokens * 7 * self.rank_columns * self.itemsize

    @property
    def tails_again(self) -> float:
        """What making them again costs one layer, in products' operations of that time: inputs are read once more, and
        once for masks, by four launches of 5 us."""
        inputs = (2 * self.hidden + self.query_columns + self.intermediate) * self.itemsize
        return (self.tokens * inputs * (1 + self.masked) / COPIES + 4 * 5e-6) * PRODUCTS

    @cached_property
    def attention(self) -> int:
        """Bytes that the level "attention" adds to one layer."""
        columns = 2 * self.query_columns + 2 * self.kv_columns + self._repeated
        return self.tokens * (columns * self.itemsize + 4 * self.heads) + self.input

    @property
    def _repeated(self) -> int:
        return 2 * self.query_columns if self.repeated_kv else 0

    @cached_property
    def mlp(self) -> int:
        """Bytes that the level "all" adds to "attention"."""
        return self.tokens * (2 * self.intermediate + 2 * self.rank_columns) * self.itemsize

    @property
    def attention_products(self) -> float:
        """Operations that the level "attention" saves one layer: q, k, v, o and attention itself."""
        linear = 2 * self.hidden * (2 * self.query_columns + 2 * self.kv_columns)
        return float(self.tokens * (linear + 2 * self.length * self.query_columns))

    @property
    def mlp_products(self) -> float:
        """Operations that keeping gate and up saves one layer."""
        return float(self.tokens * 4 * self.hidden * self.intermediate)

    @property
    def gate_up_share(self) -> float:
        """The share of layers whose gate and up get over the bus, after the inputs, while the forward computes."""
        return min(max((BUS_SHARE * self.bus * self.forward_seconds - self.input) / self.mlp, 0.0), 1.0)

    @property
    def forward_seconds(self) -> float:
        """Of one layer's products."""
        return (self.attention_products + 1.5 * self.mlp_products) / PRODUCTS

    def gone(self, weights: int) -> int:
        """Bytes that are not on the device where so many layers' 4-bit weights wait on the host: it keeps places for
        those of the layer at work and those of the next."""
        return max(weights - 2, 0) * self.layer_packed

    def waiting(self, weights: int, inputs: int, gate_up: int) -> float:
        """Seconds that a pass waits for 4-bit weights of so many layers, which come in the forward and again in the
        backward, there beside so many inputs and gates and ups. A backward takes 1.8 times as long as the forward (7B,
        H200, a fifth of the products computed again)."""
        forward = BUS_SHARE * self.layers * self.forward_seconds
        packed = weights * self.layer_packed
        back = packed + inputs * self.input + gate_up * self.mlp
        if not packed:
            return 0.0
        return max(packed / self.bus - forward, 0.0) + max(back / self.bus - 1.8 * forward, 0.0)

    @cached_property
    def mlp_backward(self) -> int:
        """Of one layer: the gradient of its output, in which that of h will stand; silu(gate) up or its gradient; two
        rows of H."""
        rows = self.intermediate + 2 * self.hidden
        return self.tokens * rows * self.itemsize + self.input + self._masks(5 * self.hidden + self.intermediate)

    @cached_property
    def attention_backward(self) -> int:
        """Of one layer: that gradient, a row of H, the gradient of attention's output, those of q, k and v as attention
        gives them and as the product takes them, dQ's fp32 sums; q, k, v and o unpacked."""
        qkv, row = self.query_columns + 2 * self.kv_columns, self.hidden + self.query_columns
        weights = self._weights["qkv"] + self._weights["o"]
        columns = 2 * qkv + row + self._repeated
        activations = self.tokens * (columns * self.itemsize + 4 * self.query_columns)
        masks = self._masks(3 * self.hidden + self.query_columns)
        return weights * self.itemsize + activations + self.input + masks

    def _masks(self, columns: int) -> int:
        """Bytes of dropout's bits for inputs of so many columns, one each adapter."""
        return self.tokens * columns // 8 if self.masked else 0

    def mlp_backward_weights(self, frugal: bool) -> int:
        """Unpacked at once in the backward of one layer's MLP, adapters among them."""
        held = [self._weights[name] for name in ("qkv", "gate_up", "down")]
        return (max(held[:2]) if frugal else sum(held)) * self.itemsize

    @cached_property
    def _weights(self) -> dict[str, int]:
        """Numbers of M, [W | s B; A], of each group (`kernels.group`)."""
        h, i, q = self.hidden, self.intermediate, self.query_columns

        def numbers(rows: int, columns: int, adapters: int) -> int:
            width = padded(adapters * self.rank_columns)
            return (rows + width) * (columns + width)

        return {
            "qkv": numbers(q + 2 * self.kv_columns, h, 3),
            "o": numbers(h, q, 1),
            "gate_up": numbers(2 * i, h, 2),
            "down": numbers(h, i, 1),
        }

    @cached_property
    def forward(self) -> int:
        """Peak of one layer's forward above what layers keep, beside its input: at down_proj, where all lives on."""
        inner = self.tokens * (self.intermediate + self.rank_columns)
        kept = self.attention + self.mlp + self.input
        return (self._weights["down"] + inner) * self.itemsize + kept + self._masks(self.intermediate)

    @property
    def unpacking(self) -> float:
        """What unpacking q, k, v, gate and up of one layer once more costs, in products' operations of that time."""
        weights = self.hidden * (self.query_columns + 2 * self.kv_columns + 2 * self.intermediate)
        return weights * 2.5 / COPIES * PRODUCTS

    @property
    def unpacking_always(self) -> float:
        """What forward and backward of one layer spend on unpacking what has adapters, counted likewise."""
        return 2 * sum(self._weights[name] for name in self.adapted) * 2.5 / COPIES * PRODUCTS

    @cached_property
    def unpacked(self) -> int:
        """Bytes of one layer's linears unpacked that have adapters, with these behind them."""
        return sum(self._weights[name] for name in self.adapted) * self.itemsize

    def chunking(self, rows: int) -> float:
        """What `rows` logits at a time cost beside 1024, counted likewise: the head is read twice a chunk, which takes
        longer than the products of fewer than 260 rows, and a chunk's launches take 30 us."""
        head = self.vocabulary * self.hidden
        waiting = max(head * self.itemsize / COPIES * PRODUCTS - 2.0 * rows * head, 0.0)
        launches = 30e-6 * PRODUCTS
        return self.tokens * ((2 * waiting + launches) / rows - launches / 1024)

    def head(self, rows: int) -> int:
        """Bytes of the head's scratch for `rows` logits at a time, beside its input, normed, and its gradient."""
        return rows * self.vocabulary * HEAD_BYTES_PER_LOGIT + 3 * self.input


def measure(model: Any, tokens: int, length: int, dtype: torch.dtype, *, all_fused: bool = True) -> Sizes:
    """`model`, in training, for passes of `tokens` tokens, `length` the longest sequence.

    Weights may wait on the host where all layers are fused: others take theirs from where they are.
    A meta model counts as one on a GPU: its plan is that of the model once it is loaded there.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    named = list(model.named_parameters())
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    on_device = head.is_cuda or head.is_meta
    movable = table.device == head.device and on_device and may_wait_on_host(model)
    return Sizes(
        tokens=tokens,
        length=length,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_columns=config.num_attention_heads * head_dim,
        kv_columns=config.num_key_value_heads * head_dim,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        rank_columns=max((p.shape[0] for name, p in named if ".lora_A." in name), default=0),
        itemsize=dtype.itemsize,
        stream_itemsize=(stream_dtype(dtype) or dtype).itemsize,
        static=sum(_bytes(p) for _, p in named if p.device == head.device) + trainable * OPTIMIZER_BYTES,
        embedding=table.numel() * table.element_size() if movable else 0,
        embedding_on_host=on_device and table.device != head.device,
        bus=_bus_rate(head.device) if head.is_cuda else Sizes.bus,
        packed=any(getattr(p, "quant_type", None) for p in model.parameters()),
        layer_packed=_packed_bytes(named, head.device) // config.num_hidden_layers if on_device and all_fused else 0,
        adapted=frozenset(_group(name) for name, _ in named if ".lora_A." in name) & GROUPS,
        masked=any(isinstance(m, nn.Dropout) and m.p > 0 for n, m in model.named_modules() if "lora_dropout" in n),
    )


def _group(name: str) -> str:
    """The group of linears that a parameter of an adapter belongs to."""
    linear = name.split(".lora_")[0].rsplit(".", 1)[-1].removesuffix("_proj")
    return {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(linear, linear)


def stream_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype between layers where it is not that of products: fp32 for float16, past whose range Qwen2's goes."""
    return torch.float32 if dtype == torch.float16 else None


def may_wait_on_host(model: Any) -> bool:
    """Whether the embedding table is frozen and no head hangs on it."""
    return not model.config.tie_word_embeddings and not model.get_input_embeddings().weight.requires_grad


def _packed_bytes(named: list[tuple[str, Any]], device: torch.device) -> int:
    """Of all 4-bit weights on `device`, without their scales."""
    weights = [p for _, p in named if getattr(p, "quant_type", None) and p.device == device]
    return sum(p.numel() // 2 if p.is_meta else p.numel() * p.element_size() for p in weights)


def _bytes(parameter: torch.Tensor) -> int:
    """With the scales of a 4-bit weight, which are no parameters of their own; adapters count as fp32."""
    state = getattr(parameter, "quant_state", None)
    if parameter.is_meta and getattr(parameter, "quant_type", None):
        blocks = parameter.numel() // 64
        return parameter.numel() // 2 + blocks + blocks // 256 * 4
    size = parameter.numel() * (4 if parameter.requires_grad else parameter.element_size())
    if state is None:
        return size
    nested = state.state2.absmax.numel() * 4 if state.nested else 0
    return size + int(state.absmax.numel() * state.absmax.element_size() + nested)


def _bus_rate(device: torch.device) -> float:
    """Bytes a second from the device to pinned memory, of 64 MB; 3 ms."""
    source = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    target.copy_(source, non_blocking=True)
    begin.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return float(source.numel() / (begin.elapsed_time(end) / 1e3))
