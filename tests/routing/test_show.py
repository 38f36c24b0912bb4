"""A folded plan says of every module what the plan says, in few lines."""

from __future__ import annotations

import pytest

from qwen2tool.console import PIPED_WIDTH, format_ranges
from qwen2tool.routing.plan import Route, RoutePlan, plan_routes
from qwen2tool.routing.show import fold, print_plan, summary
from tests.routing.models import lora_model
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 5, 6], "1,3,5-6"), (list(range(80)), "0-79")],
)
def test_spans(numbers, text):
    assert format_ranges(numbers, ",") == text


def test_a_plan_whose_layers_are_alike_is_eight_rows():
    model = lora_model(config={"num_hidden_layers": 9})
    rows = fold(plan_routes(model))
    assert [row.module for row in rows] == [
        "embed_tokens", "layers.0-8", "layers.0-8.self_attn.q_proj, k_proj", "layers.0-8.self_attn.v_proj",
        "layers.0-8.self_attn.o_proj", "layers.0-8.mlp.gate_proj, up_proj, down_proj", "norm", "lm_head",
    ]  # fmt: skip
    assert rows[2].reason == "float32 base, LoRA rank 4, bias in fp32 with RoPE"
    assert [row.module for row in fold(plan_routes(tiny_model().requires_grad_(False)))][1] == "layers.0-2"


def test_layers_that_differ_have_their_own_rows():
    model = lora_model(
        config={"num_hidden_layers": 6}, layers_to_transform=[0, 1, 4], target_modules=["up_proj"], bias="lora_only"
    )
    parts = [row.module for row in fold(plan_routes(model)) if row.module.startswith("layers")]
    assert parts == [
        "layers.0-1,4", "layers.0-1,4.self_attn.q_proj, k_proj", "layers.0-1,4.self_attn.v_proj",
        "layers.0-1,4.self_attn.o_proj", "layers.0-1,4.mlp.gate_proj", "layers.0-1,4.mlp.up_proj",
        "layers.0-1,4.mlp.down_proj", "layers.2-3,5", "layers.2-3,5.self_attn.q_proj, k_proj",
        "layers.2-3,5.self_attn.v_proj", "layers.2-3,5.self_attn.o_proj",
        "layers.2-3,5.mlp.gate_proj, up_proj, down_proj",
    ]  # fmt: skip


def test_a_reference_layer_is_one_row():
    rows = fold(plan_routes(lora_model(use_dora=True)))
    assert [row.module for row in rows] == ["embed_tokens", "layers.0-2", "norm", "lm_head"]
    assert rows[1].implementation == "reference" and "DoraLinearVariant" in rows[1].reason


def unfolded(rows):
    """(layer, linear or "", implementation, reason) of every row, ranges written out again."""
    found = set()
    for row in rows:
        if not row.module.startswith("layers."):
            continue
        _, numbers, *rest = row.module.split(".", 2)
        layers = [
            layer
            for part in numbers.split(",")
            for layer in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
        ]
        for layer in layers:
            for linear in (rest[0].rpartition(".")[2].split(", ")) if rest else [""]:
                found.add((layer, linear, row.implementation, row.reason))
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"use_dora": True}, {"layers_to_transform": [1], "target_modules": ["k_proj"]}]
)
def test_folding_loses_and_adds_nothing(changes):
    plan = plan_routes(lora_model(**changes))
    listed = set()
    for route in plan.routes:
        layer, _, linear = route.module.partition("layers.")[2].partition(".")
        if layer:
            listed.add((int(layer), linear.rpartition(".")[2], route.implementation, route.reason))
    folded = unfolded(fold(plan))
    assert folded <= listed
    silent = {entry for entry in listed - folded if (entry[0], "", *entry[2:]) not in folded}
    assert silent == set(), "only linears of which their layer's row says the same may be left out"
    wrong = RoutePlan((*plan.routes[:1], Route(plan.routes[1].module, "kernel", "other"), *plan.routes[2:]))
    assert not unfolded(fold(wrong)) <= listed


def test_it_is_printed_within_the_width_and_counted(capsys):
    plan = plan_routes(lora_model(dropout=0.05, layers_to_transform=[0, 2]))
    print_plan(plan)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= PIPED_WIDTH and len(lines) <= 24
    assert summary(plan) == "3 of 3 layers fused" and lines[-1].startswith("3 of 3 layers fused")
    assert summary(plan_routes(lora_model(use_dora=True))) == "0 of 3 layers fused"
