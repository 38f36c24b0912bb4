"""One training run from settings to adapter: check everything, then load, score, train, score, save.

Nothing is written before the inputs have passed; the adapter appears whole at the end or not at all.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint, require_safetensors
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import load_tokenizer, quiet_transformers
from qwen2tool.checkpoint.writer import require_apart, require_free, write_json
from qwen2tool.console import remark
from qwen2tool.errors import UserError
from qwen2tool.routing.show import needed, print_routes
from qwen2tool.training.batches import bucket
from qwen2tool.training.callbacks import MetricsFile, ProgressBar, StepClock
from qwen2tool.training.dataset import Records, as_samples, read_records
from qwen2tool.training.fast import Plans, cuts, put_on_fast_path
from qwen2tool.training.model import Placement, place, save_adapter, trainable_model
from qwen2tool.training.report import TrainReport, ends, environment, median, peak_memory
from qwen2tool.training.resume import (
    describe_inputs,
    forget_later_metrics,
    keep_inputs,
    require_same_inputs,
    resume_point,
    step_of,
)
from qwen2tool.training.settings import TrainSettings
from qwen2tool.training.tasks import DpoTask, SftTask, Task
from qwen2tool.training.trainer import GuardedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(settings: TrainSettings, *, resume: bool = False, overwrite: bool = False) -> TrainReport:
    """Runs SFT or DPO and leaves adapter/, metrics.jsonl, report.json, settings.yaml (and checkpoints/) in the output.

    Args:
        settings: see TrainSettings.
        resume: go on from the newest complete checkpoint in the output.
        overwrite: replace an output that exists and is a run or the like (see `require_free`).

    Raises:
        UserError: anything in the input that stands in the way, or a loss or gradient that is not finite.
    """
    start, output = time.perf_counter(), Path(settings.output)
    checked = _check(settings, output, resume, overwrite)
    set_seed(settings.seed)
    model = trainable_model(checked.checkpoint, settings, checked.placement)
    plans = _route(model, settings, checked.placement, checked.records)
    kind = SftTask if settings.task == "sft" else DpoTask
    task: Task = kind(settings, model, checked.placement, checked.records, checked.held_out, plans)
    before = task.score()
    _prepare_output(output, settings, checked.inputs, checked.resume_from)
    clock = StepClock()
    arguments = trainer_arguments(settings, checked.placement, output, whole_steps=plans.cut is not None)
    trainer = _make_trainer(task, arguments, output, clock)
    _run(trainer, checked.resume_from)
    trainer.release()
    save_adapter(model, settings.model, checked.inputs["base_fingerprint"], output / "adapter")
    after = task.score()
    _remove_if_empty(output / "checkpoints")
    first, last = ends(list(trainer.step_losses.values()))
    memory, memory_of = peak_memory()
    report = TrainReport(
        task=settings.task,
        output=str(output),
        steps=trainer.state.global_step,
        records=len(checked.records.items),
        skipped=checked.records.skipped,
        cut=checked.records.cut,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        first_loss=first,
        last_loss=last,
        seconds=time.perf_counter() - start,
        tokens=trainer.tokens,
        train_seconds=trainer.seconds,
        step_seconds=median(clock.seconds),
        peak_memory=memory,
        peak_memory_of=memory_of,
        eval_before=before,
        eval_after=after,
        routes=plans.to_json(),
        environment=environment(),
    )
    write_json(output / "report.json", report.to_json())
    return report


class _Checked(NamedTuple):
    """All that a run reads, found sound; `resume_from` is the checkpoint it goes on from."""

    placement: Placement
    checkpoint: Checkpoint
    records: Records
    held_out: Records | None
    inputs: dict[str, Any]
    resume_from: Path | None


def _check(settings: TrainSettings, output: Path, resume: bool, overwrite: bool) -> _Checked:
    """Everything that can be wrong before a model is loaded and anything is written."""
    _require_one_process()
    resume_from = resume_point(output, settings) if resume else None
    if not resume:
        require_free(output, overwrite)
        require_apart(output, *_inputs(settings))
    placement = place(settings)
    _require_trackers(settings)
    checkpoint = open_checkpoint(settings.model)
    require_safetensors(checkpoint)
    require_whole(checkpoint)
    if settings.embedding == "host" and checkpoint.geometry.tie_word_embeddings:
        raise UserError(f"--embedding is host, but {checkpoint.path} ties the head to the table", "Leave it out")
    tokenizer = load_tokenizer(checkpoint.path)
    records, held_out = _read_both(tokenizer, checkpoint, settings)
    for part in filter(None, (records, held_out)):
        _require_known_tokens(part, checkpoint)
    inputs = describe_inputs(checkpoint, settings)
    if resume:
        require_same_inputs(output, inputs)
    return _Checked(placement, checkpoint, records, held_out, inputs, resume_from)


def _route(model: Any, settings: TrainSettings, placement: Placement, records: Records) -> Plans:
    """The model on its routes, which are logged; the largest pass that can come is what memory is planned for."""
    largest = sorted((sum(len(s.ids) for s in as_samples(item)) for item in records.items), reverse=True)
    step = settings.batch_size * settings.gradient_accumulation
    most = bucket(sum(largest[:step]))
    plans = put_on_fast_path(
        model,
        tokens=bucket(sum(largest[: settings.batch_size])),
        length=max(len(s.ids) for item in records.items for s in as_samples(item)),
        dtype=placement.torch_dtype,
        budget=int(settings.memory_budget * 1e9) if settings.memory_budget else None,
        recompute=settings.recompute,
        reference=settings.routes == "reference",
        graphs=settings.graphs == "auto",
        shapes="many",
        cuts=cuts(largest[0], most),
    )
    budget = settings.memory_budget
    if budget and placement.device == "cuda" and plans.memory.estimate > budget * 1e9:
        raise UserError(
            f"--memory-budget is {budget:g} GB, the smallest plan needs about {needed(plans.memory)}",
            "Raise it, lower --max-length, or pass --quantize nf4",
        )
    print_routes(plans.routes, stderr=True)
    remark(f"routes: {plans}")
    return plans


def _remove_if_empty(folder: Path) -> None:
    """The Trainer makes its folder whether or not it saves anything."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _require_one_process() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"WORLD_SIZE is {processes}: several processes would write one output", "Start it as one process"
        )


