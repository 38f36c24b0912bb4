"""Pairs of anything: Llama's layout, NF4, GGUF, adapters by themselves and several of them, on either side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2tool.assets import TINY_QWEN2
from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError
from qwen2tool.verify.report import Report
from qwen2tool.verify.run import verify
from qwen2tool.verify.sides import tokenizer_folder
from tests.cli_runner import run as command
from tests.tiny import write_adapter
from tests.verify.common import State, random_samples, read_state, variant

SAMPLES = random_samples()
BIAS = "model.layers.1.self_attn.v_proj.bias"


def run(reference: Path, candidate: Path, **options: Any) -> Report:
    return verify(reference, candidate, SAMPLES, **options)


def converted(source: Path, target: Path, **options: Any) -> Path:
    convert(source, target, Options(**options))
    return target


def zero_one(state: State) -> None:
    state[BIAS].zero_()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """The control beside every format: v of layer 1 is zero."""
    return variant(base_folder, tmp_path_factory.mktemp("damaged") / "damaged", zero_one)


def test_llamas_layout_is_the_same_function_either_way(tmp_path: Path, base_folder: Path, damaged: Path) -> None:
    llama = converted(base_folder, tmp_path / "llama", to="llama")
    for pair in ((base_folder, llama), (llama, base_folder)):
        report = run(*pair)
        assert (report.verdict, {t.kind for t in report.tensors}) == ("equivalent", {"identical"})
    assert report.kinds == ("Llama layout", "qwen2")
    bad = run(base_folder, converted(damaged, tmp_path / "bad", to="llama"))
    assert (bad.verdict, bad.reason) == ("different", "the v bias of layer 1 is zero")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_gguf_without_rounding(tmp_path: Path, base_folder: Path, damaged: Path, kind: str) -> None:
    report = run(base_folder, converted(base_folder, tmp_path / "whole.gguf", to="gguf", gguf_type=kind))
    assert report.verdict == "equivalent" and report.kinds[1].startswith("GGUF")
    bad = run(base_folder, converted(damaged, tmp_path / "bad.gguf", to="gguf", gguf_type=kind))
    assert (bad.verdict, bad.reason) == ("different", "the v bias of layer 1 is zero")


def test_a_quantised_copy_is_judged_by_what_it_computes(tmp_path: Path, base_folder: Path, damaged: Path) -> None:
    """Its biases are exact and its matrices are not: KLD says by how much, and a tolerance lets it pass."""
    for name, options in (("q8.gguf", {"to": "gguf", "gguf_type": "q8_0"}), ("nf4", {"to": "nf4"})):
        quantised = converted(base_folder, tmp_path / name, **options, allow_lossy=True)
        report = run(base_folder, quantised)
        assert report.verdict in ("different", "undecided")
        assert {t.kind for t in report.tensors if t.is_vector} <= {"identical", "one rounding"}
        assert report.figures is not None and report.figures.kld_mean > 0
        allowed = 2 * report.figures.kld_mean
        assert run(base_folder, quantised, tolerance=allowed).verdict == "equivalent"
        assert run(base_folder, quantised, tolerance=allowed / 100).verdict == "different"
        bad = converted(damaged, tmp_path / f"bad-{name}", **options, allow_lossy=True)
        assert run(base_folder, bad, tolerance=1.0).reason == "the v bias of layer 1 is zero"


def test_an_nf4_copy_against_what_it_dequantises_to(tmp_path: Path, base_folder: Path) -> None:
    nf4 = converted(base_folder, tmp_path / "nf4", to="nf4", allow_lossy=True)
    back = converted(nf4, tmp_path / "back", to="qwen2")
    assert run(nf4, back).verdict == run(back, nf4).verdict == "equivalent"
    assert run(nf4, base_folder).verdict == "different"


def point_to(base: Path | None, adapter: Path, target: Path) -> Path:
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base and str(base)}))
    return target


def test_an_adapters_folder_is_its_base_with_the_adapter(
    tmp_path: Path, base_folder: Path, adapter_folder: Path, merged_folder: Path
) -> None:
    adapter = point_to(base_folder, adapter_folder, tmp_path / "adapter")
    assert run(adapter, merged_folder).verdict == run(merged_folder, adapter).verdict == "equivalent"
    assert run(adapter, base_folder).verdict == run(base_folder, adapter).verdict == "different"
    assert run(base_folder, base_folder, adapter=adapter, candidate_adapter=adapter).verdict == "equivalent"
    with pytest.raises(UserError, match="names no base"):
        run(point_to(None, adapter_folder, tmp_path / "lost"), base_folder)


def test_several_adapters_in_order(tmp_path: Path, base_folder: Path, adapter_folder: Path) -> None:
    second = write_adapter(tmp_path / "second", base_folder, seed=9, rank=2, alpha=7, target_modules=["q_proj"])
    both = [adapter_folder, second]

    def merge(adapters: list[Path], name: str) -> Path:
        state = read_state(base_folder)
        for module in {m for path in adapters for m in open_adapter(path).pairs}:
            updates = [delta(p) for path in adapters if (p := open_adapter(path).pairs.get(module)) is not None]
            state[f"{module}.weight"] = (state[f"{module}.weight"].float() + sum(updates)).bfloat16()
        return variant(base_folder, tmp_path / name, lambda _: state)

    merged = merge(both, "merged")
    report = run(base_folder, merged, adapter=both)
    assert report.verdict == "equivalent" and report.adapters == tuple(map(str, both))
    assert run(base_folder, merge(both[:1], "first"), adapter=both).verdict == "different"
    assert run(merged, base_folder, candidate_adapter=both).verdict == "equivalent"
    assert run(merged, base_folder, candidate_adapter=both[1:]).verdict == "different"


def test_the_tokenizer_comes_from_the_first_that_has_one(tmp_path: Path, adapter_folder: Path) -> None:
    gguf = converted(TINY_QWEN2, tmp_path / "tiny.gguf", to="gguf", gguf_type="bf16")
    adapter = point_to(TINY_QWEN2, adapter_folder, tmp_path / "adapter")
    bare = tmp_path / "bare"
    shutil.copytree(TINY_QWEN2, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    wanted = load_tokenizer(TINY_QWEN2)("Was ist ein Bias?").input_ids
    for names in ((gguf,), (adapter,), (bare, gguf)):
        with tokenizer_folder(*names) as folder:
            assert load_tokenizer(folder)("Was ist ein Bias?").input_ids == wanted
    with tokenizer_folder(bare) as folder:
        assert folder == bare


def test_a_gguf_as_the_reference_on_the_command_line(tmp_path: Path) -> None:
    gguf = converted(TINY_QWEN2, tmp_path / "tiny.gguf", to="gguf", gguf_type="bf16")
    outcome = command("verify-equivalence", gguf, TINY_QWEN2, "--max-tokens", "300")
    assert outcome.code == 0, outcome.out + outcome.err
