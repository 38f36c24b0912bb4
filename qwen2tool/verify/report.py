"""What a comparison found, stage by stage; `to_json` is the documented form (schema_version 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def worst(self) -> list[TensorComparison]:
        """Tensors that differ beyond a rounding, the furthest off first; biases before matrices."""
        different = [tensor for tensor in self.tensors if tensor.kind == "different"]
        return sorted(different, key=lambda t: (not t.is_vector, -t.relative_error))

    def to_json(self) -> dict[str, Any]:
        """Keys: schema_version, reference, candidate, adapter, verdict, exit_code, reason, inventory, tensors (counts
        by kind and the worst by name), biases (sentences), logits and floor (see LogitFigures), floor_of, notes,
        environment."""
        return {
            "schema_version": 1,
            "reference": self.reference,
            "candidate": self.candidate,
            "adapter": self.adapter,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "inventory": asdict(self.inventory),
            "tensors": {
                "counts": dict(count_kinds(self.tensors)),
                "worst": [asdict(tensor) for tensor in self.worst[:LISTED]],
            },
            "biases": self.biases,
            "logits": self.figures.to_json() if self.figures else None,
            "floor": self.floor.to_json() if self.floor else None,
            "floor_of": self.floor_of,
            "notes": list(self.notes),
            "environment": self.environment,
        }
