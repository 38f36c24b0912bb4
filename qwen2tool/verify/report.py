"""What a comparison found, level by level; `to_json` is the documented form (schema_version 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, isnan
from typing import TYPE_CHECKING, Any

from qwen2tool.errors import EXIT_FINDING, EXIT_UNUSABLE
from qwen2tool.verify.inventory import InventoryComparison
from qwen2tool.verify.layer_figures import Beyond, LayerFigures, first_beyond
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison, count_kinds
from qwen2tool.verify.verdict import Verdict

if TYPE_CHECKING:
    from qwen2tool.verify.diagnose import Diagnosis

SCHEMA = 2
EXIT_CODES: dict[Verdict, int] = {"equivalent": 0, "different": EXIT_FINDING, "undecided": EXIT_UNUSABLE}
LISTED = 8
"""Tensors that are listed by name; the rest are counted."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Verdict and figures.

    Attributes:
        reference, candidate, adapters: as they were named; `kinds` says what each side is read from.
        adapter_on: what carries the reference's adapters, "16bit" or "nf4"; None without adapters.
        diagnoses: what is known by its pattern, in words.
        dtype: what the model is meant to run in.
        layers: empty where nothing could run.
        figures: the candidate's logits against the reference's; None where nothing could run.
        floors: the reference's own noise, run by run (what differs -> figures).
        tolerance: the mean KLD that was allowed instead of the noise.
        generations, tasks: the behavioural levels, as plain values; None unless asked for.
    """

    reference: str
    candidate: str
    adapters: tuple[str, ...]
    adapter_on: str | None
    kinds: tuple[str, str]
    verdict: Verdict
    reason: str
    diagnoses: list[Diagnosis]
    inventory: InventoryComparison
    tensors: list[TensorComparison]
    biases: list[str]
    dtype: str
    layers: list[LayerFigures]
    figures: LogitFigures | None
    floors: dict[str, LogitFigures]
    tolerance: float | None
    notes: tuple[str, ...]
    environment: dict[str, str]
    seconds: float
    generations: Any = None
    tasks: Any = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def floor(self) -> LogitFigures | None:
        """The noise that the verdict is measured by."""
        return largest(self.floors)

    @property
    def floor_of(self) -> str:
        """What was run as noise: "bfloat16 against float32"."""
        return next(iter(self.floors), "")

    @property
    def first_beyond(self) -> Beyond | None:
        """Where the candidate first does something else than the reference on the same input."""
        return first_beyond(self.layers, self.dtype)

    @property
    def worst(self) -> list[TensorComparison]:
        """Tensors that differ beyond a rounding, the furthest off first; biases before matrices."""
        different = [tensor for tensor in self.tensors if tensor.kind == "different"]
        return sorted(different, key=lambda t: (not t.is_vector, not isnan(t.relative_error), -t.relative_error))

    def to_json(self) -> dict[str, Any]:
        """What docs/verify-schema.md describes; what is not finite is null."""
        beyond = self.first_beyond
        return {
            "schema_version": SCHEMA,
            "reference": self.reference,
            "candidate": self.candidate,
            "adapters": list(self.adapters),
            "adapter_on": self.adapter_on,
            "kinds": dict(zip(("reference", "candidate"), self.kinds, strict=True)),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "diagnoses": [plain(asdict(diagnosis)) for diagnosis in self.diagnoses],
            "inventory": asdict(self.inventory),
            "tensors": {
                "counts": dict(count_kinds(self.tensors)),
                "one_off": sum(tensor.one_off for tensor in self.tensors),
                "different": [tensor.name for tensor in self.worst],
                "worst": [plain(asdict(tensor)) for tensor in self.worst[:LISTED]],
            },
            "biases": self.biases,
            "dtype": self.dtype,
            "layers": [plain(asdict(layer)) for layer in self.layers],
            "first_beyond": plain(beyond._asdict()) if beyond else None,
            "logits": self.figures.to_json() if self.figures else None,
            "floor": self.floor.to_json() if self.floor else None,
            "floor_of": self.floor_of,
            "floors": {name: floor.to_json() for name, floor in self.floors.items()},
            "tolerance": self.tolerance,
            "notes": list(self.notes),
            "environment": self.environment,
            "seconds": self.seconds,
            "generations": self.generations,
            "tasks": self.tasks,
        }


def largest(floors: Mapping[str, LogitFigures]) -> LogitFigures | None:
    """The noise run that is furthest from the truth; one that is not finite comes before all others."""
    return max(floors.values(), key=lambda f: f.kld_mean if f.finite else inf, default=None)


def plain(value: Any) -> Any:
    """JSON has no NaN and no Infinity: null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
