"""torch's .bin files, read as data: the numbers are those of torch.load, and nothing in a hostile one runs."""

from __future__ import annotations

import builtins
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile

import pytest
import torch

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.inventory import take_inventory
from qwen2tool.checkpoint.reader import TORCH_DTYPE, read_tensor
from qwen2tool.checkpoint.torch_file import read_torch_file
from qwen2tool.checkpoint.torch_pickle import read_state
from qwen2tool.errors import UserError
from tests.checkpoint.edits import load_state
from tests.checkpoint.torch_files import Calls, archive, as_bins, dumps, edited, pickle_of, state_of, tensor_ops
from tests.tiny import tiny_model

FLOATS = bytes(16)
ROUNDS = 1000


def refused(path, words) -> str:
    start = time.perf_counter()
    with pytest.raises(UserError, match=words) as caught:
        read_torch_file(path)
    assert caught.value.fix and "\n" not in str(caught.value) and time.perf_counter() - start < 5
    return str(caught.value)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_as_torch_reads(path, count=None) -> None:
    found, wanted = read_torch_file(path).tensors, torch.load(path, weights_only=True)
    assert list(found) == list(wanted) and len(found) == (count or len(wanted))
    for name, info in found.items():
        read = read_tensor(info)
        assert (read.dtype, read.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert bits(read) == bits(wanted[name]), name


def test_every_dtype(tmp_path):
    state = {}
    for name, dtype in TORCH_DTYPE.items():
        numbers = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(1)).float() * 1.5
        state[name] = numbers.to(dtype)
    torch.save(state, tmp_path / "all.bin")
    assert_as_torch_reads(tmp_path / "all.bin", len(TORCH_DTYPE))


def test_parameters_ties_views_and_empty_tensors(tmp_path):
    table = torch.arange(24.0).reshape(6, 4)
    parts = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    state = {"a": table, "tied": table, "rows": table[2:5], "p": torch.nn.Parameter(parts), "none": torch.zeros(0, 3)}
    torch.save(state | {"scalar": torch.tensor(3.5), "column": torch.ones(1, 5)[:, :1]}, tmp_path / "x.bin")
    assert_as_torch_reads(tmp_path / "x.bin")
    found = read_torch_file(tmp_path / "x.bin").tensors
    assert found["a"].start == found["tied"].start and found["rows"].start == found["a"].start + 2 * 4 * 4


def test_a_state_dict_with_torchs_metadata(tmp_path):
    state = tiny_model().state_dict()
    assert state._metadata
    torch.save(state, tmp_path / "x.bin")
    assert_as_torch_reads(tmp_path / "x.bin", 3 * 12 + 3)


@pytest.mark.parametrize("shards", [1, 3])
def test_folder_of_bins_is_the_folder_of_safetensors(shards, base_copy):
    state, before = load_state(base_copy), open_checkpoint(base_copy)
    after = open_checkpoint(as_bins(base_copy, shards))
    assert (after.format, len(after.shards), after.leftovers) == ("bin", shards, ())
    assert after.geometry == before.geometry and after.nbytes == before.nbytes
    assert all(bits(read_tensor(after.tensors[name])) == bits(tensor) for name, tensor in state.items())
    assert take_inventory(after).missing == ()


def test_a_lost_bias_is_seen_in_a_bin(base_copy):
    as_bins(base_copy)
    state = torch.load(base_copy / "pytorch_model.bin")
    del state["model.layers.1.self_attn.v_proj.bias"]
    torch.save(state, base_copy / "pytorch_model.bin")
    assert take_inventory(open_checkpoint(base_copy)).missing == ("model.layers.1.self_attn.v_proj.bias",)


def test_strided_tensors_are_refused_by_name(tmp_path):
    torch.save({"fine": torch.ones(2, 3), "turned": torch.ones(2, 3).T}, tmp_path / "x.bin")
    assert "contiguous()" in refused(tmp_path / "x.bin", r"tensor 'turned' of shape \[3, 2\] .* strides \[1, 3\]")
    torch.save({"every other": torch.ones(6)[::2]}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "tensor 'every other'")


@pytest.mark.parametrize("value", [{"model": {"w": torch.ones(2)}}, {"epoch": 3}, [torch.ones(2)], torch.ones(2), {}])
def test_what_is_no_state_dict(value, tmp_path):
    torch.save(value, tmp_path / "x.bin")
    if value == {}:
        assert read_torch_file(tmp_path / "x.bin").tensors == {}
    else:
        assert "state_dict" in refused(tmp_path / "x.bin", "holds a (dict|int|list|tensor)")


