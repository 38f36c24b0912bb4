"""One way to open anything that holds a Qwen2: layouts, adapters in order, NF4 below them, and refusals by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.checkpoint.view import Derived, View, read
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import EXIT_FINDING, UserError
from tests.checkpoint.edits import drop, edit_config, edit_json, load_state
from tests.tiny import write_adapter, write_tiny

ADAPTED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def second_adapter(base_folder, tmp_path_factory) -> Path:
    """Read-only: rank 2, alpha 5, q and v only."""
    folder = tmp_path_factory.mktemp("second") / "second"
    return write_adapter(folder, base_folder, seed=11, rank=2, alpha=5, target_modules=["q_proj", "v_proj"])


def values(view: View) -> dict[str, torch.Tensor]:
    return {name: read(tensor) for name, tensor in view.tensors.items()}


def test_a_plain_qwen2(base_folder):
    view = open_qwen2(base_folder)
    assert (view.kind, view.lossy, view.config["model_type"]) == ("qwen2", "", "qwen2")
    state = load_state(base_folder)
    assert view.tensors.keys() == state.keys() and not any(isinstance(t, Derived) for t in view.tensors.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in values(view).items())


def test_llamas_layout_is_the_same_view(base_folder, tmp_path):
    convert(base_folder, tmp_path / "llama", Options(to="llama"))
    mine, theirs = open_qwen2(base_folder), open_qwen2(tmp_path / "llama")
    assert theirs.kind == "Llama layout" and theirs.geometry == mine.geometry
    assert list(theirs.tensors) == list(mine.tensors)
    edit_config(tmp_path / "llama", attention_bias=False)
    assert open_qwen2(tmp_path / "llama").kind == "Llama layout, attention_bias off"


def test_adapters_add_up_in_fp32(base_folder, adapter_folder, second_adapter):
    """Against PEFT, both adapters active at once, merged in fp32."""
    view = open_qwen2(base_folder, adapters=[adapter_folder, second_adapter])
    assert view.kind == "qwen2 + adapter adapter + adapter second"
    model = PeftModel.from_pretrained(
        Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32), adapter_folder, "one"
    )
    model.load_adapter(second_adapter, "two")
    merged = model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    for name, tensor in values(view).items():
        adapted = name.endswith("_proj.weight")
        assert (view.tensors[name].dtype == "F32") == adapted
        error = (tensor.float() - merged[name]).abs().max()
        assert error <= (1e-6 if adapted else 0), name
    assert not torch.equal(values(view)[ADAPTED], values(open_qwen2(base_folder, adapters=[adapter_folder]))[ADAPTED])


def test_the_order_of_adapters_is_the_order_of_the_sum(base_folder, adapter_folder, second_adapter):
    view = open_qwen2(base_folder, adapters=[second_adapter, adapter_folder])
    pairs = [open_adapter(a).pairs[ADAPTED.removesuffix(".weight")] for a in (second_adapter, adapter_folder)]
    expected = load_state(base_folder)[ADAPTED].float() + delta(pairs[0]) + delta(pairs[1])
    assert torch.equal(read(view.tensors[ADAPTED]), expected)
    tensor = view.tensors[ADAPTED]
    assert isinstance(tensor, Derived) and [info.name.rpartition(".lora_")[0] != "" for info in tensor.sources] == [
        False, True, True, True, True,
    ]  # fmt: skip


def test_an_adapter_on_an_nf4_base(base_folder, adapter_folder):
    """The base rounded to 4 bits first, in its own dtype; then the update, in fp32."""
    plain, rounded = open_qwen2(base_folder), open_qwen2(base_folder, nf4=True)
    both = open_qwen2(base_folder, adapters=[adapter_folder], nf4=True)
    pair = open_adapter(adapter_folder).pairs[ADAPTED.removesuffix(".weight")]
    assert torch.equal(read(both.tensors[ADAPTED]), read(rounded.tensors[ADAPTED]).float() + delta(pair))
    assert not torch.equal(read(rounded.tensors[ADAPTED]), read(plain.tensors[ADAPTED]))
    bias = ADAPTED.replace("weight", "bias")
    assert torch.equal(read(both.tensors[bias]), read(plain.tensors[bias]))


def test_an_adapter_fits_the_llamafied_base_it_was_trained_on(base_folder, adapter_folder, tmp_path):
    """The fingerprint is that of the Qwen2's tensors, whatever layout they lie in."""
    from qwen2tool.checkpoint.adapter import PROVENANCE_FILE, fingerprint
    from qwen2tool.checkpoint.folder import open_checkpoint
    from qwen2tool.checkpoint.writer import write_json

    adapter = Path(tmp_path / "adapter")
    adapter.mkdir()
    for file in adapter_folder.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    write_json(adapter / PROVENANCE_FILE, {"base_fingerprint": fingerprint(open_checkpoint(base_folder))})
    convert(base_folder, tmp_path / "llama", Options(to="llama"))
    mine = open_qwen2(base_folder, adapters=[adapter])
    theirs = open_qwen2(tmp_path / "llama", adapters=[adapter])
    assert torch.equal(read(mine.tensors[ADAPTED]), read(theirs.tensors[ADAPTED]))
    other = write_tiny(tmp_path / "other", seed=4)
    with pytest.raises(UserError, match="was trained on another base"):
        open_qwen2(other, adapters=[adapter])
    assert open_qwen2(other, adapters=[adapter], allow_other_base=True).kind == "qwen2 + adapter adapter"


def test_an_adapter_that_does_not_fit(base_folder, tmp_path, adapter_folder):
    small = write_tiny(tmp_path / "small", num_hidden_layers=2, layer_types=None)
    with pytest.raises(UserError, match=r"adapts model\.layers\.2"):
        open_qwen2(small, adapters=[adapter_folder])
    with pytest.raises(UserError, match="not a PEFT adapter"):
        open_qwen2(base_folder, adapters=[small])


def test_what_is_missing_is_refused_or_left_to_be_found(base_copy):
    drop(base_copy, "model.layers.2.self_attn.v_proj.bias")
    with pytest.raises(UserError, match=r"1 of 9 .* model\.layers\.2\.self_attn\.v_proj\.bias") as refused:
        open_qwen2(base_copy)
    assert refused.value.exit_code == EXIT_FINDING
    assert len(open_qwen2(base_copy, whole=False).tensors) == 38


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
        ({"quantization_config": {}}, "quantised by None"),
    ],
)
def test_others_are_refused_by_name(base_copy, change, words):
    edit_config(base_copy, **change)
    with pytest.raises(UserError, match=words):
        open_qwen2(base_copy)


def test_a_config_without_a_model_type(base_copy):
    edit_json(base_copy / "config.json", lambda config: config.pop("model_type"))
    with pytest.raises(UserError, match="model_type is None"):
        open_qwen2(base_copy)
