"""Packed checkpoints of transformers and bitsandbytes, read: every number is theirs, every lost part is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.reader import TORCH_DTYPE
from qwen2tool.checkpoint.view import Derived, View, plain_view, read
from qwen2tool.convert import nf4_codec
from qwen2tool.convert.nf4 import through_nf4, view_of_packed
from qwen2tool.convert.nf4_codec import BLOCK_SIZES, Packed, Packing, code_of, dequantise, quantise
from qwen2tool.convert.read import open_qwen2
from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.kernels.nf4 import dequantise_reference, from_bnb
from tests.checkpoint.edits import drop, edit_config, load_state, put, rewrite
from tests.convert.packed import NF4, PACKINGS, dequantised, load, save_packed
from tests.tiny import write_tiny

DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("nf4") / "source")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return save_packed(source, tmp_path / "packed", **NF4)


def differing(view: View, truth: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not `truth`'s in every bit, dtype and shape."""
    assert view.tensors.keys() == truth.keys()
    found = {name: read(tensor) for name, tensor in view.tensors.items()}
    return [n for n, t in found.items() if t.dtype != truth[n].dtype or not torch.equal(t, truth[n])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_number_is_bitsandbytes_own(source: Path, tmp_path: Path, packing: str, dtype: torch.dtype) -> None:
    folder = save_packed(source, tmp_path / "packed", dtype, **PACKINGS[packing])
    view = view_of_packed(open_checkpoint(folder))
    assert differing(view, dequantised(load(folder, dtype))) == []
    assert list(view.tensors) == list(expected_tensors(view.geometry))
    assert all(TORCH_DTYPE[t.dtype] == read(t).dtype and t.shape == read(t).shape for t in view.tensors.values())
    linears = [name for name, tensor in view.tensors.items() if isinstance(tensor, Derived)]
    assert linears == [name for name in view.tensors if name.endswith("_proj.weight")]
    assert "quantization_config" not in view.config and view.geometry.quantization is None


def test_it_says_what_it_is_and_what_does_not_come_back(packed: Path) -> None:
    view = view_of_packed(open_checkpoint(packed))
    assert view.kind == "bitsandbytes nf4"
    assert view.lossy == "the weights before they were rounded to nf4 do not come back"
    assert view.config["dtype"] == "bfloat16"
    tensor = view.tensors[DOWN]
    assert isinstance(tensor, Derived)
    parts = ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
    assert [info.name for info in tensor.sources] == [DOWN + part for part in parts]


def test_int8_is_fp32_and_its_config_says_so(source: Path, tmp_path: Path) -> None:
    view = view_of_packed(open_checkpoint(save_packed(source, tmp_path / "packed", **PACKINGS["int8"])))
    assert view.tensors[DOWN].dtype == "F32" and view.config["dtype"] == view.config["torch_dtype"] == "float32"
    assert view.tensors["model.layers.1.self_attn.k_proj.bias"].dtype == "BF16"


def test_biases_and_norms_are_the_stored_bytes(source: Path, packed: Path) -> None:
    view, original = view_of_packed(open_checkpoint(packed)), load_state(source)
    for name, tensor in view.tensors.items():
        if not name.endswith("_proj.weight"):
            assert isinstance(tensor, TensorInfo) and torch.equal(read(tensor), original[name])


def state_text(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist()))
        change(state)
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


def swap_shape(tensors: dict[str, torch.Tensor]) -> None:
    state_text(lambda state: state["shape"].reverse())(tensors)


def test_shuffled_scales_give_other_numbers(packed: Path) -> None:
    truth = dequantised(load(packed))
    rewrite(packed, lambda state: state.update({f"{DOWN}.absmax": state[f"{DOWN}.absmax"].flip(0)}))
    assert differing(view_of_packed(open_checkpoint(packed)), truth) == [DOWN]


