"""Going on with a run that stopped: only with the run that it was.

Optimizer and schedule come from the checkpoint, model, data and settings from the command. Where the two disagree the
result would be neither run, under the name of one: another base would even get the old adapter stamped as its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from qwen2tool.checkpoint.adapter import ADAPTER_FILE, fingerprint, open_adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.writer import write_json
from qwen2tool.errors import UserError
from qwen2tool.training.settings import TrainSettings

INPUTS = "inputs.json"
MAY_CHANGE = {"output", "device", "logging_steps", "save_steps", "save_total_limit", "report_to"}
"""Settings that do not change what is learned."""


def resume_point(output: Path, settings: TrainSettings) -> Path:
    """The newest complete checkpoint of the run in `output`.

    Raises:
        UserError: there is none, the run is complete, or it had other settings.
    """
    if (output / "adapter").exists():
        raise UserError(f"{output}: the run is complete", "Use its adapter, or start another run")
    found = last_checkpoint(output / "checkpoints")
    if found is None:
        remedy = "Start without --resume, with --save-steps above 0"
        raise UserError(f"{output}: no complete checkpoint to resume from", remedy)
    before = yaml.safe_load((output / "settings.yaml").read_text(encoding="utf-8"))
    now = settings.to_dict()
    for key in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(key) != now.get(key):
            flag = "--" + key.replace("_", "-")
            raise UserError(
                f"{flag} is {now.get(key)!r}, the run had {before.get(key)!r}", "Resume with its own settings"
            )
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; one that a kill cut short has no trainer_state.json yet."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def describe_inputs(base: Checkpoint, settings: TrainSettings) -> dict[str, Any]:
    """What the run reads, so that it can be told from a run that reads something else under the same names.

    Raises:
        UserError: the adapter that the settings name is none.
    """
    files = {"data_sha256": Path(settings.data)}
    if settings.adapter:
        files["adapter_sha256"] = open_adapter(Path(settings.adapter)).path / ADAPTER_FILE
    hashes = {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()}
    return {"base_fingerprint": fingerprint(base), **hashes}


def keep_inputs(output: Path, inputs: dict[str, Any]) -> None:
    """Writes them where `require_same_inputs` looks."""
    write_json(output / INPUTS, inputs)


def require_same_inputs(output: Path, inputs: dict[str, Any]) -> None:
    """Passes a resumed run that reads what it read before.

    Raises:
        UserError: base, data or the adapter it began with changed under the same name.
    """
    before = read_json(output / INPUTS)
    flags = {"base_fingerprint": "--model", "data_sha256": "--data", "adapter_sha256": "--adapter"}
    for key, what in flags.items():
        if before.get(key) != inputs.get(key):
            raise UserError(f"{what} is not what the run in {output} began with", "Resume with the same files")


def forget_later_metrics(file: Path, step: int) -> None:
    """Drops lines beyond `step`: those steps are about to be made again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
