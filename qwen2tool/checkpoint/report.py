"""`inspect`: what a checkpoint is, and whether anything is wrong with it, q/k/v biases first.

A reader of the files answers this in less than a second from headers, config, tokenizer files and the biases' numbers,
without torch; with `values` every tensor is read once as well. Of a model on the Hub only headers are read. The verdict
is about layout: which architecture the *tensors* are, whatever config.json claims. It is one of

    qwen2 | qwen2 with missing biases | llama layout with qwen2 biases | llama layout without biases | not qwen2 (why)

Findings make the checkpoint unusable or wrong for some reader; notes are harmless, and so is the hazard of a sound
checkpoint whose biases stock attention cannot bear. The exit code is 0 for a verdict of `qwen2` without findings,
else 1.

`Report.to_json()` is a plain dict, documented key by key in docs/inspect-schema.md; keys are only ever added while
`schema_version` stays 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint import facts
from qwen2tool.checkpoint.biases import bias_name, read_biases, stats_by_layer
from qwen2tool.checkpoint.folder import HUB_ID, Checkpoint, open_checkpoint
from qwen2tool.checkpoint.hazard import hazard_section
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.inventory import QKV, take_inventory
from qwen2tool.checkpoint.judge import Judgement, judge
from qwen2tool.checkpoint.needs import memory_section
from qwen2tool.checkpoint.raw import differ_somewhere
from qwen2tool.checkpoint.side_files import side_sections
from qwen2tool.errors import EXIT_FINDING, UserError

if TYPE_CHECKING:
    from qwen2tool.checkpoint.biases import Vectors

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; `sections` are the parts of `to_json()` from `geometry` on."""

    checkpoint: Checkpoint
    judgement: Judgement
    sections: dict[str, Any]
    numbers: Vectors | None = field(repr=False)
    """The biases themselves, where they were read."""

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def verdict(self) -> str:
        return self.judgement.verdict

    @property
    def headline(self) -> str:
        return self.judgement.headline

    @property
    def findings(self) -> tuple[str, ...]:
        return self.judgement.findings

    @property
    def notes(self) -> tuple[str, ...]:
        return self.judgement.notes

    @property
    def hazard(self) -> str | None:
        """A sentence on what stock attention does with these biases, None where nothing."""
        section = self.sections["hazard"]
        return None if section is None else section["sentence"]

    @property
    def exit_code(self) -> int:
        return EXIT_FINDING if self.verdict != "qwen2" or self.findings else 0

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON values; docs/inspect-schema.md lists the keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "checkpoint",
            "path": str(self.path),
            "verdict": self.verdict,
            "headline": self.headline,
            "exit_code": self.exit_code,
            "findings": list(self.findings),
            "notes": list(self.notes),
            **self.sections,
        }


def inspect_checkpoint(path: str | Path, values: bool = False, revision: str | None = None) -> Report:
    """Inspects the checkpoint at `path`: a folder, a file, or owner/name on the Hub (headers only, at `revision`).

    With `values` every tensor is read, not the biases alone.

    Raises:
        UserError: no checkpoint, one whose files are damaged or disagree with their index, or `values` of a remote one.
    """
    checkpoint = open_anywhere(path, revision)
    if values and checkpoint.commit is not None:
        raise UserError(
            f"{path}: on the Hub, where no tensor is read", f"Leave --values out, or download it: hf download {path}"
        )
    numbers = read_biases(checkpoint)
    sections = _sections(checkpoint, numbers)
    tables = _tied_tables(checkpoint)
    if tables is not None and differ_somewhere(*tables):
        sections["head"]["lm_head"] = "different"
    if values:
        _add_values(checkpoint, sections)
    return Report(checkpoint=checkpoint, judgement=judge(sections), sections=sections, numbers=numbers)


def open_anywhere(path: str | Path, revision: str | None = None) -> Checkpoint:
    """A local checkpoint, or the headers of one on the Hub where nothing local has that name.

    Raises:
        UserError: neither, or damage.
    """
    if HUB_ID.fullmatch(str(path)) and not Path(path).expanduser().exists():
        from qwen2tool.checkpoint.remote import open_remote

        return open_remote(str(path), revision)
    return open_checkpoint(path, revision=revision)


def _sections(checkpoint: Checkpoint, numbers: Vectors | None) -> dict[str, Any]:
    found = take_inventory(checkpoint)
    biases = facts.biases_section(checkpoint, found)
    if numbers is not None:
        stats = stats_by_layer(numbers)
        named = [(bias_name(layer, p), s) for layer, row in stats.items() for p, s in row.items() if p in QKV]
        biases |= {
            "read": True,
            "stats": {str(layer): {p: s.to_json() for p, s in row.items()} for layer, row in stats.items()},
            "zero": [name for name, s in named if s.all_zero],
            "not_finite": [name for name, s in named if s.nan or s.inf],
        }
    parameters = facts.parameters_section(checkpoint)
    damaged = dict(checkpoint.damaged)
    side = side_sections(checkpoint, damaged)
    return {
        "geometry": facts.geometry_section(checkpoint),
        "config": facts.config_section(checkpoint),
        "parameters": parameters,
        "tensors": facts.tensors_section(checkpoint, found),
        "files": facts.files_section(checkpoint) | {"damaged": damaged},
        "rope": facts.rope_section(checkpoint),
        "sliding": facts.sliding_section(checkpoint),
        "head": facts.head_section(checkpoint),
        "quantization": facts.quantization_section(checkpoint),
        **side,
        "biases": biases,
        "hazard": hazard_section(checkpoint.geometry, numbers),
        "memory": memory_section(checkpoint.geometry, parameters["total"], checkpoint.nbytes),
        "values": None,
    }


def _add_values(checkpoint: Checkpoint, sections: dict[str, Any]) -> None:
    """Reads the tensors: fills `values`, and says of a tied head's copy whether it is one."""
    from qwen2tool.checkpoint.values import measure, summarise

    sections["values"] = summarise(checkpoint, measure(checkpoint))
    tables = _tied_tables(checkpoint)
    if tables is not None and sections["head"]["lm_head"] != "different":
        from qwen2tool.checkpoint.reader import same_data

        sections["head"]["lm_head"] = "equal" if same_data(*tables) else "different"


def _tied_tables(checkpoint: Checkpoint) -> tuple[TensorInfo, TensorInfo] | None:
    """Head and embedding of a tied model that stores both here."""
    head, table = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if checkpoint.geometry.tie_word_embeddings and checkpoint.commit is None and head and table:
        return head, table
    return None
