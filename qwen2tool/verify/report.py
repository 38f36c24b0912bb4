"""What a comparison found, stage by stage; `to_json` is the documented form (schema_version 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite, isnan
from typing import Any

from qwen2tool.errors import EXIT_FINDING, EXIT_UNUSABLE
from qwen2tool.verify.inventory import InventoryComparison
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison, count_kinds
from qwen2tool.verify.verdict import Verdict

EXIT_CODES: dict[Verdict, int] = {"equivalent": 0, "different": EXIT_FINDING, "undecided": EXIT_UNUSABLE}
LISTED = 8
"""Tensors that are listed by name; the rest are counted."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Verdict and figures. `floor` is the reference's own noise, `floor_of` says what was measured as such."""

    reference: str
    candidate: str
    adapter: str | None
    adapter_on: str | None
    verdict: Verdict
    reason: str
    inventory: InventoryComparison
    tensors: list[TensorComparison]
    biases: list[str]
    figures: LogitFigures | None
    floor: LogitFigures | None
    floor_of: str
    notes: tuple[str, ...]
    environment: dict[str, str]
    seconds: float

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def worst(self) -> list[TensorComparison]:
        """Tensors that differ beyond a rounding, the furthest off first; biases before matrices."""
        different = [tensor for tensor in self.tensors if tensor.kind == "different"]
        return sorted(different, key=lambda t: (not t.is_vector, not isnan(t.relative_error), -t.relative_error))

    def to_json(self) -> dict[str, Any]:
        """Keys: schema_version, reference, candidate, adapter, adapter_on, verdict, exit_code, reason, inventory,
        tensors (counts by kind, entries one unit off, all that differ and the worst by name), biases (clauses), logits
        and floor (see LogitFigures), floor_of, notes, environment, seconds. What is not finite is null."""
        return {
            "schema_version": 1,
            "reference": self.reference,
            "candidate": self.candidate,
            "adapter": self.adapter,
            "adapter_on": self.adapter_on,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "inventory": asdict(self.inventory),
            "tensors": {
                "counts": dict(count_kinds(self.tensors)),
                "one_off": sum(tensor.one_off for tensor in self.tensors),
                "different": [tensor.name for tensor in self.worst],
                "worst": [_plain(asdict(tensor)) for tensor in self.worst[:LISTED]],
            },
            "biases": self.biases,
            "logits": self.figures.to_json() if self.figures else None,
            "floor": self.floor.to_json() if self.floor else None,
            "floor_of": self.floor_of,
            "notes": list(self.notes),
            "environment": self.environment,
            "seconds": self.seconds,
        }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no Infinity."""
    return {key: None if isinstance(v, float) and not isfinite(v) else v for key, v in values.items()}
