"""What a training run is told, as one frozen record; read from a YAML or JSON file, from flags, or both.

Imports no torch, so that a wrong key is answered at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from qwen2tool.errors import UserError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run of SFT or DPO with LoRA (`quantize: none`) or QLoRA (`quantize: nf4`).

    Attributes:
        model: folder or Hub id of the base, 16- or 32-bit safetensors.
        data: JSON or JSONL of instructions (sft) or preferences (dpo).
        output: new folder; gets adapter/, checkpoints/, metrics.jsonl, report.json and settings.yaml.
        task: "sft" or "dpo".
        adapter: LoRA adapter to continue; in DPO it is also the reference, as it was. Brings its own rank, alpha,
            dropout and targets.
        eval_data: held-out records of the same shape, scored before and after training.
        quantize: "nf4" holds the frozen linears in NF4 with double quantisation (QLoRA, arXiv 2305.14314).
        rank, alpha, dropout, targets: of the LoRA (arXiv 2106.09685); the update is scaled by alpha / rank.
        beta: strength of DPO's pull towards the reference (arXiv 2305.18290).
        learning_rate, scheduler, warmup_ratio, weight_decay, max_grad_norm: of AdamW; warm-up as a share of all steps.
        epochs, max_steps: how long; `max_steps` wins where it is not None.
        batch_size, gradient_accumulation: records (pairs in DPO) a micro-batch, and micro-batches a step. On a GPU
            a step is cut into passes by tokens instead: the same step, only dropout draws other masks.
        max_length: tokens; longer records are cut at the end.
        skip_too_long: leave out records whose answer does not fit at all, instead of stopping.
        recompute: which activations the backward recomputes: "auto" keeps what `memory_budget` holds.
        memory_budget: GPU memory for the run once the model is loaded, in 10^9 bytes; None: what is free then.
        embedding: "auto" puts the table on the host where memory is short, "host" always (on a GPU, where the head is
            not tied to it).
        graphs: "auto" replays passes from CUDA graphs where all layers are fused, "off" never. A pass has the same bits
            either way; for graphs, passes are filled up to few lengths, and longer products may round otherwise.
        routes: "auto" takes the fused layers, "reference" transformers' own, for comparison.
        dtype: of frozen weights and compute; "auto" is bfloat16 on CUDA (float16 on a GPU without), float32 on the CPU.
        device: "auto" is CUDA where there is one.
        seed: of the adapter's start, the order of the data and dropout.
        logging_steps, save_steps: in optimizer steps; `save_steps` 0 saves no checkpoints on the way.
        save_total_limit: how many checkpoints are kept.
        report_to: further trackers of transformers.Trainer (tensorboard, wandb ...); metrics.jsonl is always written.
    """

    model: str
    data: str
    output: str
    task: Literal["sft", "dpo"] = "sft"
    adapter: str | None = None
    eval_data: str | None = None
    quantize: Literal["none", "nf4"] = "none"
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    targets: tuple[str, ...] | None = None
    beta: float = 0.1
    learning_rate: float = 2e-4
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 4
    max_length: int = 1024
    skip_too_long: bool = False
    recompute: Literal["auto", "all", "none"] = "auto"
    memory_budget: float | None = None
    embedding: Literal["auto", "host"] = "auto"
    graphs: Literal["auto", "off"] = "auto"
    routes: Literal["auto", "reference"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 42
    logging_steps: int = 1
    save_steps: int = 0
    save_total_limit: int = 2
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in ("learning_rate", "epochs", "beta", "max_grad_norm"):
            value = getattr(self, name)
            _require(isfinite(value) and value > 0, name, value, "a number above 0")
        for name in ("batch_size", "gradient_accumulation", "logging_steps", "save_total_limit"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        for name in ("rank", "alpha", "max_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "a whole number from 1")
        budget = self.memory_budget
        _require(budget is None or (isfinite(budget) and budget > 0), "memory_budget", budget, "a number above 0")
        _require(self.max_length >= 2, "max_length", self.max_length, "a whole number from 2")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 to below 1")
        _require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        _require(0 <= self.weight_decay < inf, "weight_decay", self.weight_decay, "a number from 0")
        _require(self.save_steps >= 0, "save_steps", self.save_steps, "a whole number from 0")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")
        if self.scheduler == "constant" and self.warmup_ratio:
            raise UserError("--scheduler constant knows no warm-up", "Use constant_with_warmup, or drop --warmup-ratio")
        self._check_targets()

    def _check_targets(self) -> None:
        _require(self.targets != (), "targets", [], f"some of {', '.join(LINEARS)}")
        for target in self.targets or ():
            _require(target in LINEARS, "targets", target, f"among {', '.join(LINEARS)}")
        if self.adapter is None:
            return
        for name in ("rank", "alpha", "dropout", "targets"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{_flag(name)} and --adapter exclude each other: the adapter has its own", f"Drop {_flag(name)}"
                )

    @property
    def lora_rank(self) -> int:
        return self.rank or 64

    @property
    def lora_alpha(self) -> int:
        return self.alpha or 16

    @property
    def lora_dropout(self) -> float:
        return 0.05 if self.dropout is None else self.dropout

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return self.targets or LINEARS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a settings file holds them; keys that are None are left out."""
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: value for key, value in plain.items() if value is not None}


def load_settings(file: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Settings from `file` (YAML or JSON), overridden by every flag that is not None.

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), missing or wrong value.
    """
    values = _read(file) if file else {}
    known = {field.name: field for field in fields(TrainSettings)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}"
            raise UserError(f"{file}: unknown key {key!r}", hint.rstrip("?."))
    values = {key: value for key, value in (values | present(flags)).items() if value is not None}
    for name, field in known.items():
        if field.default is MISSING and values.get(name) is None:
            raise UserError(f"{_flag(name)} is missing", f"Give {_flag(name)} or set {name!r} in the settings file")
    return TrainSettings(**{key: _coerce(key, value) for key, value in values.items()})


def present(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such settings file", "Check the path")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML or JSON ({str(error)[:120]})", "Repair the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: no settings in it", "Write one 'key: value' a line")
    return values


KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "tuple": ("a list of names", lambda v: tuple(v.split(",")) if isinstance(v, str) else tuple(map(_text, v))),
    "bool": ("true or false", lambda v: _exactly(v, bool)),
    "float": ("a number", lambda v: float(_exactly(v, int, float, str))),
    "int": ("a whole number", lambda v: _exactly(v, int)),
    "str": ("text", lambda v: str(_exactly(v, str))),
}
"""What a field's annotation holds -> (in words, how a value of YAML becomes one: it reads 2e-4 as text)."""


def _coerce(key: str, value: Any) -> Any:
    """The value in the field's type; choices are checked where the record is made."""
    hint = get_type_hints(TrainSettings)[key]
    if get_origin(hint) is Literal:
        return value
    words, convert = next(kind for name, kind in KINDS.items() if name in str(hint))
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise UserError(f"{_flag(key)} is {value!r}", f"Give {words}") from None


def _exactly(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError
    return value


def _text(value: Any) -> str:
    return str(_exactly(value, str))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(passed: bool, name: str, value: object, wanted: str) -> None:
    if not passed:
        raise UserError(f"{_flag(name)} is {value!r}", f"Give {wanted}")
