"""Layer by layer against transformers and PEFT on the whole model, and faults that show where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.load import load_model
from qwen2tool.convert.read import open_qwen2
from qwen2tool.verify.layer_figures import PARTS, LayerFigures, first_beyond
from qwen2tool.verify.layers import LayerComparison, Setting
from qwen2tool.verify.one_layer import HOOKS
from qwen2tool.verify.sides import Side, open_sides
from qwen2tool.verify.stream import Store, Text, text_of
from tests.tiny import write_adapter, write_tiny
from tests.verify.common import State, random_samples, variant, without

TEXT = text_of([*random_samples(3, 20), *random_samples(2, 19, seed=5), *random_samples(1, 31, seed=6)])
Outputs = dict[str, torch.Tensor]


def through(reference: Side, candidate: Side, text: Text = TEXT, **setting: Any) -> tuple[LayerComparison, Any]:
    """(streams behind the last layer, figures by layer)."""
    options = {"device": "cpu", "dtype": "bfloat16"} | setting
    comparison = LayerComparison(reference, candidate, text, Setting(**options), Store())
    comparison.embed()
    return comparison, [comparison.step(index, lambda amount=1.0: None) for index in range(comparison.depth)]


def figures(reference: Path, candidate: Path, **setting: Any) -> list[LayerFigures]:
    sides = open_sides(reference, candidate)
    found: list[LayerFigures] = through(sides.reference, sides.candidate, **setting)[1]
    return found


def whole_model(model: Any) -> dict[int, Outputs]:
    """What transformers' whole model puts out in each layer, sequence by sequence."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    seen: dict[int, dict[str, list[torch.Tensor]]] = {}

    def keep(index: int, part: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen.setdefault(index, {}).setdefault(part, []).append(value[0] if value.dim() == 3 else value)

        return hook

    for index, layer in enumerate(inner.model.layers):
        for part, name in HOOKS.items():
            layer.get_submodule(name).register_forward_hook(keep(index, part))
        layer.register_forward_hook(keep(index, "output"))
    with torch.no_grad():
        for ids in TEXT.ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return {index: {part: torch.cat(values) for part, values in parts.items()} for index, parts in seen.items()}


def expected(mine: Outputs, theirs: Outputs) -> Outputs:
    """Root mean square over tokens of each token's relative error, by part."""
    errors = {}
    for part in PARTS:
        truth = mine[part].double()
        errors[part] = ((theirs[part].double() - truth).norm(dim=-1) / truth.norm(dim=-1)).square().mean().sqrt()
    return errors


def zero_biases(state: State) -> None:
    for name, tensor in state.items():
        if name.endswith("bias"):
            tensor.zero_()


def test_accumulated_errors_are_those_of_two_whole_models(tmp_path: Path, base_folder: Path) -> None:
    """Missing biases run as zeros; the truth, and the other side, are transformers' own whole models."""
    zeroed = variant(base_folder, tmp_path / "zeroed", zero_biases)
    models = [Qwen2ForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (base_folder, zeroed)]
    mine, theirs = map(whole_model, models)
    found = figures(base_folder, variant(base_folder, tmp_path / "dropped", without("bias")))
    for layer in found:
        for part, error in expected(mine[layer.index], theirs[layer.index]).items():
            assert layer.accumulated[part] == pytest.approx(error.item(), rel=1e-4)
            assert layer.accumulated[part] > 0.05


def test_noise_is_that_of_transformers_in_16_bit(base_folder: Path) -> None:
    wide, narrow = (Qwen2ForCausalLM.from_pretrained(base_folder, dtype=d) for d in (torch.float32, torch.bfloat16))
    mine, theirs = whole_model(wide.eval()), whole_model(narrow.eval())
    for layer in figures(base_folder, base_folder):
        wanted = expected(mine[layer.index], theirs[layer.index])
        for run, errors in layer.noise.items():
            for part, error in wanted.items():
                assert errors[part] == pytest.approx(error.item(), rel=0.2), (run, part)
                assert 1e-4 < layer.own_noise[part] < 1.2 * errors[part]


def test_batches_padded_on_the_left_compute_the_same_in_fp32(base_folder: Path) -> None:
    """The second noise run differs by rounding alone: its mask and positions are right."""
    for layer in figures(base_folder, base_folder, dtype="float32"):
        for errors in layer.noise.values():
            assert max(errors.values()) < 1e-5
        assert max(layer.noise["float32, other batches"].values()) > 0


def logits(comparison: LayerComparison, folder: Path) -> torch.Tensor:
    """Of the truth's last hidden states, by transformers' own norm and head."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = comparison.truth.now.read(slice(0, TEXT.tokens))
    with torch.no_grad():
        return model.lm_head(model.model.norm(states))


def whole_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in TEXT.ids])


@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_the_truth_is_transformers_with_peft(tmp_path: Path, base_folder: Path, adapters: int) -> None:
    """With two adapters both are active, as PEFT adds them up."""
    paths = [write_adapter(tmp_path / f"a{n}", base_folder, seed=n, rank=2 + n, alpha=5) for n in range(adapters)]
    sides = open_sides(base_folder, base_folder, adapters=paths)
    found = logits(through(sides.reference, sides.candidate)[0], base_folder)
    model: Any = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    plain = whole_logits(model)
    for number, path in enumerate(paths):
        if number == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="0")
        else:
            model.load_adapter(path, adapter_name=str(number))
            model.base_model.set_adapter([str(n) for n in range(number + 1)])
    torch.testing.assert_close(found, whole_logits(model), rtol=0, atol=5e-5)
    assert ((found - plain).abs().max() > 0.1) == (adapters > 0)


def test_an_adapter_on_nf4_is_what_qlora_ran(tmp_path: Path, adapter_folder: Path) -> None:
    """bitsandbytes' own layers under PEFT's, in fp32 (in 16 bit bitsandbytes rounds what it dequantises)."""
    base_folder = write_tiny(tmp_path / "base", dtype=torch.float32)
    sides = open_sides(base_folder, base_folder, adapters=[adapter_folder], adapter_on="nf4")
    found = logits(through(sides.reference, sides.candidate)[0], base_folder)
    model = load_model(open_qwen2(base_folder).origin, dtype="float32", nf4=True)
    wanted = whole_logits(PeftModel.from_pretrained(model, adapter_folder))
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)
    plain = open_sides(base_folder, base_folder, adapters=[adapter_folder])
    assert (logits(through(plain.reference, plain.candidate)[0], base_folder) - wanted).abs().max() > 0.05


def scale(name: str, factor: float = 0.5) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] *= factor

    return change


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("self_attn.q_proj.weight", "q"),
        ("self_attn.k_proj.bias", "k"),
        ("self_attn.v_proj.bias", "v"),
        ("self_attn.o_proj.weight", "attention"),
        ("mlp.down_proj.weight", "mlp"),
        ("post_attention_layernorm.weight", "mlp"),
    ],
)
def test_a_fault_is_found_in_its_layer_and_part(tmp_path: Path, base_folder: Path, name: str, part: str) -> None:
    found = figures(base_folder, variant(base_folder, tmp_path / "bad", scale(f"model.layers.1.{name}")))
    assert [max(layer.own.values()) > 0.01 for layer in found] == [False, True, False]
    assert max(found[0].accumulated.values()) == 0 and max(found[2].own.values()) < 1e-5
    assert found[2].accumulated["output"] > 0.01
    order = PARTS.index(part)
    assert all(found[1].own[p] == 0 for p in PARTS[:3] if p != part)
    assert found[1].own[part] > 0.05 and (order < 4 or found[1].own["attention"] == 0)
    beyond = first_beyond(found, "bfloat16")
    assert beyond is not None and beyond.layer == 1
    assert first_beyond(figures(base_folder, base_folder), "bfloat16") is None


def test_a_wrong_theta_is_in_the_attention_of_every_layer(tmp_path: Path, base_folder: Path) -> None:
    wrong = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    found = figures(base_folder, variant(base_folder, tmp_path / "theta", config=wrong))
    for layer in found:
        assert max(layer.own[p] for p in "qkv") < 1e-6
        assert layer.own["attention"] > 0.01


def test_a_sliding_layer_slides(tmp_path: Path, base_folder: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    found = figures(base_folder, variant(base_folder, tmp_path / "slides", config=window))
    assert [layer.own["attention"] > 0.01 for layer in found] == [False, True, False]


def test_a_model_that_lacks_its_last_layer_still_runs(tmp_path: Path, base_folder: Path) -> None:
    short = variant(base_folder, tmp_path / "short", config={"num_hidden_layers": 2, "layer_types": None})
    found = figures(base_folder, short)
    assert [bool(layer.own) for layer in found] == [True, True, False]
    assert max(found[1].accumulated.values()) == 0
    whole = variant(short, tmp_path / "whole", lambda s: {n: t for n, t in s.items() if ".layers.2." not in n})
    longer = figures(whole, base_folder)
    assert [bool(layer.own_noise) for layer in longer] == [True, True, False]


def test_layers_that_are_told_to_be_identical_are_not_run_again(tmp_path: Path, base_folder: Path) -> None:
    """Beyond the first fault a layer with the reference's tensors has no error of its own, and costs no pass."""
    bad = variant(base_folder, tmp_path / "bad", scale("model.layers.0.mlp.up_proj.weight"))
    told, run = figures(base_folder, bad, identical=frozenset({1, 2})), figures(base_folder, bad)
    for one, other in zip(told, run, strict=True):
        assert one.own == pytest.approx(other.own, abs=1e-12) and one.accumulated == other.accumulated


def test_one_large_token_does_not_hide_the_others(tmp_path: Path) -> None:
    """A token of size 1,000 in the stream, as real models have: an error of all others still shows in full."""

    def enlarge(state: State) -> None:
        state["model.embed_tokens.weight"][TEXT.ids[0][0]] *= 1000

    base = variant(write_tiny(tmp_path / "tiny"), tmp_path / "base", enlarge)
    found = figures(base, variant(base, tmp_path / "bad", scale("model.layers.0.mlp.down_proj.weight")))
    assert found[0].own["output"] > 0.05
