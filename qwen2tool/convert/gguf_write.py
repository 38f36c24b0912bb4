"""A Qwen2 as one GGUF file that llama.cpp loads: f32, f16, bf16 or q8_0 matrices, F32 biases and norms, its tokenizer.

Biases and norms are never rounded: they are a thousandth of the file, and the k biases of a real Qwen2 reach 200, where
bf16 counts in ones. bf16 to bf16 is a copy of bytes. Q8_0 (llama.cpp's reference rounding, through the `gguf` package)
stores blocks of 32 numbers of a row as int8 and one fp16 scale, the largest magnitude over 127: an entry is off by at
most half a scale, and by what rounding that scale to fp16 adds (a sixteenth of it). A row whose width is no multiple of
32 stays F32. What fp16 cannot hold is refused, not made infinite.

Written tensor by tensor and a few rows at a time, under a hidden name that becomes `out` when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from qwen2tool.checkpoint.geometry import Config, Geometry, expected_tensors
from qwen2tool.checkpoint.gguf_file import LAYER_NAMES, STORED_CONFIG, TOP_NAMES
from qwen2tool.checkpoint.gguf_header import ALIGNMENT
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.reader import copy_tensor, row_blocks, write_tensor
from qwen2tool.checkpoint.values import same_data
from qwen2tool.checkpoint.view import AnyTensor, View, read
from qwen2tool.checkpoint.writer import FULL_DISK
from qwen2tool.convert.gguf_vocab import SAMPLING, GgufTokenizer, tokenizer_of_gguf
from qwen2tool.convert.gguf_vocab_json import tokenizer_of_folder
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    import gguf
    import torch

GgufKind = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type`: what most matrices are."""
FLOATS = ("F32", "F16", "BF16")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_ELEMENTS = 1 << 22
"""Numbers that are converted at a time: 16 MB of fp32."""
Q8_BLOCK = 32
LARGEST_FP16 = 65504.0
GGUF_NAMES = {ours: theirs for theirs, ours in TOP_NAMES.items()}
GGUF_LAYER_NAMES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
NEEDS_QWEN2 = "Write a Hugging Face folder instead (qwen2tool convert)"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One tensor to be written: under GGUF's name, as block type `kind` ("F32", "Q8_0")."""

    name: str
    kind: str
    tensor: AnyTensor

    @property
    def nbytes(self) -> int:
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return prod(self.tensor.shape) // block * block_bytes


@dataclass(frozen=True, kw_only=True)
class Written:
    """`kinds` counts the tensors of a block type; `kept` are matrices that stayed F32 for the width of their rows."""

    file: Path
    nbytes: int
    kinds: dict[str, int]
    kept: tuple[str, ...]


