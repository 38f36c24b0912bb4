"""`qwen2tool train`."""

from pathlib import Path
from typing import Annotated

import typer

from qwen2tool.commands.common import CPU_OR_GPU, Json, Overwrite, print_json


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
    batch_size: Annotated[int | None, typer.Option(help="Records (pairs in dpo) a micro-batch. [4]")] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches a step; on a GPU a step is cut into passes by tokens. [4]")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a record; longer ones are cut. [1024]")] = None,
    skip_too_long: Annotated[
        bool | None, typer.Option("--skip-too-long", help="Leave out records whose answer does not fit.")
    ] = None,
    recompute: Annotated[str | None, typer.Option(help="Activations: auto (what fits is kept), all or none.")] = None,
    memory_budget: Annotated[
        float | None, typer.Option(help="GPU memory of the loaded run, in GB. [what is free]")
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="Embedding table: auto, or host (pinned). [auto]")] = None,
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
    print_json(report.to_json()) if as_json else print_report(report)
