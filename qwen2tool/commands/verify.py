"""`qwen2tool verify-equivalence`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen2tool.commands.common import CPU_OR_GPU, Json, choice, device_of, print_json
from qwen2tool.errors import UserError

Adapters = list[Path] | None


def verify_equivalence(
    reference: Annotated[
        str, typer.Argument(help="The model that is right: folder, file, adapter's folder or Hub id.")
    ],
    candidate: Annotated[
        str | None, typer.Argument(help="The model in question, of the same kinds; none with --routes.")
    ] = None,
    adapter: Annotated[
        Adapters, typer.Option(help="Compare with REFERENCE + this LoRA adapter; several in order.")
    ] = None,
    adapter_on: Annotated[str, typer.Option(help="16bit, or nf4: the function that QLoRA trained.")] = "16bit",
    candidate_adapter: Annotated[
        Adapters, typer.Option(help="CANDIDATE is a base: add this LoRA adapter; several in order.")
    ] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="No CANDIDATE: REFERENCE's fused layers against transformers' own.")
    ] = False,
    quantize: Annotated[str, typer.Option(help="With --routes: none, or nf4 as in train.")] = "none",
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Compare gradients of LoRA and of each layer's input too.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Mean KLD that is allowed instead of the reference's own noise.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Plain text to compare on; without --text and --data, bundled chats.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Instruction records to compare on, answers scored.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens in all.")] = 4096,
    device: Annotated[str, typer.Option(help=CPU_OR_GPU)] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="What the model runs in, auto (as stored), float32, float16 or bfloat16: its noise is the bar."
        ),
    ] = "auto",
    generate: Annotated[
        int, typer.Option(min=0, help="Compare greedy continuations of so many tokens; loads whole models.")
    ] = 0,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Score both on these lm-eval tasks (extra eval); loads whole models.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report as a page, OUT.html.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="A folder for what is finished: after a kill the same command goes on there.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Prove that two checkpoints are the same function, or that the fast path computes what transformers does.

    Exit code 0 equivalent, 1 different, 2 undecided or not to be read.
    """
    choice("--adapter-on", adapter_on, ("16bit", "nf4"))
    nf4 = choice("--quantize", quantize, ("none", "nf4")) == "nf4"
    runs_in = choice("--dtype", dtype, ("auto", "float32", "float16", "bfloat16"))
    _require_one_question(candidate, routes, adapter_on, nf4)
    if report is not None and (report.is_dir() or not report.parent.is_dir()):  # before the work, not after it
        raise UserError(f"--report {report}: cannot be written", "Name a file in a folder that exists")
    asked: dict[str, Any] = {
        "candidate_adapter": candidate_adapter,
        "gradients": gradients,
        "tolerance": tolerance,
        "work": work,
        "generate": generate,
        "tasks": tasks or (),
    }
    samples, tokenizer = _read_text(reference, candidate, text, data, max_length)
    common: dict[str, Any] = {
        "device": device_of(device),
        "dtype": None if runs_in == "auto" else runs_in,
        "max_tokens": max_tokens,
    }
    if candidate is None:
        _require_none(asked | {"report": report})
        return _verify_routes(reference, samples, adapter or [], nf4=nf4, as_json=as_json, **common)
    from qwen2tool.verify.run import verify
    from qwen2tool.verify.show import print_report

    sides: dict[str, Any] = {"adapter": adapter, "adapter_on": adapter_on}
    found = verify(reference, candidate, samples, tokenizer=tokenizer, **sides, **asked, **common)
    print_json(found.to_json()) if as_json else print_report(found)
    if report is not None:  # last: a disk that filled up meanwhile must not cost the figures
        from qwen2tool.verify.page import write_page

        write_page(found, report)
    return found.exit_code


def _read_text(
    reference: str, candidate: str | None, text: Path | None, data: Path | None, max_length: int
) -> tuple[Any, Any]:
    """(samples, tokenizer), the tokenizer of the first side that has one."""
    from qwen2tool.checkpoint.load import load_tokenizer
    from qwen2tool.data.choose import choose_samples
    from qwen2tool.verify.sides import tokenizer_folder

    with tokenizer_folder(reference, candidate or reference) as folder:
        return choose_samples(folder, text, data, max_length), load_tokenizer(folder)


def _require_none(asked: dict[str, Any]) -> None:
    """Passes if nothing is asked for that needs two sides."""
    for name, value in asked.items():
        if value or (name == "tolerance" and value is not None):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is about a CANDIDATE", "With --routes leave it out; gradients are compared there")


def _verify_routes(reference: str, samples: Any, adapters: list[Path], *, as_json: bool, **options: Any) -> int:
    if len(adapters) > 1:
        raise UserError(f"--routes takes one --adapter, not {len(adapters)}", "Name the one to train on")
    from qwen2tool.checkpoint.folder import resolve
    from qwen2tool.verify.route_show import print_routes
    from qwen2tool.verify.routes import verify_routes

    found = verify_routes(resolve(reference), samples, adapter=adapters[0] if adapters else None, **options)
    print_json(found.to_json()) if as_json else print_routes(found)
    return found.exit_code


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
