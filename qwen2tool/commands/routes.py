"""`qwen2tool routes`."""

from pathlib import Path
from typing import Annotated

import typer

from qwen2tool.commands.common import Json, choice, print_json


def routes(
    model: Annotated[str, typer.Argument(help="Base checkpoint: folder or Hub id.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter to put on it.")] = None,
    quantize: Annotated[str, typer.Option(help="none, or nf4 as in train.")] = "none",
    memory_budget: Annotated[float | None, typer.Option(help="Add the memory plan for so many GB.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="For that plan: tokens a pass.")] = 4096,
    length: Annotated[int, typer.Option(min=1, help="For that plan: tokens of the longest sequence.")] = 1024,
    as_json: Json = False,
) -> None:
    """Say what runs for each module in training, and why; reads configs and headers, no weights."""
    from qwen2tool.checkpoint.folder import open_checkpoint

    nf4 = choice("--quantize", quantize, ("none", "nf4")) == "nf4"
    checkpoint = open_checkpoint(model)
    from qwen2tool.routing.offline import plan_checkpoint, plan_checkpoint_memory

    plan, memory = plan_checkpoint(checkpoint, adapter, nf4=nf4), None
    if memory_budget is not None:
        sizes = {"tokens": tokens, "length": length, "budget": int(memory_budget * 1e9)}
        memory = plan_checkpoint_memory(checkpoint, adapter, nf4=nf4, **sizes)
    if as_json:
        described = {"memory": memory.describe()} if memory else {}
        print_json({"layers": plan.counts, "modules": plan.to_json(), **described})
    else:
        from qwen2tool.routing.show import print_memory, print_plan

        print_plan(plan)
        if memory and memory_budget is not None:
            print_memory(memory, memory_budget, assumed=adapter is None)
