"""What several commands share: flags and their checks, JSON on stdout."""

from typing import Annotated, Any

import typer

from qwen2tool.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
REPLACES = "Replace an output that exists: a file, or a folder that holds a model, adapter, run or demo."
Overwrite = Annotated[bool, typer.Option("--overwrite", help=REPLACES)]
CPU_OR_GPU = "auto, cpu or cuda."


def choice(flag: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise UserError(f"{flag} is {value!r}", f"Give one of {', '.join(choices)}")
    return value


def device_of(name: str) -> str:
    choice("--device", name, ("auto", "cpu", "cuda"))
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no CUDA device", "Use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def print_json(value: Any) -> None:
    from qwen2tool.console import print_json as show

    show(value)
