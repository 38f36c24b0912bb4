"""`qwen2tool demo`."""

from pathlib import Path
from typing import Annotated

import typer

from qwen2tool.commands.common import Overwrite


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where everything is left to look at.")] = Path(
        "qwen2tool-demo"
    ),
    model: Annotated[str | None, typer.Option(help="Another checkpoint than the bundled tiny-qwen2.")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Inspect, SFT, DPO, merge, verify and prepare for the Hub, on a small trained Qwen2; minutes on two CPU cores."""
    from qwen2tool.demo.run import run_demo

    return run_demo(folder, model, overwrite=overwrite)
