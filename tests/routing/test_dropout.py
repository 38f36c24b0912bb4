"""A routed model under LoRA dropout is PEFT's under the very same masks: replayed, projection by projection."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen2tool.kernels.dropout import keep_bits, unpack_bits
from qwen2tool.routing.examine import MASKS_PER_LAYER
from qwen2tool.routing.memory import MemoryPlan
from qwen2tool.routing.plan import find_stack
from qwen2tool.routing.swap import route
from tests.kernels.test_lora import Masked
from tests.routing.models import batch, logits_and_gradients, lora_model
from tests.routing.test_layer import EXACT, wide_norms, worst  # noqa: F401  (the first is a fixture)
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("wide_norms")
P, SEED = 0.2, 17
# Projections in the order of their masks; groups of one input share a stream.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def with_masks(model, ids, *, shared=False):
    """A copy of `model` whose dropouts multiply by the masks that a routed pass draws after `manual_seed(SEED)`."""
    model = copy.deepcopy(model)
    torch.manual_seed(SEED)
    seed = torch.randint(2**62, ())
    for index, layer in enumerate(find_stack(model)[0].layers):
        for group, names in enumerate(GROUPS):
            adapted = [layer.get_submodule(n) for n in names if hasattr(layer.get_submodule(n), "lora_A")]
            if not adapted:
                continue
            columns, stream = adapted[0].in_features, index * MASKS_PER_LAYER + group
            bits = keep_bits(seed, stream, P, ids.numel(), columns, len(adapted), device="cpu")
            masks = unpack_bits(bits, columns).double().view(-1, *ids.shape, columns) / (1 - P)
            for place, linear in enumerate(adapted):
                linear.lora_dropout["default"] = Masked(masks[0 if shared else place])
    return model


def compare(model, keep, *, seed=SEED, tails=True, **options):
    ids = batch()
    theirs = logits_and_gradients(with_masks(model, ids, **options), input_ids=ids)
    routed = copy.deepcopy(model)
    route(routed, memory=MemoryPlan((keep,) * 3, tails=tails))
    torch.manual_seed(seed)
    ours = logits_and_gradients(routed, input_ids=ids)
    assert ours.keys() == theirs.keys()
    return {name: relative_error(ours[name], theirs[name]) for name in theirs}


@pytest.mark.parametrize("targets", [None, ["k_proj", "v_proj", "up_proj", "down_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("tails", [True, False], ids=["tails kept", "tails made again"])
@pytest.mark.parametrize("keep", ["input", "mlp", "attention", "all"])
def test_logits_and_every_gradient(keep, tails, targets):
    """Masks drawn in the forward are drawn again in the backward, whatever is recomputed."""
    model = lora_model(dropout=P, dtype=torch.float64, **({"target_modules": targets} if targets else {}))
    errors = compare(model, keep, tails=tails)
    assert len(errors) == 1 + 3 * 2 * (len(targets) if targets else 7)
    assert worst(errors)[1] < EXACT, worst(errors)


@pytest.mark.parametrize("changes", [{"shared": True}, {"seed": SEED + 1}], ids=["one mask a group", "another seed"])
def test_other_masks_would_show(changes):
    errors = compare(lora_model(dropout=P, dtype=torch.float64), "input", **changes)
    assert errors["logits"] > 1e-2 and min(errors.values()) > 1e-3


def test_no_masks_in_evaluation():
    model = lora_model(dropout=P, dtype=torch.float64).eval()
    routed = copy.deepcopy(model)
    route(routed)
    ours, theirs = (m(input_ids=batch(), use_cache=False).logits for m in (routed, model))
    assert relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("routed", [False, True])
def test_dropout_left_on_in_an_eval_model_is_drawn(routed):
    """As for estimates of uncertainty: the dropouts' own switch counts, not the model's."""
    model = lora_model(dropout=P)
    if routed:
        route(model)
    model.eval()
    plain = model(input_ids=batch(), use_cache=False).logits
    assert torch.equal(model(input_ids=batch(), use_cache=False).logits, plain)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    dropped = model(input_ids=batch(), use_cache=False).logits
    assert relative_error(dropped, plain) > 0.01
