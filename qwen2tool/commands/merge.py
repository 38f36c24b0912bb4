"""`qwen2tool merge`."""

from pathlib import Path
from typing import Annotated

import typer

from qwen2tool.commands.common import Json, Overwrite, choice, print_json


def merge(
    base: Annotated[str, typer.Argument(help="16- or 32-bit base checkpoint: folder or Hub id.")],
    adapter: Annotated[Path, typer.Argument(help="LoRA adapter in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged checkpoint.")],
    dtype: Annotated[str, typer.Option(help="keep, float32, float16 or bfloat16.")] = "keep",
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge onto a base that the adapter was not trained on.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base, tensor by tensor; untouched tensors stay byte-identical."""
    from qwen2tool.merge.report import print_report
    from qwen2tool.merge.run import merge as run

    report = run(
        base,
        adapter,
        out,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
        dtype=choice("--dtype", dtype, ("keep", "float32", "float16", "bfloat16")),
    )
    print_json(report.to_json()) if as_json else print_report(report)