def test_legacy_and_foreign_files(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert "weights_only=True" in refused(tmp_path / "old.bin", "written by a torch before 1.6")
    (tmp_path / "x.bin").write_bytes(b"nothing of the kind")
    refused(tmp_path / "x.bin", "no zip archive")
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as out:
        out.writestr("readme", "hello")
    refused(tmp_path / "y.bin", "not one of torch")


# Hostile pickles


def hostile(marker) -> dict[str, bytes]:
    touch = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    loaded = dumps(Calls(os.system, touch))
    return {
        **{f"os.system, protocol {p}": dumps(Calls(os.system, touch), p) for p in range(6)},
        "builtins.eval": dumps(Calls(builtins.eval, code)),
        "builtins.exec": dumps({"w": Calls(builtins.exec, code)}, 4),
        "subprocess": dumps(Calls(subprocess.Popen, ["touch", str(marker)])),
        "posix by hand": b"\x80\x02cposix\nsystem\nX" + len(touch).to_bytes(4, "little") + touch.encode() + b"\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
        "a pickle within": dumps(Calls(torch.storage._load_from_bytes, loaded)),
        "torch.load": b"\x80\x02ctorch\nload\n.",
        "a submodule by dots": b"\x80\x04\x8c\x05torch\x8c\x0a_utils.sys\x93.",
        "as a value": state_of(dumps(Calls(os.system, touch))[2:-1]),
        "beside a tensor": state_of(tensor_ops())[:-1] + dumps(Calls(os.system, touch))[2:-1] + b"0.",
    }


def test_no_code_of_a_hostile_pickle_runs(tmp_path):
    marker = tmp_path / "ran"
    for name, pickled in hostile(marker).items():
        text = refused(archive(tmp_path / "x.bin", pickled, data__0=FLOATS), "its pickle (asks for|uses|is damaged)")
        assert not marker.exists(), name
        if "by hand" in name or name == "builtins.eval":
            assert ("posix.system" if "hand" in name else "builtin") in text and "nothing of it was run" in text


def test_the_hostile_pickles_are_live(tmp_path):
    """The same files, loaded as one must not: their code runs."""
    for number in ("os.system, protocol 2", "builtins.eval", "posix by hand"):
        marker = tmp_path / f"ran {len(number)}".replace(" ", "-")
        file = archive(tmp_path / "x.bin", hostile(marker)[number], version=b"3\n", byteorder=b"little")
        torch.load(file, weights_only=False)
        assert marker.exists(), number


def nested(depth: int) -> bytes:
    """A tuple that holds the one before it twice, `depth` times over: its hash takes 2**depth steps."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))


GREEDY = {
    "hash bomb as a key": (b"\x80\x02}" + nested(60) + b"K\x01s.", "a key that is no string"),
    "memo at 2**31": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "bytes of 2**60": (b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".", "uses BYTEARRAY8"),
    "text of 2**60": (b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b".", "uses BINUNICODE8"),
    "text of 2**31": (b"\x80\x02X\xff\xff\xff\x7f.", "damaged"),
    "frame of 2**60": (b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"}", "damaged"),
    "a long of 2**31": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "uses LONG4"),
    "a decimal of 10**5 digits": (b"L" + b"9" * 100_000 + b"L\n.", "uses LONG"),
    "a dict in itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "holds a dict under 'a'"),
    "a list in itself": (b"\x80\x02]q\0h\0a.", "holds a list"),
    "too many steps": (b"\x80\x02" + b"N" * 1_100_000 + b".", "more than 1,000,000 steps"),
    "no end": (b"\x80\x02}", "damaged"),
    "nothing": (b"", "damaged"),
    "an empty stack": (b"\x80\x02.", "damaged"),
    "no mark": (b"\x80\x02}u.", "damaged"),
    "attributes of a tensor": (state_of(tensor_ops() + b"}b"), "damaged"),
    "a call of a dict": (b"\x80\x02})R.", "a call of no function"),
    "an object": (b"(ccollections\nOrderedDict\no.", "uses OBJ"),
    "an instance": (b"(icollections\nOrderedDict\n.", "uses INST"),
    "a new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "half a character": (state_of(tensor_ops(), b"\xed\xa0\x80"), "names a tensor|damaged"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_and_senseless_pickles(name, tmp_path):
    pickled, words = GREEDY[name]
    file = archive(tmp_path / "x.bin", pickled, data__0=FLOATS)
    slow = len(pickled) > 1_000_000
    if not slow:
        tracemalloc.start()
    try:
        if words is None:
            assert read_torch_file(file).tensors == {}
        else:
            refused(file, words)
        assert slow or tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


# Archives that lie


def test_by_hand_is_what_torch_writes(tmp_path):
    """The opcodes that the tests below change give a good file when nothing is changed."""
    file = archive(tmp_path / "x.bin", state_of(tensor_ops()), data__0=torch.arange(4.0).numpy().tobytes())
    assert read_tensor(read_torch_file(file).tensors["w"]).equal(torch.arange(4.0))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (tensor_ops(count=5), "needs a storage of 20 bytes, the archive has 16"),
        (tensor_ops(count=2**31 - 1), "needs a storage of"),
        (tensor_ops(shape=b"K\x05\x85"), "ends beyond its storage"),
        (tensor_ops(shape=b"J\xff\xff\xff\x7f\x85"), "ends beyond its storage"),
        (tensor_ops(shape=b"J\xff\xff\xff\xff\x85"), "without a shape"),
        (tensor_ops(shape=b"X\x01\0\0\x004\x85"), "without a shape"),
        (tensor_ops(shape=b"K\x02K\x02\x86"), "without a shape"),
        (tensor_ops(kind="Double"), "needs a storage of 32 bytes"),
        (tensor_ops(kind="QInt8"), r"asks for torch\.QInt8Storage"),
        (tensor_ops().replace(b"X\x01\0\0\x000", b"X\x04\0\0\0../0"), r"no data/\.\./0"),
        (tensor_ops().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001"), "no data/1"),
    ],
)
def test_tensors_that_are_not_in_their_archive(tensor, words, tmp_path):
    refused(archive(tmp_path / "x.bin", state_of(tensor), data__0=FLOATS), words)


def test_deflated_members_and_zip_bombs(tmp_path):
    good = state_of(tensor_ops())
    refused(archive(tmp_path / "x.bin", good, zipfile.ZIP_DEFLATED, data__0=FLOATS), "packed or encrypted")
    bomb = archive(tmp_path / "x.bin", bytes(300_000_000), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        refused(bomb, "packed or encrypted")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    refused(archive(tmp_path / "x.bin", bytes(17_000_000)), "data.pkl in its archive has 17000000 bytes")


def test_large_directories_are_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as out:
        for number in range(30_000):
            out.writestr(f"x/data/{number:0120d}", b"")
    refused(tmp_path / "x.bin", "a directory of more than")


def test_members_on_top_of_each_other(tmp_path):
    """Two names for the same bytes: a small file that claims to be a large model."""
    two = tensor_ops() + b"sX\x01\0\0\0v" + tensor_ops().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001")
    file = archive(tmp_path / "x.bin", state_of(two), data__0=FLOATS, data__1=FLOATS)
    assert len(read_torch_file(file).tensors) == 2
    blob = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as opened:
        first, second = (opened.getinfo(f"x/data/{i}").header_offset for i in "01")
    place = blob.rindex(second.to_bytes(4, "little"))
    blob[place : place + 4] = first.to_bytes(4, "little")
    file.write_bytes(blob)
    refused(file, "overlap|corrupt")


def test_byte_order_and_missing_members(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "good.bin")
    good, x = tmp_path / "good.bin", tmp_path / "x.bin"
    assert_as_torch_reads(edited(good, x))
    refused(edited(good, x, byteorder=b"big"), "big-endian")
    assert read_torch_file(edited(good, x, byteorder=None)).tensors.keys() == {"w"}  # before torch 2.1
    refused(edited(good, x, data__0=None), "no data/0")
    refused(edited(good, x, **{"data.pkl": None}), "not one of torch")
    assert b"FloatStorage" in pickle_of(good)


def test_only_user_errors_come_out(tmp_path):
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(3).bfloat16()}, tmp_path / "good.bin")
    blob, dice, outcomes = (tmp_path / "good.bin").read_bytes(), random.Random("qwen2tool bins"), [0, 0]
    pickled = pickle_of(tmp_path / "good.bin")
    for number in range(ROUNDS):
        damaged = bytearray(blob if number % 2 else pickled)
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(damaged))
            match dice.choice(("flip", "set", "cut", "insert")):
                case "flip":
                    damaged[place] ^= 1 << dice.randrange(8)
                case "set":
                    damaged[place] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
                case "cut":
                    del damaged[place : place + dice.choice((1, 4, 100))]
                case "insert":
                    damaged[place:place] = dice.randbytes(dice.choice((1, 8)))
        try:
            if number % 2:
                (tmp_path / "x.bin").write_bytes(damaged)
                for info in read_torch_file(tmp_path / "x.bin").tensors.values():
                    assert read_tensor(info).numel() == info.numel
            else:
                read_state(tmp_path, bytes(damaged))
            outcomes[0] += 1
        except UserError as error:
            assert error.fix and "\n" not in str(error)
            outcomes[1] += 1
    assert outcomes[1] > ROUNDS // 3 and outcomes[0] > ROUNDS // 20, outcomes


def test_headers_need_no_torch(base_copy, adapter_folder):
    as_bins(base_copy)
    adapter = shutil.copytree(adapter_folder, base_copy.parent / "adapter")
    script = (
        "import sys\n"
        "from qwen2tool.checkpoint import remote\n"
        "from qwen2tool.checkpoint.folder import open_checkpoint\n"
        "from qwen2tool.checkpoint.adapter_report import inspect_adapter\n"
        f"assert len(open_checkpoint({str(base_copy)!r}).tensors) == 39\n"
        f"assert inspect_adapter({str(adapter)!r}).verdict == 'lora adapter'\n"
        "assert not {'torch', 'transformers', 'peft', 'huggingface_hub', 'numpy'} & sys.modules.keys(), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