def write_gguf(
    view: View,
    out: Path,
    kind: GgufKind,
    *,
    overwrite: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Written:
    """Writes `view` to `out` (a new .gguf file), matrices as `kind`, with the tokenizer of the view's origin.

    Args:
        on_tensor: called after each tensor with its name in `view` and the bytes written for it.

    Raises:
        UserError: the output exists or cannot be written, the model is not whole or has something that llama.cpp's
            qwen2 cannot say (sliding layers, another RoPE scaling, another head size), a number that the type cannot
            hold, or a tokenizer that llama.cpp would read differently.
    """
    _require_target(out, overwrite)
    plan = _plan(view, kind)
    config = view.config
    facts = _facts(view.geometry, config)
    tokenizer = _tokenizer_of(view)
    with _atomic_file(out) as partial:
        _write_header(partial, out.stem, config, facts, tokenizer, plan, kind)
        with partial.open("ab") as handle:
            for planned in plan:
                handle.write(bytes(-handle.tell() % ALIGNMENT))
                before = handle.tell()
                _write_data(planned, handle)
                if handle.tell() - before != planned.nbytes:
                    raise AssertionError(f"{planned.name}: wrote {handle.tell() - before} bytes of {planned.nbytes}")
                if on_tensor:
                    on_tensor(planned.tensor.name, planned.nbytes)
            handle.write(bytes(-handle.tell() % ALIGNMENT))
            handle.flush()
            os.fsync(handle.fileno())
    kept = tuple(p.tensor.name for p in plan if p.kind == "F32" != kind.upper() and len(p.tensor.shape) > 1)
    return Written(
        file=out, nbytes=out.stat().st_size, kinds=dict(Counter(planned.kind for planned in plan)), kept=kept
    )


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a Qwen2."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, inside = name.split(".", 3)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[inside]}"


def _tokenizer_of(view: View) -> GgufTokenizer:
    if view.origin.format == "gguf":
        return tokenizer_of_gguf(view.origin)
    if not view.kind.startswith("Qwen 1"):
        return tokenizer_of_folder(view.origin.folder, view.config)
    from qwen2tool.convert.qwen1_tokenizer import write_side_files

    with TemporaryDirectory() as folder:
        write_side_files(view.origin, Path(folder))
        return tokenizer_of_folder(Path(folder), view.config)


def _require_target(out: Path, overwrite: bool) -> None:
    if out.suffix != ".gguf":
        raise UserError(f"{out}: a GGUF file's name ends in .gguf", "Name the output so")
    if out.is_dir() or out.is_symlink() or (out.exists() and not overwrite):
        raise UserError(f"{out}: already exists", "Choose another output, or pass --overwrite")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent}: no such folder to write into", "Create it first")


def _plan(view: View, kind: GgufKind) -> list[Planned]:
    """Every tensor of a whole Qwen2, in the order of its layers."""
    expected = expected_tensors(view.geometry)
    spare = {HEAD} if view.geometry.tie_word_embeddings else set()
    if spare and _has_own_head(view):
        expected[HEAD] = expected[TABLE]
    for name, shape in expected.items():
        found = view.tensors.get(name)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {list(found.shape)}, not {list(shape)}"
            raise UserError(f"{view.path}: {name} {what}", "Go back to the original checkpoint", EXIT_FINDING)
        if found.dtype not in FLOATS:
            raise UserError(f"{view.path}: {name} is {found.dtype}, not F32, F16 or BF16", "Convert it first")
    for name in view.tensors.keys() - expected.keys() - spare:
        if not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{view.path}: {name} is no tensor of a Qwen2", NEEDS_QWEN2, EXIT_FINDING)
    return [
        Planned(name=gguf_name(name), kind=_kind_of(shape, kind), tensor=view.tensors[name])
        for name, shape in expected.items()
    ]


def _has_own_head(view: View) -> bool:
    """Whether a head is stored that is not the table, though config.json ties the two: readers take it."""
    head, table = view.tensors.get(HEAD), view.tensors.get(TABLE)
    if head is None or table is None or head is table:
        return False
    return not (isinstance(head, TensorInfo) and isinstance(table, TensorInfo) and same_data(head, table))


def _kind_of(shape: tuple[int, ...], kind: GgufKind) -> str:
    if len(shape) == 1 or (kind == "q8_0" and shape[-1] % Q8_BLOCK):
        return "F32"
    return kind.upper()


def _facts(shape: Geometry, config: Config) -> dict[str, int | float | str]:
    """Metadata of the architecture, without its prefix."""
    if shape.sliding_layers:
        raise UserError(
            f"config.json: {len(shape.sliding_layers)} layers slide (the first is layer {shape.sliding_layers[0]}), "
            "and llama.cpp's qwen2 has no sliding window",
            NEEDS_QWEN2,
        )
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        raise UserError(f"config.json: head_dim {shape.head_dim} is not hidden_size over the heads", NEEDS_QWEN2)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act is {ascii(config['hidden_act'])[:40]}, not 'silu'", NEEDS_QWEN2)
    facts: dict[str, int | float | str] = {
        "block_count": shape.num_hidden_layers,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_theta,
    }
    return facts | _scaling_facts(shape)


