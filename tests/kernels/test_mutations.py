"""The tests have teeth: each mistake below, made in the package at run time, fails the test that is named beside it.

A mutation replaces one function or constant of a module where the package looks it up; the named tests are called in
this process, and pass without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from qwen2tool.kernels.group import Adapter
from tests.kernels import test_head, test_lora, test_masked, test_nf4, test_rmsnorm, test_rope, test_swiglu
from tests.kernels.device import nearest_bf16  # noqa: F401  (a fixture)
from tests.kernels.poison import nan_memory  # noqa: F401  (a fixture)
from tests.kernels.test_masked import bf16_products  # noqa: F401  (a fixture)
from tests.routing import test_dropout, test_layer, test_sequences
from tests.routing.models import lora_model
from tests.routing.test_layer import wide_norms  # noqa: F401  (a fixture)
from tests.training import test_batches, test_forward

pytestmark = pytest.mark.usefixtures("nearest_bf16", "bf16_products", "wide_norms")
FP32 = torch.float32

CHECKS: dict[str, Callable[[], Any]] = {
    "layer": partial(test_layer.test_logits_and_every_gradient, "gqa", "input"),
    "layer, all kept": partial(test_layer.test_logits_and_every_gradient, "gqa", "all"),
    "layer, dropout": partial(test_dropout.test_logits_and_every_gradient, "mlp", True, None),
    "padding": partial(test_layer.test_padding_on_either_side, "left"),
    "packing": test_layer.test_packed_sequences_do_not_see_each_other,
    "packed rows": partial(test_sequences.test_packed_rows_are_found_as_transformers_finds_them, "packed"),
    "rope": partial(test_rope.test_kernel_forward_and_backward, 4, 2, 64, 1, FP32),
    "rope back": test_rope.test_backward_is_the_transpose,
    "swiglu": partial(test_swiglu.test_forward, (5, 63), FP32),
    "swiglu back": partial(test_swiglu.test_backward, (5, 63), FP32),
    "norm": partial(test_rmsnorm.test_forward, (5, 63), FP32),
    "norm back": partial(test_rmsnorm.test_backward, (5, 63), FP32),
    "lora": partial(test_lora.test_forward_and_every_gradient, "1 3 8", FP32, 0.0, "separate"),
    "lora dropout": partial(test_lora.test_forward_and_every_gradient, "1 3 8", FP32, test_lora.P, "separate"),
    "lora nf4": partial(test_lora.test_four_bit_weights, "nf4", FP32, 0.0, "extended"),
    "masks": partial(test_masked.test_the_right_mask_for_each_projection, "reference"),
    "nf4": partial(test_nf4.test_bits_are_those_of_bitsandbytes, (4, 128), "nf4", True),
    "head": partial(test_head.test_chunk_boundaries, 9, "reference"),
    "head kernel": partial(test_head.test_chunk_boundaries, 9, "triton"),
    "filling": lambda: test_batches.test_filled_up_is_the_same_loss_with_the_same_gradients(double_model()),
    "log-probs": partial(test_forward.test_as_transformers_of_each_sequence_alone, "frozen head"),
}


def double_model() -> Any:
    model = lora_model(dtype=torch.float64)
    test_batches.route(model)
    return model


class Mutation(NamedTuple):
    """`make` gets what is at `target` (module:name, below the package) and returns what stands there instead."""

    target: str
    make: Callable[[Any], Any]
    check: str


def without_bias(rope_forward):
    return lambda qk, bias, *rest, **options: rope_forward(qk, None, *rest, **options)


def half_centred(rope_forward):
    """The centre is taken from the later half of the tokens alone: a constant no more."""

    def mutated(qk, bias, cos, sin, centre, *, heads, **options):
        y = rope_forward(qk, bias, cos, sin, centre, heads=heads, **options)
        if centre is not None:
            keys = y[: len(y) // 2, y.shape[1] - len(centre) :]
            keys += centre
        return y

    return mutated


def one_head_uncentred(launch):
    def mutated(qk, bias, cos, sin, centre, out, **options):
        if centre is not None:
            centre = torch.cat([torch.zeros_like(centre[:64]), centre[64:]])
        return launch(qk, bias, cos, sin, centre, out, **options)

    return mutated


def unscaled_operands(fill_adapters):
    return lambda a, b, adapters: fill_adapters(a, b, [(x, y, 1.0, rows) for x, y, _, rows in adapters])


def one_mask(keep_bits):
    return lambda *args, **options: keep_bits(*args, **options)[:1].expand(args[5], -1, -1).contiguous()


def other_masks(masked_grad_a):
    return lambda dt, x, bits, *rest: masked_grad_a(dt, x, bits.roll(1, 0).contiguous(), *rest)


def lost_gradient(adapter_grads):
    """dA of the second adapter is zero."""

    def mutated(*args):
        grads = adapter_grads(*args)
        if len(grads) > 2:
            grads[2].zero_()
        return grads

    return mutated


def last_row_lost(write_logits):
    """Each chunk ends one row early: its last logits are those of the chunk before."""
    return lambda hidden, head, out: write_logits(hidden[:-1], head, out[:-1])


def first_row_twice(score_rows):
    """The targets of a chunk begin one row early."""
    return lambda logits, targets, *rest: score_rows(logits, torch.cat([targets[:1], targets[:-1]]), *rest)


def swapped_halves(swiglu):
    """gate and up of one tensor."""

    def mutated(gate_up, **options):
        return swiglu(gate_up.roll(gate_up.shape[1] // 2, 1), **options)

    return mutated


def swapped_nibbles(function):
    return lambda q, *rest: function(q._replace(packed=(q.packed >> 4) | (q.packed << 4)), *rest)


def swapped_nibbles_of_all(launch):
    def mutated(weights, out):
        launch([q._replace(packed=(q.packed >> 4) | (q.packed << 4)) for q in weights], out)

    return mutated


def swapped_sign(rope_backward):
    return lambda dqk, cos, sin, **options: rope_backward(dqk, cos, -sin, **options)


def without(option):
    """The function never sees this argument."""

    def make(function):
        def mutated(*args, **options):
            options.pop(option, None)
            return function(*args, **options)

        return mutated

    return make


def without_mask(flatten):
    return lambda rows, columns, device, mask=None, positions=None: flatten(rows, columns, device, None, positions)


def one_sequence(ragged):
    def mutated(starts, positions):
        return ragged(torch.arange(len(starts)) == 0, positions)

    return mutated


MUTATIONS = {
    "no bias of q and k": Mutation("routing.layer:rope_forward", without_bias, "layer"),
    "no bias of v": Mutation("kernels.lora:_bias", lambda old: lambda *args: None, "layer"),
    "no bias of any linear": Mutation("kernels.lora:_bias", lambda old: lambda *args: None, "lora"),
    "no scaling of LoRA": Mutation("routing.examine:Adapter", lambda old: lambda a, b, s: Adapter(a, b, 1.0), "layer"),
    "no scaling in the operands": Mutation("kernels.group:fill_adapters", unscaled_operands, "lora nf4"),
    "no scaling of B's gradient": Mutation("kernels.lora:product32", lambda old: lambda a, b, s=1.0: old(a, b), "lora"),
    "one mask for all": Mutation("kernels.lora:keep_bits", one_mask, "lora dropout"),
    "one mask for all of a layer's": Mutation("kernels.lora:keep_bits", one_mask, "layer, dropout"),
    "other masks in the backward": Mutation("kernels.lora:masked_grad_a", other_masks, "lora dropout"),
    "kept values not raised": Mutation(
        "kernels.masked:_kept", lambda kept: lambda x, bits, p: kept(x, bits, p) * (1 - p), "masks"
    ),
    "a chunk of the head ends early": Mutation("kernels.head:_write_logits", last_row_lost, "head"),
    "a chunk of the head ends early, kernel": Mutation("kernels.head:_write_logits", last_row_lost, "head kernel"),
    "a chunk's targets begin early": Mutation("kernels.head:score_rows", first_row_twice, "head"),
    "keys centred in part": Mutation("routing.layer:rope_forward", half_centred, "layer"),
    "one head not centred": Mutation("kernels.rope:_launch", one_head_uncentred, "rope"),
    "no dA of one adapter": Mutation("routing.operands:adapter_grads", lost_gradient, "layer"),
    "no dA of one adapter, in the group": Mutation("kernels.lora:adapter_grads", lost_gradient, "lora"),
    "the wrong sign in RoPE's backward": Mutation("routing.layer:rope_backward", swapped_sign, "layer"),
    "no inverse in RoPE's backward": Mutation(
        "kernels.rope:_launch",
        lambda old: lambda *args, inverse, **options: old(*args, inverse=False, **options),
        "rope back",
    ),
    "gate and up swapped": Mutation("routing.layer:swiglu_forward", swapped_halves, "layer"),
    "gate and up swapped in the kernel": Mutation(
        "kernels.swiglu:_launch_forward", lambda old: lambda gate, up, h: old(up, gate, h), "swiglu"
    ),
    "gate and up swapped in the backward": Mutation(
        "kernels.swiglu:_launch_backward",
        lambda old: lambda dh, gate, up, *rest: old(dh, up, gate, *rest),
        "swiglu back",
    ),
    "eps ignored": Mutation(
        "routing.layer:rms_norm_forward", lambda old: lambda x, w, eps, **options: old(x, w, 0.0, **options), "layer"
    ),
    "eps ignored in the kernel": Mutation(
        "kernels.rmsnorm:_launch_forward", lambda old: lambda x, w, eps, *rest: old(x, w, 0.0, *rest), "norm"
    ),
    "no gradient of the residual": Mutation("routing.layer:rms_norm_backward", without("residual_grad"), "layer"),
    "no residual": Mutation("routing.operands:group_forward", without("residual"), "layer"),
    "nibbles swapped": Mutation("kernels.nf4:_launch", swapped_nibbles_of_all, "nf4"),
    "nibbles swapped, in a group": Mutation("kernels.nf4:dequantise_reference", swapped_nibbles, "lora nf4"),
    "padding ignored": Mutation("routing.stack:flatten", without_mask, "padding"),
    "packed sequences together": Mutation("routing.sequences:_ragged", one_sequence, "packing"),
    "packed sequences together, as data": Mutation("routing.sequences:_ragged", one_sequence, "packed rows"),
    "filling that counts": Mutation("training.batches:IGNORED", lambda old: 5, "filling"),
    "norms' backward without weight": Mutation(
        "kernels.rmsnorm:_launch_backward",
        lambda old: lambda dy, x, weight, *rest: old(dy, x, torch.ones_like(weight), *rest),
        "norm back",
    ),
    "dA of kept rows lost": Mutation("routing.operands:adapter_grads", lost_gradient, "layer, all kept"),
    "predictions a row late": Mutation(
        "training.forward:token_log_probs",
        lambda old: lambda hidden, *rest, **options: old(hidden.roll(1, 0), *rest, **options),
        "log-probs",
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_passes_without_a_mutation(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", MUTATIONS)
def test_fails_under_it(name, monkeypatch):
    mutation = MUTATIONS[name]
    place, attribute = mutation.target.split(":")
    module = importlib.import_module(f"qwen2tool.{place}")
    monkeypatch.setattr(module, attribute, mutation.make(getattr(module, attribute)))
    with pytest.raises(AssertionError):
        CHECKS[mutation.check]()


def test_every_check_meets_a_mutation():
    assert {mutation.check for mutation in MUTATIONS.values()} == set(CHECKS)
