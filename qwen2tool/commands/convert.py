"""`qwen2tool convert`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from qwen2tool.commands.common import Json, Overwrite, choice, print_json
from qwen2tool.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: folder, .safetensors, .bin or .gguf file, or Hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder; with --to gguf a new file.")],
    to: Annotated[
        str, typer.Option(help="qwen2 (safetensors folder), llama (Llama's layout), nf4 (bitsandbytes) or gguf.")
    ] = "qwen2",
    dtype: Annotated[str, typer.Option(help="keep, float32, float16 or bfloat16.")] = "keep",
    gguf_type: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0: matrices of a GGUF.")] = "f16",
    max_shard_size: Annotated[str, typer.Option(help="Data in one file at most: 5GB, 500MB.")] = "5GB",
    biases_from: Annotated[
        str | None, typer.Option(help="The original of a copy that lost its q/k/v biases: take them from here.")
    ] = None,
    drop_biases: Annotated[
        bool, typer.Option("--drop-biases", help="Leave the q/k/v biases out (--to llama, --allow-lossy).")
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Let numbers be lost; measure the damage and write it down.")
    ] = False,
    tie_head: Annotated[
        bool, typer.Option("--tie-head", help="One table again of a GGUF that stores a tied head in another rounding.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Qwen (1): positions to claim; refused where they could not be exact.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to another layout, dtype or format: lossless, or refused; a killed run goes on."""
    from qwen2tool.convert.report import print_report
    from qwen2tool.convert.run import Options
    from qwen2tool.convert.run import convert as run

    options = Options(
        to=choice("--to", to, ("qwen2", "llama", "nf4", "gguf")),
        dtype=choice("--dtype", dtype, ("keep", "float32", "float16", "bfloat16")),
        gguf_type=choice("--gguf-type", gguf_type, ("f32", "f16", "bf16", "q8_0")),
        max_shard_bytes=_bytes(max_shard_size),
        drop_biases=drop_biases,
        allow_lossy=allow_lossy,
        tie_head=tie_head,
        max_length=max_length,
    )
    report = run(source, out.expanduser(), options, biases_from=biases_from, revision=revision, overwrite=overwrite)
    print_json(report.to_json()) if as_json else print_report(report)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT][bB])?", text.strip())
    count = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if count < 1:
        raise UserError(f"--max-shard-size is {text!r}", "Give a size such as 5GB or 500MB")
    return count
