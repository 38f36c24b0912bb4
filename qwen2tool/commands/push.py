"""`qwen2tool push`."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    path: Annotated[Path, typer.Argument(help="Merged checkpoint or adapter folder.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, send nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created where it does not exist.")] = None,
    card: Annotated[Path | None, typer.Option(help="Model card to send instead of a generated one.")] = None,
) -> None:
    """Check a checkpoint or adapter, upload it in one commit, read it back. Token: HF_TOKEN or `hf auth login`."""
    from qwen2tool.hub.plan import plan_push
    from qwen2tool.hub.show import print_plan

    plan = plan_push(path, repo, card=card)
    print_plan(plan)
    if dry_run:
        return
    from qwen2tool.console import say
    from qwen2tool.hub.push import push as run

    result = run(plan, private=private, revision=revision)
    say(f"pushed: {result.url} at {result.commit}")
    for name in result.removed:
        say(f"removed, from an earlier push: {name}")
