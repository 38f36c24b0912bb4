"""The command line: each command parses, calls one function of a room, prints one result.

Typer reads the annotations at run time, so they are real; everything heavy is imported inside the commands.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qwen2tool import __version__
from qwen2tool.errors import EXIT_UNUSABLE, UserError

app = typer.Typer(
    name="qwen2tool",
    help="Fine-tune, merge and verify Qwen2-architecture models without losing their q, k and v biases.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
CPU_OR_GPU = "auto, cpu or cuda."
INTERRUPTED = 130
SMALLER = "In training lower --batch-size or --max-length, or pass --quantize nf4; else use a larger machine."


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command; a user's error becomes one line on stderr and its exit code, never a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports optional CPU kernels that it does without
    # Renamings between the versions of transformers and peft that we support; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code and says nothing
            _complain("interrupted. A training run that saved checkpoints goes on with --resume.")
    except UserError as error:
        code = _complain(str(error), error.exit_code)
    except OSError as error:
        code = _complain(
            f"{error.filename or 'system'}: {error.strerror or error}. Check the path and its permissions."
        )
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            code = _complain(f"memory ran out ({str(error).splitlines()[0][:120] if str(error) else 'RAM'}). {SMALLER}")
        elif hasattr(error, "format_message"):  # what Typer raises for wrong flags
            code = _complain(f"{error.format_message()} See qwen2tool --help.")
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str, code: int = EXIT_UNUSABLE) -> int:
    from qwen2tool.console import complain

    complain(text)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen2tool {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
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
        _print_json(report.to_json())
    else:
        from qwen2tool.checkpoint.show import print_report

        print_report(report)
    return report.exit_code


@app.command()
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

    nf4 = _choice("--quantize", quantize, ("none", "nf4")) == "nf4"
    checkpoint = open_checkpoint(model)
    from qwen2tool.routing.offline import plan_checkpoint, plan_checkpoint_memory

    plan, memory = plan_checkpoint(checkpoint, adapter, nf4=nf4), None
    if memory_budget is not None:
        sizes = {"tokens": tokens, "length": length, "budget": int(memory_budget * 1e9)}
        memory = plan_checkpoint_memory(checkpoint, adapter, nf4=nf4, **sizes)
    if as_json:
        described = {"memory": memory.describe()} if memory else {}
        _print_json({"layers": plan.counts, "modules": plan.to_json(), **described})
    else:
        from qwen2tool.routing.show import print_memory, print_plan

        print_plan(plan)
        if memory:
            print_memory(memory, assumed=adapter is None)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="Settings file, YAML or JSON; flags override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Base checkpoint: folder or Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="JSON or JSONL of instructions (sft) or preferences (dpo).")] = None,
    output: Annotated[str | None, typer.Option(help="New folder for adapter, metrics and checkpoints.")] = None,
    task: Annotated[str | None, typer.Option(help="sft or dpo.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to continue; in dpo also the reference.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out records, scored before and after.")] = None,
    quantize: Annotated[str | None, typer.Option(help="none (LoRA) or nf4 (QLoRA).")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank. [64]")] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha; the update is scaled by alpha / rank. [16]")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout on the LoRA input. [0.05]")] = None,
    targets: Annotated[str | None, typer.Option(help="Comma-separated linears. [all seven]")] = None,
    beta: Annotated[float | None, typer.Option(help="DPO's beta. [0.1]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [2e-4]")] = None,
    scheduler: Annotated[str | None, typer.Option(help="linear, cosine, constant or constant_with_warmup.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of the steps that warm up. [0]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay. [0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradient clipping. [0.3]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records (pairs in dpo) a forward pass. [4]")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes an optimizer step. [4]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a record; longer ones are cut. [1024]")] = None,
    skip_too_long: Annotated[
        bool | None, typer.Option("--skip-too-long", help="Leave out records whose answer does not fit.")
    ] = None,
    recompute: Annotated[str | None, typer.Option(help="Activations: auto (what fits is kept), all or none.")] = None,
    memory_budget: Annotated[float | None, typer.Option(help="GPU memory for the run, in GB. [what is free]")] = None,
    graphs: Annotated[str | None, typer.Option(help="CUDA graphs: auto or off. [auto]")] = None,
    routes: Annotated[str | None, typer.Option(help="Layers: auto (fused) or reference. [auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help=CPU_OR_GPU)] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapter, data order and dropout. [42]")] = None,
    logging_steps: Annotated[int | None, typer.Option(help="Steps between logs. [1]")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, 0 for none. [0]")] = None,
    save_total_limit: Annotated[int | None, typer.Option(help="Checkpoints kept. [2]")] = None,
    report_to: Annotated[str | None, typer.Option(help="Further trackers: tensorboard, wandb ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA or QLoRA adapter: supervised (sft) or on preferences (dpo)."""
    own = ("config", "resume", "overwrite", "as_json", "own")
    flags = {name: value for name, value in locals().items() if name not in own}
    from qwen2tool.training.settings import load_settings

    settings = load_settings(config, flags)
    from qwen2tool.training.report import print_report
    from qwen2tool.training.run import train as run

    report = run(settings, resume=resume, overwrite=overwrite)
    _print_json(report.to_json()) if as_json else print_report(report)


@app.command()
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
        dtype=_choice("--dtype", dtype, ("keep", "float32", "float16", "bfloat16")),
    )
    _print_json(report.to_json()) if as_json else print_report(report)


@app.command("verify-equivalence")
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

    base = _choice("--adapter-on", adapter_on, ("16bit", "nf4"))
    nf4 = _choice("--quantize", quantize, ("none", "nf4")) == "nf4"
    runs_in = _choice("--dtype", dtype, ("auto", "float32", "float16", "bfloat16"))
    _require_one_question(candidate, routes, base, nf4)
    folder = resolve(reference)
    samples = choose_samples(folder, text, data, max_length)
    common: dict[str, Any] = {
        "adapter": adapter,
        "device": _device(device),
        "dtype": None if runs_in == "auto" else runs_in,
        "max_tokens": max_tokens,
    }
    from qwen2tool.verify import show

    if candidate is None:
        from qwen2tool.verify.routes import verify_routes

        found = verify_routes(folder, samples, nf4=nf4, **common)
        _print_json(found.to_json()) if as_json else show.print_routes(found)
        return found.exit_code
    from qwen2tool.verify.run import verify

    report = verify(folder, resolve(candidate), samples, adapter_on=base, **common)
    _print_json(report.to_json()) if as_json else show.print_report(report)
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


@app.command()
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


@app.command()
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


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise UserError(f"{flag} is {value!r}", f"Give one of {', '.join(choices)}")
    return value


def _device(name: str) -> str:
    _choice("--device", name, ("auto", "cpu", "cuda"))
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no CUDA device", "Use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _print_json(value: Any) -> None:
    from qwen2tool.console import print_json

    print_json(value)