def test_a_lost_bias_beside_packed_weights_is_named(packed: Path) -> None:
    whole(packed)
    drop(packed, "layers.2.self_attn.v_proj.bias")
    with pytest.raises(
        UserError, match=r"1 of 9 q/k/v biases are missing.*layers\.2\.self_attn\.v_proj\.bias"
    ) as caught:
        whole(packed)
    assert caught.value.exit_code == EXIT_FINDING


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), "1 tensors are missing"),
        (lambda tensors: tensors.pop(STATE), "down_proj.weight has shape"),
        (lambda tensors: tensors.update({"model.stranger.absmax": torch.zeros(1)}), "no Qwen2 has.*stranger"),
        (swap_shape, "down_proj.weight has shape"),
    ],
)
def test_what_is_lost_or_strange_is_still_there_to_be_found(
    packed: Path, damage: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    rewrite(packed, damage)
    with pytest.raises(UserError, match=message):
        whole(packed)


def whole(folder: Path) -> None:
    """What `open_qwen2` does with the view of a packed checkpoint."""
    view = view_of_packed(open_checkpoint(folder))
    tensors: Any = view.tensors
    require_whole(replace(view.origin, config=view.config, geometry=view.geometry, tensors=tensors))


def shorten(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(f"{DOWN}.absmax"), "absmax is missing"),
        (shorten(DOWN), "has 3199 bytes, its quant_state asks for 3200"),
        (shorten(f"{DOWN}.absmax"), r"absmax is U8 \[99\], not U8 \[100\]"),
        (shorten(f"{DOWN}.nested_quant_map"), "nested_quant_map is F32"),
        (
            state_text(lambda state: state.update(shape=[1 << 20, 1 << 20])),
            "bytes, its quant_state asks for 549755813888",
        ),
        (state_text(lambda state: state.update(shape=[6400])), "no quant_state"),
        (state_text(lambda state: state.update(blocksize=3)), "no quant_state"),
        (state_text(lambda state: state.update(blocksize=64.0)), "no quant_state"),
        (state_text(lambda state: state.update(nested_offset="x")), "no quant_state"),
        (state_text(lambda state: state.update(nested_offset=float("nan"))), "no quant_state"),
        (state_text(lambda state: state.update(nested_offset=10**400)), "no quant_state"),
        (state_text(lambda state: state.update(nested_blocksize=-1)), "no quant_state"),
        (state_text(lambda state: state.update(dtype="int64")), "no quant_state"),
        (state_text(lambda state: state.update(dtype=["float16"])), "no quant_state"),
        (state_text(lambda state: state.update(quant_type="fp4")), "another type"),
        (lambda tensors: tensors.update({STATE: torch.full((9,), 91, dtype=torch.uint8)}), "no quant_state"),
        (lambda tensors: tensors.update({STATE: torch.zeros(5000, dtype=torch.uint8)}), "is no text"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    packed: Path, damage: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    rewrite(packed, damage)
    with pytest.raises(UserError, match=message):
        view_of_packed(open_checkpoint(packed))


def test_a_strange_code_is_refused_when_it_is_read(packed: Path) -> None:
    put(packed, f"{DOWN}.quant_map", torch.linspace(-1, 1, 16))
    tensor = view_of_packed(open_checkpoint(packed)).tensors[DOWN]
    with pytest.raises(UserError, match="quant_map is not that of nf4"):
        read(tensor)


def test_a_tiled_int8_layout_is_refused(source: Path, tmp_path: Path) -> None:
    folder = save_packed(source, tmp_path / "packed", **PACKINGS["int8"])
    put(folder, "model.layers.1.mlp.down_proj.weight_format", torch.tensor(2, dtype=torch.uint8))
    with pytest.raises(UserError, match="stored in a GPU's own order"):
        view_of_packed(open_checkpoint(folder))


@pytest.mark.parametrize("method", ["gptq", "awq", 7])
def test_another_packer_is_refused_by_name(packed: Path, method: object) -> None:
    edit_config(packed, quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=f"quantised by .*{method}"):
        view_of_packed(open_checkpoint(packed))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_codec_is_bitsandbytes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, quant_type: str, blocksize: int, double: bool
) -> None:
    """Shapes end inside a block and inside a chunk, one block is all zeros.

    bitsandbytes' CPU product knows two ways to go wrong here: rows that are no whole blocks (AVX-512, up to 1024) and a
    compilation of seconds (beyond). So rows of whole blocks are compared with it, the others with the definition.
    """
    monkeypatch.setattr(nf4_codec, "CHUNK", 4096)
    generator = torch.Generator().manual_seed(blocksize)
    for dtype, shape in (
        (torch.bfloat16, (67, 130)), (torch.float16, (33, 41)), (torch.float32, (5, 1024)), (torch.bfloat16, (8, 1024))
    ):  # fmt: skip
        weight = torch.randn(shape, generator=generator).mul(0.05).to(dtype)
        weight.view(-1)[:blocksize] = 0
        packing = Packing(quant_type=quant_type, blocksize=blocksize, dtype=str(dtype)[6:], shape=shape, double=double)
        packed = quantise(weight, packing)
        nibbles, state = bnb.quantize_4bit(weight, None, None, blocksize, double, quant_type)
        assert torch.equal(packed.nibbles, nibbles.view(-1)) and torch.equal(packed.absmax, state.absmax)
        if double:
            assert packed.offset == state.offset.item()
            assert packed.nested_absmax is not None and torch.equal(packed.nested_absmax, state.state2.absmax)
        stub = Params4bit(nibbles, requires_grad=False, quant_state=state, bnb_quantized=True)
        found = dequantise(packed)
        assert found.is_contiguous() and torch.equal(found, dequantise_reference(from_bnb(stub), dtype))
        if blocksize <= 1024 and shape[1] % blocksize == 0:
            assert torch.equal(found, bnb.dequantize_4bit(nibbles, state))


def test_the_codes_are_bitsandbytes(packed: Path) -> None:
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(code_of(quant_type), bnb.get_4bit_type(quant_type, "cpu"))


def test_a_hand_made_block() -> None:
    """0x0f is -1 then 1; a scale of 2 doubles them; with double quantisation the scale is 0.5 * 3 + 0.5."""
    packing = Packing(quant_type="nf4", blocksize=32, dtype="float32", shape=(1, 3), double=False)
    nibbles = torch.tensor([0x0F, 0x70], dtype=torch.uint8)
    plain = Packed(packing=packing, nibbles=nibbles, absmax=torch.tensor([2.0]))
    assert dequantise(plain).tolist() == [[-2.0, 2.0, 0.0]]
    nested = Packed(
        packing=packing,
        nibbles=nibbles,
        absmax=torch.tensor([9], dtype=torch.uint8),
        nested_absmax=torch.tensor([3.0]),
        nested_code=torch.full((256,), 0.5),
        offset=0.5,
    )
    assert dequantise(nested).tolist() == [[-2.0, 2.0, 0.0]]


def test_through_nf4_is_what_qlora_carries(source: Path) -> None:
    view = through_nf4(plain_view(open_checkpoint(source)))
    truth = dequantised(load(source, **NF4))
    assert differing(view, truth) == []
    assert view.kind == "qwen2, linears through NF4" and view.config == plain_view(open_checkpoint(source)).config
    linears = [name for name in truth if name.endswith("_proj.weight")]
    for other in ({"double": False}, {"blocksize": 128}):
        changed = through_nf4(plain_view(open_checkpoint(source)), **other)  # type: ignore[arg-type]
        assert sorted(differing(changed, truth)) == sorted(linears)


def test_through_nf4_refuses_what_it_cannot_do(source: Path, tmp_path: Path) -> None:
    view = plain_view(open_checkpoint(source))
    with pytest.raises(UserError, match="nf4 in blocks of 48: not what bitsandbytes offers"):
        through_nf4(view, blocksize=48)
    write_tiny(tmp_path / "odd")
    put(tmp_path / "odd", DOWN, torch.zeros(64, 100, dtype=torch.int8))
    with pytest.raises(UserError, match=f"{DOWN}: is I8"):
        through_nf4(plain_view(open_checkpoint(tmp_path / "odd")))


@pytest.mark.parametrize("method", [{}, {"quant_method": None}], ids=["absent", "null"])
def test_a_config_without_a_method_is_bitsandbytes(base_folder, tmp_path, method):
    """Early savers wrote `load_in_4bit` alone: the tensors say what they are. Another method stays refused."""
    folder = save_packed(base_folder, tmp_path / "packed", **NF4)
    whole = open_qwen2(folder)
    edit_config(folder, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **method})
    view = open_qwen2(folder)
    assert view.kind == whole.kind == "bitsandbytes nf4"
    assert all(torch.equal(read(view.tensors[name]), read(tensor)) for name, tensor in whole.tensors.items())
    edit_config(folder, quantization_config={"bits": 4, "quant_method": "gptq"})
    with pytest.raises(UserError, match="quantised by 'gptq'"):
        open_qwen2(folder)
