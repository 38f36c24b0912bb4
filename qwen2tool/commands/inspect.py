"""`qwen2tool inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen2tool.commands.common import Json, print_json
from qwen2tool.errors import UserError


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint: folder, .safetensors, .bin or .gguf file, adapter folder or Hub id; or several."
        ),
    ],
    values: Annotated[
        bool, typer.Option("--values", help="Read every tensor, not the biases alone: NaN, Inf, zeros, range.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the norms of the q/k/v biases by layer into this .png (one checkpoint)."),
    ] = None,
    as_json: Json = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the .png of --plot.")] = False,
) -> int:
    """Say what a checkpoint is and whether it is whole, q/k/v biases first.

    Exit code 0 sound, 1 something is wrong (or no Qwen2), 2 not to be read. Several are set side by side. Of a Hub id
    only headers are read.
    """
    from qwen2tool.checkpoint.report import Report

    if plot is not None:
        from qwen2tool.checkpoint.plot import require_target

        if len(paths) > 1:
            raise UserError(f"--plot draws one checkpoint, not {len(paths)}", "Name one")
        require_target(plot, overwrite)
    reports = [_one(path, values, revision) for path in paths]
    models = [report for report in reports if isinstance(report, Report)]
    if len(models) < len(reports) and (len(reports) > 1 or plot is not None):
        adapter = next(path for path, report in zip(paths, reports, strict=True) if not isinstance(report, Report))
        raise UserError(f"{adapter}: an adapter, which has no biases to compare or draw", "Inspect it alone")
    if plot is not None:
        from qwen2tool.checkpoint.plot import plot_biases

        plot_biases(models[0], plot, overwrite)
    if len(models) > 1:
        _show_several(models, as_json)
    else:
        _show(reports[0], as_json)
    return max(int(report.exit_code) for report in reports)


def _one(path: str, values: bool, revision: str | None) -> Any:
    """The report on a checkpoint or on an adapter, here or on the Hub."""
    from qwen2tool.checkpoint.adapter_parts import is_adapter
    from qwen2tool.checkpoint.folder import HUB_ID, resolve
    from qwen2tool.checkpoint.report import inspect_checkpoint

    here = Path(path).expanduser()
    folder = here if here.exists() and is_adapter(here) else None
    if HUB_ID.fullmatch(path) and not here.exists():
        from qwen2tool.checkpoint.remote import is_remote_adapter

        folder = resolve(path, revision) if is_remote_adapter(path, revision) else None
    if folder is None:
        return inspect_checkpoint(path, values, revision)
    from qwen2tool.checkpoint.adapter_report import inspect_adapter

    return inspect_adapter(folder, values)


def _show(report: Any, as_json: bool) -> None:
    from qwen2tool.checkpoint.report import Report

    if as_json:
        print_json(report.to_json())
    elif isinstance(report, Report):
        from qwen2tool.checkpoint.show import print_report

        print_report(report)
    else:
        from qwen2tool.checkpoint.adapter_show import print_adapter

        print_adapter(report)


def _show_several(reports: Any, as_json: bool) -> None:
    from qwen2tool.checkpoint.side_by_side import print_side_by_side, to_json

    if as_json:
        print_json(to_json(reports))
    else:
        print_side_by_side(reports)
