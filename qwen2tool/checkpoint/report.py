"""`inspect`: what a checkpoint is, and whether anything is wrong with it, q/k/v biases first.

A reader of the files answers this in a quarter of a second from headers, config and tokenizer files, without torch;
with `values` every tensor is read once as well. The verdict is about layout: which architecture the *tensors* are,
whatever config.json claims. It is one of

    qwen2 | qwen2 with missing biases | llama layout with qwen2 biases | llama layout without biases | not qwen2 (why)

Findings make the checkpoint unusable or wrong for some reader; notes are harmless. The exit code is 0 for a verdict of
`qwen2` without findings, else 1.

`Report.to_json()` is a plain dict; keys are only ever added while `schema_version` stays 1:

    schema_version  1
    path, verdict, exit_code, findings [sentence], notes [sentence]
    geometry        model_type, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
                    num_key_value_heads, group_size, head_dim, vocab_size, max_position_embeddings, rms_norm_eps, dtype,
                    attention_bias
    parameters      total, without_embedding (neither table nor head); a tied head counts once, packed weights by shape
    tensors         count, has_layers, dtypes {name: {tensors, numbers}}, missing [name],
                    extra [name], misshapen {name: {found, expected}}
    files           bytes, shards [{name, bytes, tensors}], index (consistent | none), declared_bytes (of the index, or
                    null), tensor_bytes, leftovers [file]
    rope            theta, scaling (object or null), spelled_in [rope_theta, rope_parameters],
                    disagreement (sentence or null)
    sliding         use_sliding_window, sliding_window, max_window_layers (as written), layers [those that slide]
    head            tied, lm_head (absent | present; with values equal | different for a tied one)
    quantization    config (object or null), evidence {format: tensors}
    tokenizer       null, or file, count, rows_needed (highest id + 1), vocabulary_rows
    chat_template   file or null
    generation_config   true | false
    biases          expected, present, missing, extra ["layer.projection"], layers {layer: {projection: state}}
    values          null, or
        biases      {layer: {q, k, v: stats}}; stats = l2, max_abs (both over finite entries), zero_fraction, nan, inf
        matrices    stats of all of them together, count, worst [{name, ...stats}]
        not_finite, beyond_fp16, zero_biases, zero_weights   [name]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint import facts
from qwen2tool.checkpoint.folder import Checkpoint, open_checkpoint
from qwen2tool.checkpoint.inventory import Inventory, take_inventory
from qwen2tool.checkpoint.judge import Judgement, judge
from qwen2tool.errors import EXIT_FINDING

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; `sections` are the parts of `to_json()` from `geometry` on."""

    path: Path
    judgement: Judgement
    sections: dict[str, Any]

    @property
    def verdict(self) -> str:
        return self.judgement.verdict

    @property
    def findings(self) -> tuple[str, ...]:
        return self.judgement.findings

    @property
    def notes(self) -> tuple[str, ...]:
        return self.judgement.notes

    @property
    def exit_code(self) -> int:
        return EXIT_FINDING if self.verdict != "qwen2" or self.findings else 0

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON values; the module docstring lists the keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "findings": list(self.findings),
            "notes": list(self.notes),
            **self.sections,
        }


def inspect_checkpoint(path: str | Path, values: bool = False) -> Report:
    """Inspects the checkpoint at `path` (a folder, or a Hub id); with `values` its tensors are read as well.

    Raises:
        UserError: not a safetensors checkpoint, or one whose files are damaged or disagree with their index.
    """
    checkpoint = open_checkpoint(path)
    found = take_inventory(checkpoint)
    sections = _sections(checkpoint, found)
    if values:
        _add_values(checkpoint, sections)
    return Report(path=checkpoint.path, judgement=judge(sections), sections=sections)


def _sections(checkpoint: Checkpoint, found: Inventory) -> dict[str, Any]:
    return {
        "geometry": facts.geometry_section(checkpoint),
        "parameters": facts.parameters_section(checkpoint),
        "tensors": facts.tensors_section(checkpoint, found),
        "files": facts.files_section(checkpoint),
        "rope": facts.rope_section(checkpoint),
        "sliding": facts.sliding_section(checkpoint),
        "head": facts.head_section(checkpoint),
        "quantization": facts.quantization_section(checkpoint),
        "tokenizer": facts.tokenizer_section(checkpoint),
        "chat_template": facts.chat_template(checkpoint.path),
        "generation_config": (checkpoint.path / "generation_config.json").is_file(),
        "biases": facts.biases_section(checkpoint, found),
        "values": None,
    }


def _add_values(checkpoint: Checkpoint, sections: dict[str, Any]) -> None:
    """Reads the tensors: fills `values`, and says of a tied head's copy whether it is one."""
    from qwen2tool.checkpoint.values import measure, same_data, summarise

    sections["values"] = summarise(measure(checkpoint))
    head = checkpoint.tensors.get("lm_head.weight")
    table = checkpoint.tensors.get("model.embed_tokens.weight")
    if checkpoint.geometry.tie_word_embeddings and head is not None and table is not None:
        sections["head"]["lm_head"] = "equal" if same_data(head, table) else "different"
