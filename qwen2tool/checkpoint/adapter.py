"""A PEFT LoRA adapter as files: its pairs, their scaling, and whether they fit a base.

Maths (Hu et al. 2021, arXiv 2106.09685; names and scaling as PEFT writes them): W' = W + s B A with A (rank, in),
B (out, rank), s = alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). Rank and
alpha may differ by module (`rank_pattern`, `alpha_pattern`): the key is a regular expression that must match the end of
the module's name. Whatever else an adapter may hold is refused by name: merging a part of it would be silently wrong.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import torch

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROVENANCE_FILE = "qwen2tool.json"
"""Written by our trainer beside the adapter: which base it belongs to, by fingerprint."""
PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
REFUSED_KEYS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "corda_config",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "lora_ga_config",
)
"""Settings of PEFT's LoraConfig that change what a merge must do."""
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base alone; the others (PiSSA, OLoRA, LoftQ ...) trained beside a changed base."""
REPEAT, NESTED_REPEAT = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")
MAX_REPEATS = 3
"""Of a pattern: each more multiplies the steps of matching a name of 60 characters by up to 60."""
LAYER = re.compile(r"\.layers\.(\d+)\.")
MATRIX_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class LoraPair:
    """One adapted module: A is (rank, in), B is (out, rank); the update of its weight is `scaling` * B @ A."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An opened adapter; `pairs` maps the adapted module (as the base names it) to its pair."""

    path: Path
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    base_fingerprint: str | None


def open_adapter(path: Path) -> Adapter:
    """Opens a plain LoRA adapter in PEFT's format by its headers.

    Raises:
        UserError: not an adapter, another PEFT method, a setting that plain LoRA does not have, an unpaired tensor.
    """
    if not (path / ADAPTER_CONFIG).is_file() or not (path / ADAPTER_FILE).is_file():
        raise UserError(
            f"{path}: not a PEFT adapter (needs {ADAPTER_CONFIG} and {ADAPTER_FILE})",
            "Name the folder that training wrote",
        )
    config = read_json(path / ADAPTER_CONFIG)
    _refuse_other_methods(path, config)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in read_header(path / ADAPTER_FILE).tensors.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        known = match is not None and name.startswith(PREFIX) and len(info.shape) == 2
        if match is None or not known or info.dtype not in MATRIX_DTYPES:
            raise UserError(
                f"{path / ADAPTER_FILE}: {name} is no LoRA A or B matrix",
                "Merge it with the tool that made it: this is no plain LoRA",
            )
        parts.setdefault(match["module"], {})[match["side"]] = info
    pairs = {module: _pair(path, config, module, sides) for module, sides in parts.items()}
    if not pairs:
        raise UserError(f"{path / ADAPTER_FILE}: holds no tensors", "Train the adapter again")
    if passed_over := untargeted(config, pairs):
        more = f" and {len(passed_over) - 1} more modules" if len(passed_over) > 1 else ""
        raise UserError(
            f"{path / ADAPTER_FILE}: adapts {passed_over[0]}{more}, which {ADAPTER_CONFIG} does not target: PEFT "
            "drops such tensors without a word",
            "Keep config and weights of one run together",
        )
    provenance = path / PROVENANCE_FILE
    fingerprint = read_json(provenance).get("base_fingerprint") if provenance.is_file() else None
    return Adapter(path=path, config=config, pairs=pairs, base_fingerprint=fingerprint)


def _refuse_other_methods(path: Path, config: dict[str, Any]) -> None:
    where, remedy = path / ADAPTER_CONFIG, "Only plain LoRA is supported; use PEFT itself for this adapter"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {config.get('peft_type')!r}, not 'LORA'", remedy)
    for key in REFUSED_KEYS:
        if config.get(key):
            raise UserError(f"{where}: {key} is set", remedy)
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {config['bias']!r}: this adapter trained the base's biases", remedy)
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        start = ascii(config["init_lora_weights"])[:40]
        raise UserError(
            f"{where}: init_lora_weights is {start}: this adapter was trained beside a changed base",
            "Convert it to plain LoRA when saving (PEFT's path_initial_model_for_weight_conversion)",
        )
    if config.get("fan_in_fan_out"):
        raise UserError(f"{where}: fan_in_fan_out is set, which no Qwen2 layer needs", remedy)


def _pair(path: Path, config: dict[str, Any], module: str, sides: dict[str, TensorInfo]) -> LoraPair:
    if set(sides) != {"A", "B"}:
        missing = "B" if "A" in sides else "A"
        raise UserError(
            f"{path / ADAPTER_FILE}: {module} has no lora_{missing}", "The adapter is incomplete: copy it again"
        )
    a, b = sides["A"], sides["B"]
    rank = _setting(path, module, config, "r", "rank_pattern")
    alpha = _setting(path, module, config, "lora_alpha", "alpha_pattern")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{path / ADAPTER_FILE}: {module} has rank {a.shape[0]} and {b.shape[1]}, {ADAPTER_CONFIG} says {rank}",
            "Keep config and weights of one run together",
        )
    scaling = alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(module=module, a=a, b=b, scaling=scaling)


