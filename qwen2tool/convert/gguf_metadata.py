"""What stands before the data of a GGUF file: llama.cpp's metadata, the tokenizer, and where each tensor will lie.

The `gguf` package lays it out. It packs a vocabulary one value at a time (1.1 s for Qwen2's 150,000 tokens and as many
merges); lists of one plain type are packed at once here instead, into the same bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.geometry import Config
from qwen2tool.checkpoint.gguf_file import STORED_CONFIG
from qwen2tool.convert.gguf_pack import Planned
from qwen2tool.convert.gguf_vocab import SAMPLING, GgufTokenizer

if TYPE_CHECKING:
    import gguf

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type`: what most matrices are."""


def metadata_bytes(
    folder: Path,
    name: str,
    config: Config,
    facts: Mapping[str, int | float | str],
    tokenizer: GgufTokenizer,
    plan: list[Planned],
    kind: str,
) -> bytes:
    """Everything before the data; `folder` is where the `gguf` package may write it, and nothing stays there.

    Args:
        name: what the model calls itself.
        facts: metadata of the architecture, without its prefix.
    """
    import gguf
    import numpy as np

    file = folder / "metadata.unfinished"
    writer = _writer_class()(file, "qwen2")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in facts.items():
        _add(writer, f"qwen2.{key}", value)
    writer.add_string(STORED_CONFIG, json.dumps(config, ensure_ascii=False))
    _add_tokenizer(writer, tokenizer)
    for planned in plan:
        block_type = gguf.GGMLQuantizationType[planned.kind]
        # The dtype argument only matters where no block type is given; uint8 would mean a shape in bytes.
        writer.add_tensor_info(
            planned.name, planned.tensor.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=block_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    packed = file.read_bytes()
    file.unlink()
    return packed


def _add(writer: gguf.GGUFWriter, key: str, value: int | float | str) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer.merges])
    for role, index in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
    writer.add_add_bos_token(tokenizer.add_bos)
    for label, template in tokenizer.templates.items():
        key = "tokenizer.chat_template"
        writer.add_string(key if label == "default" else f"{key}.{label}", template)
    for theirs, ours in SAMPLING.items():
        value = tokenizer.sampling.get(ours)
        if theirs == "top_k" and value is not None:
            writer.add_int32(f"general.sampling.{theirs}", int(value))
        elif value is not None:
            writer.add_float32(f"general.sampling.{theirs}", float(value))
    for key, text in tokenizer.sidecar.items():
        if key != STORED_CONFIG:
            writer.add_string(key, text)


@cache
def _writer_class() -> type[gguf.GGUFWriter]:
    import gguf

    class Writer(gguf.GGUFWriter):
        """The package's writer; a package that packs by another method goes on without this one."""

        def _pack_val(self, val: Any, vtype: Any, *args: Any, **options: Any) -> bytes:
            plain = vtype == gguf.GGUFValueType.ARRAY and options == {"add_vtype": True, "sub_type": None} and not args
            packed = _packed_list(val) if plain else None
            return super()._pack_val(val, vtype, *args, **options) if packed is None else packed

    return Writer


def _packed_list(values: Sequence[Any]) -> bytes | None:
    """A metadata array of strings or of integers, little-endian, with its types before it; None for any other."""
    import gguf

    kinds = set(map(type, values))
    array, count = gguf.GGUFValueType.ARRAY, len(values)
    if kinds == {str}:
        texts = [text.encode() for text in values]
        lengths = map(struct.Struct("<Q").pack, map(len, texts))
        head = struct.pack("<IIQ", array, gguf.GGUFValueType.STRING, count)
        return head + b"".join(chain.from_iterable(zip(lengths, texts, strict=True)))
    if kinds == {int}:
        return struct.pack(f"<IIQ{count}i", array, gguf.GGUFValueType.INT32, count, *values)
    return None
