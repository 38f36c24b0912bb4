"""The figures against arithmetic by hand and torch's own kl_div in float64."""

from __future__ import annotations

import json
from math import exp, log, sqrt

import pytest
import torch

from qwen2tool.verify.statistics import Divergence, TokenFigures, concatenate, summarise


def random_logits(seed: int, rows: int = 40, columns: int = 97) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def token_figures(p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor, columns: int = 10) -> TokenFigures:
    """The vocabulary in blocks of so many columns."""
    found = Divergence(targets, 1)
    for first in range(0, p.shape[1], columns):
        block = slice(first, first + columns)
        found.add(first, p[:, block], [q[:, block]])
    return found.finish()[0]


def test_two_words_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KLD = 3/4 ln 3/2 + 1/4 ln 1/2."""
    found = token_figures(torch.tensor([[log(3), 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    assert found.kld.item() == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5), rel=1e-6)
    assert found.nll_reference.item() == pytest.approx(log(4), rel=1e-6)
    assert found.nll_candidate.item() == pytest.approx(log(2), rel=1e-12)
    assert found.max_abs.item() == pytest.approx(log(3), rel=1e-6)


@pytest.mark.parametrize("columns", [1, 10, 97])
def test_kld_is_torchs_and_not_its_reverse(columns: int) -> None:
    p, q = random_logits(0), random_logits(1)
    found = token_figures(p, q, torch.zeros(40, dtype=torch.long), columns).kld
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    reverse = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert (found - reverse).abs().max() > 0.1


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    p = random_logits(0)
    found = token_figures(p, p.double() + 7, torch.zeros(40, dtype=torch.long))
    assert found.kld.abs().max() < 1e-14
    assert found.max_abs.max().item() == pytest.approx(7)


@pytest.mark.parametrize("columns", [1, 10, 97])
def test_nll_is_cross_entropy_and_top_is_argmax(columns: int) -> None:
    p, q, targets = random_logits(0), random_logits(1), torch.arange(40)
    q[:10] = p[:10] * 2
    found = token_figures(p, q, targets, columns)
    wanted = torch.nn.functional.cross_entropy(q.double(), targets, reduction="none")
    torch.testing.assert_close(found.nll_candidate, wanted, rtol=1e-12, atol=0)
    assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.same_top[:10].all() and not found.same_top.all()
    fives = [len({*a.topk(5)[1].tolist()} & {*b.topk(5)[1].tolist()}) / 5 for a, b in zip(p, q, strict=True)]
    assert found.same_top5.tolist() == pytest.approx(fives) and 0 < sum(fives) < 40


def test_of_equal_logits_the_first_is_the_top_as_with_argmax() -> None:
    """16-bit logits tie often; a tie must not look like a disagreement."""
    tied = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 0.0]])
    lone = torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    late = torch.tensor([[0.0, 1.0, 1.0, 2.0, 0.0, 0.0]])
    for columns in (1, 2, 6):
        assert token_figures(tied, lone, torch.tensor([0]), columns).same_top.all()
        assert not token_figures(tied, late, torch.tensor([0]), columns).same_top.any()


def given(kld: list[float], reference: list[float], candidate: list[float]) -> TokenFigures:
    one = torch.ones(len(kld), dtype=torch.float64)
    values = [torch.tensor(row, dtype=torch.float64) for row in (kld, reference, candidate)]
    top = torch.arange(len(kld)) % 2 == 0
    return TokenFigures(
        kld=values[0], max_abs=one, same_top=top, same_top5=one, nll_reference=values[1], nll_candidate=values[2]
    )


def test_summary_by_hand() -> None:
    """Differences of NLL 0.1 and 0.3: ratio exp(0.2), standard error exp(0.2) x sqrt(0.02) / sqrt(2)."""
    found = summarise(given([1.0, 3.0], [1.0, 2.0], [1.1, 2.3]))
    assert (found.tokens, found.kld_mean, found.kld_median, found.kld_max) == (2, 2.0, 2.0, 3.0)
    assert found.kld_99 == pytest.approx(1 + 0.99 * 2)
    assert found.kld_mean_se == pytest.approx(sqrt(2) / sqrt(2))
    assert found.same_top == 0.5
    assert found.ppl_reference == pytest.approx(exp(1.5))
    assert found.ppl_candidate == pytest.approx(exp(1.7))
    assert found.ppl_ratio == pytest.approx(exp(0.2))
    assert found.ppl_ratio_se == pytest.approx(exp(0.2) * 0.1)
    assert (found.nll_difference, found.nll_difference_se) == pytest.approx((0.2, 0.1))


def test_chunks_are_one_text() -> None:
    p, q, targets = random_logits(0), random_logits(1), torch.arange(40)
    whole = summarise(token_figures(p, q, targets))
    parts = [token_figures(p[s], q[s], targets[s]) for s in (slice(0, 7), slice(7, 40))]
    joined = summarise(concatenate(parts))
    assert joined.to_json() == pytest.approx(whole.to_json(), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [3, 96])
@pytest.mark.parametrize("side", [0, 1])
def test_one_bad_logit_is_seen_and_json_stays_valid(bad: float, column: int, side: int) -> None:
    p, q = random_logits(0), random_logits(1)
    assert summarise(token_figures(p, q, torch.arange(40))).finite
    (p, q)[side][5, column] = bad
    found = summarise(token_figures(p, q, torch.arange(40)))
    assert not found.finite
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["kld_mean"] is None


def test_one_token_has_no_standard_error() -> None:
    found = summarise(given([1.0], [1.0], [1.0]))
    assert found.to_json()["kld_mean_se"] is None
    assert found.finite