def _setting(path: Path, module: str, config: dict[str, Any], key: str, patterns: str) -> float:
    """Rank or alpha of one module; PEFT writes both, so that an absent one is a damaged file and no default."""
    try:
        value = by_pattern(config.get(patterns), module, config.get(key))
    except (AttributeError, TypeError, re.error):
        value = config.get(patterns)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise UserError(
            f"{path / ADAPTER_CONFIG}: {key} of {module} is {ascii(value)[:40]}, not a positive number",
            "Copy the adapter again from where it came from",
        )
    return value


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `module` as PEFT matches it, else `default`.

    Raises:
        re.error: a pattern is no regular expression, or one whose backtracking may never end.
    """
    for pattern, value in (patterns or {}).items():
        if NESTED_REPEAT.search(pattern) or len(REPEAT.findall(pattern)) > MAX_REPEATS:
            raise re.error(f"{pattern[:40]!r} repeats too much")
        if _compiled(rf"(.*\.)?({pattern})$").match(module):
            return value
    return default


def _compiled(pattern: str) -> re.Pattern[str]:
    """`pattern`, without Python's warnings of what a later version may read otherwise: they are nobody's here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(pattern)


def untargeted(config: dict[str, Any], modules: Iterable[str]) -> list[str]:
    """Those of `modules` that PEFT does not adapt by this config, and whose tensors it therefore drops in silence.

    `target_modules` is a list of endings or a pattern, `layers_to_transform` picks layers (PEFT's
    `check_target_module_exists`). What cannot be told (no targets, a pattern that may never end) targets everything.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    listed = [layers] if isinstance(layers, int) else layers
    picked = listed if isinstance(listed, list) and listed and all(isinstance(n, int) for n in listed) else None
    found = []
    for module in modules:
        layer = LAYER.search(module)
        skipped = picked is not None and (layer is None or int(layer[1]) not in picked)
        if skipped or not _matches(targets, module, True) or _matches(excluded, module, False):
            found.append(module)
    return found


def _matches(targets: Any, module: str, unknown: bool) -> bool:
    """Whether a list of endings or a pattern names `module`; `unknown` where it cannot be told."""
    if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        return any(module == name or module.endswith(f".{name}") for name in targets)
    if not isinstance(targets, str) or not targets:
        return unknown
    if targets == "all-linear":
        return module != "lm_head"
    if NESTED_REPEAT.search(targets) or len(REPEAT.findall(targets)) > MAX_REPEATS:
        return unknown
    try:
        return _compiled(targets).fullmatch(module) is not None
    except re.error:
        return unknown


def require_fit(adapter: Adapter, base: Checkpoint, allow_other_base: bool = False) -> None:
    """Passes an adapter whose every pair has a weight of the right shape in `base`, and that was trained on it.

    Raises:
        UserError: a module that the base lacks, another shape, a tied head or table as target, another base.
    """
    for module, pair in adapter.pairs.items():
        weight = base.tensors.get(f"{module}.weight")
        if weight is None:
            raise UserError(
                f"{adapter.path}: adapts {module}, which {base.path} does not have",
                "Use the base that the adapter was trained on",
            )
        adapted = (pair.b.shape[0], pair.a.shape[1])
        if adapted != weight.shape:
            raise UserError(
                f"{adapter.path}: {module} is for a weight of shape {list(adapted)}, {base.path} has "
                f"{list(weight.shape)}",
                "Use the base that the adapter was trained on",
            )
        if module.endswith("embed_tokens") or (module == "lm_head" and base.geometry.tie_word_embeddings):
            raise UserError(
                f"{adapter.path}: adapts {module}, which shares its table or is one",
                "Train the adapter on the linear layers only",
            )
    if adapter.base_fingerprint and not allow_other_base and adapter.base_fingerprint != fingerprint(base):
        trained_on = adapter.config.get("base_model_name_or_path")
        raise UserError(
            f"{adapter.path}: was trained on another base ({trained_on}) than {base.path}",
            "Use that base, or pass --allow-other-base if the two are meant to differ",
        )


def delta(pair: LoraPair) -> torch.Tensor:
    """The update of the module's weight, (out, in) in fp32: scaling * B @ A, from fp32 copies of A and B."""
    from qwen2tool.checkpoint.reader import read_tensor

    return (read_tensor(pair.b).float() @ read_tensor(pair.a).float()) * pair.scaling


def fingerprint(base: Checkpoint, head_bytes: int = 4096) -> str:
    """sha256 that tells two bases of one geometry apart for the price of a few small reads.

    It covers every tensor's name, dtype and shape, all one-dimensional tensors (biases and norms) whole, and the first
    `head_bytes` of each matrix.
    """
    from qwen2tool.checkpoint.raw import raw_chunks

    digest = hashlib.sha256()
    for name, info in sorted(base.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for piece in raw_chunks(info, None if len(info.shape) == 1 else head_bytes):
            digest.update(piece)
    return digest.hexdigest()
