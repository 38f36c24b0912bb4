"""The rule, on figures made up for it: one word for each side of each bar."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen2tool.verify.inventory import InventoryComparison
from qwen2tool.verify.layer_figures import LayerFigures, first_beyond, worst_beyond
from qwen2tool.verify.limits import FEWEST_TOKENS
from qwen2tool.verify.report import largest
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison
from qwen2tool.verify.verdict import decide

NAN = float("nan")
AGREES = InventoryComparison(
    missing=(), extra=(), misshapen=(), config={}, reference_biases=9, candidate_biases=9
)  # fmt: skip
IDENTICAL = TensorComparison(name="a.weight", kind="identical")
ROUNDED = TensorComparison(name="b.weight", kind="one rounding")
MATRIX = TensorComparison(name="model.layers.0.mlp.up_proj.weight", kind="different")


def figures(mean: float, tail: float | None = None, error: float = 0.0, tokens: int = 200) -> LogitFigures:
    """A mean KLD, and ten times that at 99 % unless told."""
    return LogitFigures(
        tokens=tokens, kld_mean=mean, kld_mean_se=error, kld_median=mean, kld_99=10 * mean if tail is None else tail,
        kld_max=mean, max_abs=1.0, same_top=1.0, same_top5=1.0, nll_reference=2.0, nll_candidate=2.0, ppl_ratio=1.0,
        ppl_ratio_se=0.0,
    )  # fmt: skip


FLOOR = figures(1e-4)


def verdict(tensors: list[TensorComparison], measured: LogitFigures | None, floor: LogitFigures | None = FLOOR) -> str:
    return decide(AGREES, tensors, [], measured, floor, "why")[0]


def test_the_bar_stands_at_one_and_a_half_floors() -> None:
    assert verdict([ROUNDED], figures(1.49e-4)) == "equivalent"
    assert verdict([ROUNDED], figures(1.51e-4)) == "different"
    assert verdict([ROUNDED], figures(1.6e-4, error=1e-5)) == "undecided"
    assert verdict([ROUNDED], figures(1e-5, tail=1.6e-3)) == "undecided"


def test_a_rounding_that_eats_the_update_is_named_as_the_cause() -> None:
    word, reason = decide(AGREES, [ROUNDED], [], figures(1e-3), FLOOR)
    assert word == "different"
    assert "one rounding" in reason and "merge --dtype float32" in reason
    assert "merge --dtype float32" not in decide(AGREES, [MATRIX], [], figures(1e-3), FLOOR)[1]


def test_a_matrix_that_differs_gets_no_benefit_of_the_doubt() -> None:
    assert verdict([MATRIX], figures(0.99e-4)) == "equivalent"
    assert verdict([MATRIX], figures(1.01e-4)) == "undecided"
    assert verdict([MATRIX], figures(1.6e-4)) == "different"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_table_that_differs_is_never_cleared_by_logits(name: str) -> None:
    assert verdict([replace(MATRIX, name=name)], figures(1e-6)) == "undecided"
    assert verdict([replace(MATRIX, name=name)], figures(1e-2)) == "different"


def test_a_floor_of_nothing_is_no_bar() -> None:
    assert verdict([ROUNDED], figures(1e-8, tail=1e-7), figures(0.0)) == "equivalent"
    assert verdict([ROUNDED], figures(1e-6, tail=1e-5), figures(0.0)) == "different"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.norm.weight"])
def test_a_vector_outranks_logits(name: str) -> None:
    word, reason = decide(AGREES, [replace(MATRIX, name=name)], [], figures(0.0), FLOOR)
    assert (word, reason) == ("different", f"{name} is different beyond rounding")
    assert verdict([replace(ROUNDED, name=name)], figures(0.0)) == "equivalent"


def test_inventory_outranks_logits_and_every_finding_is_said() -> None:
    found = replace(AGREES, config={"rope_theta": (1e6, 1e4)}, missing=("x.bias", "y.weight"))
    word, reason = decide(found, [IDENTICAL], ["the q bias of layer 0 is missing"], figures(0.0), FLOOR)
    assert word == "different"
    assert reason.split("; ") == [
        "the q bias of layer 0 is missing",
        "config.json has rope_theta 10000, the reference 1000000",
        "y.weight is missing",
    ]


def test_too_little_text_decides_nothing_that_the_files_do_not() -> None:
    assert verdict([ROUNDED], figures(0.0, tokens=FEWEST_TOKENS)) == "equivalent"
    assert verdict([ROUNDED], figures(0.0, tokens=FEWEST_TOKENS - 1)) == "undecided"
    assert verdict([IDENTICAL], figures(0.0, tokens=1)) == "equivalent"
    assert verdict([IDENTICAL], None, None) == "equivalent"
    assert verdict([ROUNDED], None, None) == "undecided"


def test_what_is_not_finite() -> None:
    """KLD is NaN wherever one side is; whose fault it is decides."""
    broken = replace(figures(NAN), nll_candidate=NAN)
    assert verdict([ROUNDED], broken) == "different"
    assert verdict([ROUNDED], figures(1e-5), broken) == "undecided"
    assert verdict([IDENTICAL], replace(broken, nll_reference=NAN), replace(broken, nll_reference=NAN)) == "undecided"


def test_identical_files_that_do_not_compute_the_same() -> None:
    assert verdict([IDENTICAL], figures(1e-9)) == "equivalent"
    assert verdict([IDENTICAL], figures(5e-8)) == "undecided"


def layer(index: int, error: float, part: str = "mlp", noise: float = 1e-3) -> LayerFigures:
    return LayerFigures(
        index=index, own={"q": 0.0, part: error}, accumulated={}, own_noise={"q": noise, part: noise}, noise={}
    )


def test_a_layer_takes_back_an_equivalent() -> None:
    """Bar: 1.5 x 1e-3 + 8e-4 = 2.3e-3; beyond twice that it is no luck."""

    def judged(layers: list[LayerFigures], tensors: list[TensorComparison]) -> tuple[str, str]:
        return decide(AGREES, tensors, [], figures(1e-5), FLOOR, layers=layers, dtype="bfloat16")

    assert judged([layer(0, 2.2e-3)], [MATRIX])[0] == "equivalent"
    assert judged([layer(0, 2.4e-3)], [MATRIX])[0] == "undecided"
    word, reason = judged([layer(0, 1e-3), layer(1, 2.4e-3), layer(2, 5e-3)], [MATRIX])
    assert word == "different"
    assert "on the same input the mlp of layer 1 is off by 0.0024" in reason
    assert judged([layer(1, 5e-3)], [ROUNDED])[0] == "equivalent"
    assert judged([layer(1, float("inf"))], [MATRIX])[0] == "different"
    assert judged([layer(1, 5e-3, noise=float("inf"))], [MATRIX])[0] == "equivalent"


def test_gradients_are_held_to_their_noise_too() -> None:
    fine = layer(0, 1e-3)
    hurt = replace(fine, gradients={"input": 1e-2}, gradient_noise={"input": 1e-3})
    assert fine.beyond("bfloat16") == []
    (found,) = hurt.beyond("bfloat16")
    assert (found.part, found.error, found.noise) == ("gradient of input", 1e-2, 1e-3)
    assert hurt.beyond("float32")[0].ratio > found.ratio
    assert worst_beyond([fine, hurt], "bfloat16") == first_beyond([fine, hurt], "bfloat16") == found


def test_a_tolerance_replaces_the_noise_and_not_what_the_files_show() -> None:
    def judged(measured: LogitFigures, tensors: list[TensorComparison], tolerance: float) -> str:
        return decide(AGREES, tensors, [], measured, FLOOR, tolerance=tolerance, layers=[layer(0, 1.0)])[0]

    assert judged(figures(0.05), [MATRIX], 0.06) == "equivalent"
    assert judged(figures(0.05), [MATRIX], 0.04) == "different"
    assert judged(figures(0.05, error=0.01), [MATRIX], 0.04) == "undecided"
    assert judged(figures(5e-5), [ROUNDED], 1e-5) == "different"
    assert judged(figures(0.0), [replace(MATRIX, name="model.norm.weight")], 1.0) == "different"
    assert judged(figures(0.0, tokens=FEWEST_TOKENS - 1), [MATRIX], 1.0) == "undecided"


def test_the_floor_is_the_largest_of_the_noise_runs() -> None:
    runs = {"a": figures(1e-4), "b": figures(3e-4), "c": figures(2e-4)}
    assert largest(runs) == runs["b"]
    assert largest(runs | {"d": figures(NAN)}) is not None and not largest(runs | {"d": figures(NAN)}).finite
    assert largest({}) is None
