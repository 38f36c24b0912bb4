"""`qwen2tool verify-equivalence`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen2tool.commands.common import CPU_OR_GPU, Json, choice, device_of, print_json
from qwen2tool.errors import UserError


def verify_equivalence(
    reference: Annotated[str, typer.Argument(help="The checkpoint that is right: folder or Hub id.")],
    candidate: Annotated[str | None, typer.Argument(help="The checkpoint in question.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Compare with REFERENCE + this LoRA adapter.")] = None,
    adapter_on: Annotated[str, typer.Option(help="16bit, or nf4: the function that QLoRA trained.")] = "16bit",
    routes: Annotated[
        bool, typer.Option("--routes", help="No CANDIDATE: REFERENCE's fused layers against transformers' own.")
    ] = False,
    quantize: Annotated[str, typer.Option(help="With --routes: none, or nf4 as in train.")] = "none",
    text: Annotated[Path | None, typer.Option(help="Plain text to compare on.")] = None,
    data: Annotated[Path | None, typer.Option(help="Instruction records to compare on, answers scored.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens in all.")] = 4096,
    device: Annotated[str, typer.Option(help=CPU_OR_GPU)] = "auto",
    dtype: Annotated[str, typer.Option(help="What the model is meant to run in: its noise there is the bar.")] = "auto",
    as_json: Json = False,
) -> int:
    """Prove that two checkpoints are the same function, or that the fast path computes what transformers does.

    Exit code 0 equivalent, 1 different, 2 could not tell.
    """
    from qwen2tool.checkpoint.folder import resolve
    from qwen2tool.data.choose import choose_samples

    base = choice("--adapter-on", adapter_on, ("16bit", "nf4"))
    nf4 = choice("--quantize", quantize, ("none", "nf4")) == "nf4"
    runs_in = choice("--dtype", dtype, ("auto", "float32", "float16", "bfloat16"))
    _require_one_question(candidate, routes, base, nf4)
    folder = resolve(reference)
    samples = choose_samples(folder, text, data, max_length)
    common: dict[str, Any] = {
        "adapter": adapter,
        "device": device_of(device),
        "dtype": None if runs_in == "auto" else runs_in,
        "max_tokens": max_tokens,
    }
    from qwen2tool.verify import show

    if candidate is None:
        from qwen2tool.verify.routes import verify_routes

        found = verify_routes(folder, samples, nf4=nf4, **common)
        print_json(found.to_json()) if as_json else show.print_routes(found)
        return found.exit_code
    from qwen2tool.verify.run import verify

    report = verify(folder, resolve(candidate), samples, adapter_on=base, **common)
    print_json(report.to_json()) if as_json else show.print_report(report)
    return report.exit_code


def _require_one_question(candidate: str | None, routes: bool, adapter_on: str, nf4: bool) -> None:
    """Passes flags of either two checkpoints or one checkpoint's routes."""
    if routes and candidate is not None:
        raise UserError("--routes compares REFERENCE with itself", "Leave CANDIDATE out, or --routes")
    if routes and adapter_on != "16bit":
        raise UserError("--adapter-on is nf4, which is about a CANDIDATE", "With --routes pass --quantize nf4")
    if not routes and candidate is None:
        raise UserError("CANDIDATE is missing", "Name the checkpoint in question, or pass --routes")
    if not routes and nf4:
        raise UserError("--quantize is nf4, which goes with --routes", "With a CANDIDATE pass --adapter-on nf4")