def _scaling_facts(shape: Geometry) -> dict[str, int | float | str]:
    scaling = {key: value for key, value in (shape.rope_scaling or {}).items() if value is not None}
    kind, factor = scaling.pop("rope_type", None), scaling.pop("factor", None)
    if kind is None:
        return {}
    known = {"original_max_position_embeddings", "beta_fast", "beta_slow"} if kind == "yarn" else set()
    unknown = sorted(scaling.keys() - known)
    numbers = [factor, *scaling.values()]
    if kind not in ("yarn", "linear") or unknown or not all(type(n) in (int, float) and n > 0 for n in numbers):
        raise UserError(
            f"config.json: RoPE scaling {ascii(kind)[:40]} {', '.join(unknown)[:80]} cannot be said in GGUF",
            NEEDS_QWEN2,
        )
    facts: dict[str, int | float | str] = {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings", shape.max_position_embeddings)
        facts["rope.scaling.original_context_length"] = int(original)
        facts |= {f"rope.scaling.yarn_{k}": float(scaling[k]) for k in ("beta_fast", "beta_slow") if k in scaling}
    return facts


def _write_header(
    file: Path,
    name: str,
    config: Config,
    facts: Mapping[str, int | float | str],
    tokenizer: GgufTokenizer,
    plan: list[Planned],
    kind: GgufKind,
) -> None:
    """Everything before the data, through the `gguf` package."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "qwen2")
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


def _write_data(planned: Planned, handle: BinaryIO) -> None:
    """The bytes of one tensor, converted a few rows at a time."""
    tensor = planned.tensor
    if isinstance(tensor, TensorInfo) and tensor.dtype == planned.kind:
        copy_tensor(tensor, handle)
        return
    for rows in _row_blocks(tensor):
        _write_rows(planned, rows, handle)


def _row_blocks(tensor: AnyTensor) -> Iterator[torch.Tensor]:
    if isinstance(tensor, TensorInfo):
        for _, info in row_blocks(tensor, BLOCK_ELEMENTS):
            yield read(info)
        return
    whole = read(tensor)
    step = max(1, BLOCK_ELEMENTS // max(1, whole[0].numel()))
    for first in range(0, len(whole), step):
        yield whole[first : first + step]


def _write_rows(planned: Planned, rows: torch.Tensor, handle: BinaryIO) -> None:
    import torch

    if planned.kind == "Q8_0":
        handle.write(_q8_0(planned, rows.float()).data)
        return
    if planned.kind == "F16" and rows.dtype != torch.float16:
        _require_fp16(planned, rows)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[planned.kind]
    write_tensor(rows.to(dtype), handle)


def _require_fp16(planned: Planned, rows: torch.Tensor) -> None:
    """fp16 rounds everything from 65520 up to infinity."""
    largest = float(rows.abs().max())
    if largest >= LARGEST_FP16 + 16:
        raise UserError(
            f"{planned.tensor.name}: holds {largest:g}, which fp16 (largest number {LARGEST_FP16:g}) cannot hold",
            "Write bf16, q8_0 or f32 instead",
        )


def _q8_0(planned: Planned, rows: torch.Tensor) -> Any:
    """Blocks of 32 as the `gguf` package rounds them: (rows, bytes a row), uint8."""
    import gguf

    largest = float(rows.abs().max())
    if not largest < LARGEST_FP16 * 127:
        raise UserError(
            f"{planned.tensor.name}: holds {largest:g}, for which Q8_0 has no scale",
            "Write bf16 or f32 instead; a checkpoint with NaN or infinity is damaged",
        )
    return gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)


@contextmanager
def _atomic_file(out: Path) -> Iterator[Path]:
    """A hidden path beside `out` to write; it becomes `out` when the block ends well, and is removed when not."""
    folder = out.absolute().parent
    for stale in folder.glob(f".{_literal(out.name)}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            stale.unlink(missing_ok=True)
    partial = folder / f".{out.name}.partial-{os.getpid()}"
    try:
        yield partial
        partial.replace(out)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"{out}: disk full or file too large while writing ({os.strerror(error.errno)})",
                "Free some space, or choose an output on another disk",
            ) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)
