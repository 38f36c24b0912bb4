"""The header parser against files built byte by byte, against the gguf package's own reader, and against damage."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from qwen2tool.checkpoint.gguf_header import MOST_ITEMS, GgufArray, read_gguf_header
from qwen2tool.errors import UserError
from tests.convert.gguf_files import ARRAY, F32, STRING, U32, gguf_bytes, numbers, string, strings, text, u32


def write(tmp_path, blob):
    path = tmp_path / "model.gguf"
    path.write_bytes(blob)
    return path


ONE = {"w": ([2, 3], "F32", np.arange(6, dtype="<f4").tobytes())}


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(tmp_path, version):
    metadata = {
        "u8": struct.pack("<IB", 0, 200), "i8": struct.pack("<Ib", 1, -100), "u16": struct.pack("<IH", 2, 60000),
        "i16": struct.pack("<Ih", 3, -30000), "u32": u32(4_000_000_000), "i32": struct.pack("<Ii", 5, -2_000_000_000),
        "f32": struct.pack("<If", 6, 0.5), "bool": struct.pack("<IB", 7, 1), "string": string("naïve 你好"),
        "u64": struct.pack("<IQ", 10, 2**63), "i64": struct.pack("<Iq", 11, -(2**62)),
        "f64": struct.pack("<Id", 12, 0.1), "texts": strings(["", "ab", "é"]), "numbers": numbers([3, -4]),
        "nothing": strings([]),
    }  # fmt: skip
    header = read_gguf_header(write(tmp_path, gguf_bytes(metadata, ONE, version)))
    found = {k: v.values() if isinstance(v, GgufArray) else v for k, v in header.metadata.items()}
    assert found == {
        "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4_000_000_000, "i32": -2_000_000_000, "f32": 0.5,
        "bool": True, "string": "naïve 你好", "u64": 2**63, "i64": -(2**62), "f64": 0.1, "texts": ["", "ab", "é"],
        "numbers": [3, -4], "nothing": [],
    }  # fmt: skip


def test_tensors_lie_where_they_lie(tmp_path):
    rows = np.arange(64, dtype="<f2").tobytes()
    path = write(tmp_path, gguf_bytes({}, {**ONE, "h": ([2, 32], "F16", rows), "q": ([1, 32], "Q8_0", bytes(34))}))
    tensors = read_gguf_header(path).tensors
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in tensors.items()} == {
        "w": ("F32", (2, 3), 24), "h": ("F16", (2, 32), 128), "q": ("Q8_0", (1, 32), 34),
    }  # fmt: skip
    blob = path.read_bytes()
    assert blob[tensors["w"].start : tensors["w"].end] == ONE["w"][2]
    assert blob[tensors["h"].start : tensors["h"].end] == rows
    assert all(t.start % 32 == 0 for t in tensors.values())


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_agrees_with_the_package_on_what_the_package_writes(tmp_path, alignment):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_custom_alignment(alignment)
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_float32("x", 1e-6)
    for name, shape in (("one", (5,)), ("two", (3, 7)), ("three", (2, 3, 4))):
        writer.add_tensor(name, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    header, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.metadata["tokenizer.ggml.tokens"].values() == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert header.metadata["x"] == theirs.fields["x"].contents()
    blob = path.read_bytes()
    for tensor in theirs.tensors:
        info = header.tensors[tensor.name]
        assert info.start == tensor.data_offset and info.shape == tensor.data.shape
        assert blob[info.start : info.end] == tensor.data.tobytes()


def entry(name: bytes, rank: int, dims: tuple[int, ...], code: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", rank)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", code, offset)


def file_of(body: bytes, tensors: int, keys: int, data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body
    return head + bytes(-len(head) % 32) + data


HUGE = 2**62
DAMAGE = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "version 1": (file_of(b"", 0, 0, version=1), "version 1"),
    "version 9": (file_of(b"", 0, 0, version=9), "version 9"),
    "big-endian": (file_of(b"", 0, 0, version=3 << 24), "big-endian"),
    "cut in the counts": (b"GGUF" + struct.pack("<I", 3) + bytes(5), "ends inside its header"),
    "tensor count": (file_of(b"", HUGE, 0), "tensors in a file"),
    "key count": (file_of(b"", 0, HUGE), "metadata entries in a file"),
    "key length": (file_of(struct.pack("<Q", HUGE) + bytes(40), 0, 1), "metadata key claims"),
    "key no text": (file_of(struct.pack("<Q", 2) + b"\xff\xfe" + u32(1), 0, 1), "no UTF-8"),
    "value type": (file_of(text("k") + struct.pack("<I", 77) + bytes(40), 0, 1), "type 77"),
    "string length": (file_of(text("k") + struct.pack("<IQ", STRING, HUGE) + bytes(40), 0, 1), "claims"),
    "list length": (file_of(text("k") + struct.pack("<IIQ", ARRAY, F32, HUGE) + bytes(40), 0, 1), "elements of"),
    "list of strings": (file_of(text("k") + struct.pack("<IIQ", ARRAY, STRING, 40) + bytes(24), 0, 1), "elements of"),
    "list past the end": (
        file_of(text("k") + struct.pack("<IIQQ", ARRAY, STRING, 2, HUGE) + bytes(40), 0, 1), "ends inside",
    ),
    "list of lists": (file_of(text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(60), 0, 1), "list of type 9"),
    "twice": (file_of((text("k") + u32(1)) * 2, 0, 2), "twice"),
    "alignment": (file_of(text("general.alignment") + u32(12), 0, 1), "power of two"),
    "rank 0": (file_of(entry(b"w", 0, (), 0, 0) + bytes(40), 1, 0), "0 dimensions"),
    "rank 9": (file_of(entry(b"w", 9, (1,) * 9, 0, 0), 1, 0), "9 dimensions"),
    "no rows": (file_of(entry(b"w", 1, (0,), 0, 0) + bytes(8), 1, 0), "claims shape [0]"),
    "too large": (file_of(entry(b"w", 2, (2**40, 2**40), 0, 0), 1, 0), "claims shape"),
    "half a block": (file_of(entry(b"w", 1, (40,), 8, 0), 1, 0), "blocks of 32"),
    "unknown type": (file_of(entry(b"w", 1, (4,), 9999, 0), 1, 0), "type 9999"),
    "gap": (file_of(entry(b"w", 1, (4,), 0, 64), 1, 0, bytes(128)), "leaves a gap"),
    "overlap": (
        file_of(entry(b"a", 1, (16,), 0, 0) + entry(b"b", 1, (16,), 0, 32), 2, 0, bytes(128)), "overlaps",
    ),
    "truncated": (file_of(entry(b"w", 1, (16,), 0, 0), 1, 0, bytes(63)), "truncated"),
    "more": (file_of(entry(b"w", 1, (16,), 0, 0), 1, 0, bytes(65)), "after the last tensor"),
    "one name": (
        file_of(entry(b"w", 1, (8,), 0, 0) + entry(b"w", 1, (8,), 0, 32), 2, 0, bytes(64)), "two tensors of one name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_a_sentence(tmp_path, case):
    blob, words = DAMAGE[case]
    with pytest.raises(UserError) as caught:
        read_gguf_header(write(tmp_path, blob))
    assert words in caught.value.what and str(tmp_path) in caught.value.what, caught.value.what


def test_the_same_files_without_damage_are_read(tmp_path):
    good = file_of(text("k") + u32(1) + entry(b"w", 1, (16,), 0, 0), 1, 1, bytes(64))
    assert read_gguf_header(write(tmp_path, good)).tensors["w"].shape == (16,)


def test_a_list_that_the_file_has_room_for_can_still_be_too_long(tmp_path):
    count = MOST_ITEMS + 1
    body = text("k") + struct.pack("<IIQ", ARRAY, U32, count) + bytes(4 * count)
    with pytest.raises(UserError, match="elements of"):
        read_gguf_header(write(tmp_path, file_of(body, 0, 1)))
