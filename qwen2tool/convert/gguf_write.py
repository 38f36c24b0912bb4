"""A Qwen2 as one GGUF file that llama.cpp loads: f32, f16, bf16 or q8_0 matrices, F32 biases and norms, its tokenizer.

Biases and norms are never rounded: they are a thousandth of the file, and the k biases of a real Qwen2 reach 200, where
bf16 counts in ones. bf16 to bf16 is a copy of bytes. Q8_0 (llama.cpp's reference rounding, through the `gguf` package)
stores blocks of 32 numbers of a row as int8 and one fp16 scale, the largest magnitude over 127: an entry is off by at
most half a scale, and by what rounding that scale to fp16 adds (a sixteenth of it). A row whose width is no multiple of
32 stays F32. What fp16 cannot hold is refused, not made infinite.

Written tensor by tensor and a few rows at a time, in a hidden folder that a killed run leaves for the next one; the
file takes the name `out` when all of it is on the disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from qwen2tool.checkpoint.geometry import Config, Geometry, expected_tensors
from qwen2tool.checkpoint.gguf_file import LAYER_NAMES, TOP_NAMES
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.reader import same_data
from qwen2tool.checkpoint.view import View
from qwen2tool.checkpoint.writer import FULL_DISK
from qwen2tool.convert.gguf_metadata import metadata_bytes
from qwen2tool.convert.gguf_pack import Q8_BLOCK, Planned
from qwen2tool.convert.gguf_store import GgufStore
from qwen2tool.convert.gguf_vocab import GgufTokenizer, tokenizer_of_gguf
from qwen2tool.convert.gguf_vocab_json import tokenizer_of_folder
from qwen2tool.convert.store import resumable, sync
from qwen2tool.errors import EXIT_FINDING, UserError

GgufKind = Literal["f32", "f16", "bf16", "q8_0"]
FLOATS = ("F32", "F16", "BF16")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GGUF_NAMES = {ours: theirs for theirs, ours in TOP_NAMES.items()}
GGUF_LAYER_NAMES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
NEEDS_QWEN2 = "Write a Hugging Face folder instead (qwen2tool convert)"


@dataclass(frozen=True, kw_only=True)
class Written:
    """`kinds` counts the tensors of a block type; `kept` are matrices that stayed F32 for the width of their rows.

    `hashes` holds the sha256 of each tensor's bytes, under its name in the view; `resumed` counts the tensors that an
    earlier run had written.
    """

    file: Path
    nbytes: int
    kinds: dict[str, int]
    kept: tuple[str, ...]
    hashes: dict[str, str]
    resumed: int


@contextmanager
def gguf_file(
    view: View,
    out: Path,
    kind: GgufKind,
    *,
    key: str,
    overwrite: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Iterator[Written]:
    """The finished file under a hidden name; it takes the name `out` when the block, which may prove it, ends well.

    Args:
        key: hexadecimal, names what the bytes are made from: what a killed run with the same key and `out` wrote is
            gone on with.
        on_tensor: called after each tensor with its name in `view` and the bytes written for it.

    Raises:
        UserError: the output exists or cannot be written, the model is not whole or has something that llama.cpp's
            qwen2 cannot say (sliding layers, another RoPE scaling, another head size), a number that the type cannot
            hold, or a tokenizer that llama.cpp would read differently.
    """
    _require_target(out, overwrite)
    plan = _plan(view, kind)
    facts = _facts(view.geometry, view.config)
    tokenizer = _tokenizer_of(view)
    with _full_disk_is_one_line(out), resumable(out, key, GgufStore) as store:
        header = metadata_bytes(store.folder, out.stem, view.config, facts, tokenizer, plan, kind)
        file, hashes = store.write(out.name, header, plan, on_tensor)
        yield Written(
            file=file,
            nbytes=file.stat().st_size,
            kinds=dict(Counter(planned.kind for planned in plan)),
            kept=tuple(p.tensor.name for p in plan if p.kind == "F32" != kind.upper() and len(p.tensor.shape) > 1),
            hashes={planned.tensor.name: hashes[planned.name] for planned in plan},
            resumed=store.resumed,
        )
        file.replace(out)
        sync(out.absolute().parent)


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


@contextmanager
def _full_disk_is_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"{out}: disk full or file too large while writing ({os.strerror(error.errno)})",
                "Free some space, or choose an output on another disk",
            ) from None
        raise