def _inputs(settings: TrainSettings) -> list[Path]:
    """What the run reads and an output that is replaced must not hold."""
    named = (settings.model, settings.data, settings.adapter, settings.eval_data)
    return [Path(name) for name in named if name and Path(name).exists()]


def _require_trackers(settings: TrainSettings) -> None:
    """Passes trackers that transformers knows and that are installed, before anything is written."""
    try:
        for callback in get_reporting_integration_callbacks(list(settings.report_to)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--report-to {','.join(settings.report_to)}: {error}", "Install it, or drop the flag"
        ) from None


def _require_known_tokens(records: Records, checkpoint: Checkpoint) -> None:
    """Passes records whose every token has a row in the embedding table; a GPU would fail without a word."""
    rows = checkpoint.geometry.vocab_size
    for item in records.items:
        for sample in as_samples(item):
            if max(sample.ids) >= rows:
                raise UserError(
                    f"{records.places[sample.record]}: the tokenizer gives id {max(sample.ids)}, {checkpoint.path} has"
                    f" {rows} rows",
                    "Use the tokenizer that belongs to this model",
                )


def _read_both(
    tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, settings: TrainSettings
) -> tuple[Records, Records | None]:
    records = read_records(tokenizer, Path(settings.data), settings)
    held_out = read_records(tokenizer, Path(settings.eval_data), settings) if settings.eval_data else None
    if records.cut:
        remark(f"note: {records.cut} of {len(records.items)} records are cut at {settings.max_length} tokens")
    trained = checkpoint.geometry.max_position_embeddings
    if settings.max_length > trained:
        remark(f"note: --max-length is {settings.max_length}, the model was made for {trained} positions")
    if records.skipped:
        remark(f"note: {records.skipped} records are left out: nothing of their answer fits")
    return records, held_out


def _prepare_output(
    output: Path, settings: TrainSettings, inputs: dict[str, Any], checkpoint_folder: Path | None
) -> None:
    if checkpoint_folder is None and output.exists():
        shutil.rmtree(output)
    output.mkdir(exist_ok=True)
    if checkpoint_folder is not None:
        forget_later_metrics(output / "metrics.jsonl", step_of(checkpoint_folder))
    text = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    (output / "settings.yaml").write_text(text, encoding="utf-8")
    keep_inputs(output, inputs)


def _make_trainer(task: Task, arguments: TrainingArguments, output: Path, clock: StepClock) -> GuardedTrainer:
    callbacks = [MetricsFile(output / "metrics.jsonl"), ProgressBar(), clock]
    trainer = task.trainer(args=arguments, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)  # ours shows the same figures, on stderr
    return trainer


def trainer_arguments(
    settings: TrainSettings, placement: Placement, output: Path, *, whole_steps: bool
) -> TrainingArguments:
    """The settings as the Trainer has them; with `whole_steps` a batch of its own is all of a step."""
    micro_batches = settings.gradient_accumulation
    options: dict[str, Any] = {
        "max_steps": settings.max_steps or -1,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
    }
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=settings.batch_size * (micro_batches if whole_steps else 1),
        gradient_accumulation_steps=1 if whole_steps else micro_batches,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=placement.dtype == "bfloat16",
        fp16=placement.dtype == "float16",
        use_cpu=placement.device == "cpu",
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run; it is never averaged away
        save_total_limit=settings.save_total_limit,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=placement.device == "cuda",
        **options,
    )


def _run(trainer: GuardedTrainer, checkpoint_folder: Path | None) -> None:
    """The Trainer's loop; the bar is taken away also when it stops half-way."""
    try:
        with quiet_transformers():  # it remarks on file systems and renamings; the guard speaks for itself
            trainer.train(resume_from_checkpoint=str(checkpoint_folder) if checkpoint_folder else None)
    except Exception as error:
        if checkpoint_folder is None or trainer.step_losses or isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{checkpoint_folder}: cannot be resumed from ({reason})", "Delete it to resume from an older one"
        ) from None
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()
