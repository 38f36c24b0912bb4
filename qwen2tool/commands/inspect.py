"""`qwen2tool inspect`."""

from typing import Annotated

import typer

from qwen2tool.commands.common import Json, print_json


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint folder, or Hub id.")],
    values: Annotated[bool, typer.Option("--values", help="Read the tensors too: norms, zeros, NaN and Inf.")] = False,
    as_json: Json = False,
) -> int:
    """Say what a checkpoint is and whether it is whole, q/k/v biases first. Exit code 1 if something is wrong."""
    from qwen2tool.checkpoint.folder import resolve
    from qwen2tool.checkpoint.report import inspect_checkpoint

    report = inspect_checkpoint(resolve(path), values=values)
    if as_json:
        print_json(report.to_json())
    else:
        from qwen2tool.checkpoint.show import print_report

        print_report(report)
    return report.exit_code
