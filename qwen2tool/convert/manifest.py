"""The manifest of a conversion: what every tensor of the output is, where it came from, and what was lost.

`qwen2tool-convert.json` lies beside the weights. `sha256` is of a tensor's bytes as written; a tensor that was copied
has the same hash in its source, which anyone can check with any reader of either file. Names only, no paths: those of
one machine mean nothing on another.

Schema 1:
    schema, made_by, versions
    source      name, fingerprint, format, kind, lossy, tied_head
    to, dtype, mapping
    config      added, removed, changed (names of keys; old and new values of the changed ones)
    biases      where restored ones came from, or null
    damage      what was lost and what it costs, or null
    tensors     name -> sha256, dtype, shape, how, from (names in the source; a[0/3] is the first third of a's rows),
                source_sha256 (of copied ones)
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen2tool import __version__
from qwen2tool.checkpoint.adapter import fingerprint
from qwen2tool.checkpoint.folder import HUB_ID
from qwen2tool.checkpoint.geometry import Config
from qwen2tool.checkpoint.view import View
from qwen2tool.checkpoint.writer import Slot
from qwen2tool.convert.plan import Job

MANIFEST = "qwen2tool-convert.json"
SCHEMA = 1
PACKAGES = ("torch", "safetensors", "transformers")


def public_name(name: str | Path) -> str:
    """A Hub id as it was given, else the last part of the path."""
    if HUB_ID.fullmatch(str(name)) and not Path(name).exists():
        return str(name)
    return Path(name).expanduser().resolve().name


def describe_source(view: View, name: str | Path) -> dict[str, Any]:
    """The `source` of a manifest."""
    return {
        "name": public_name(name),
        "fingerprint": fingerprint(view.origin),
        "format": view.origin.format,
        "kind": view.kind,
        "lossy": view.lossy,
        "tied_head": view.geometry.tie_word_embeddings,
    }


def config_changes(before: Config, after: Config) -> dict[str, Any]:
    """What became of the keys of config.json."""
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": {
            key: [before[key], after[key]] for key in sorted(before) if key in after and before[key] != after[key]
        },
    }


def make_manifest(
    view: View,
    name: str | Path,
    job: Job,
    hashes: Mapping[str, str],
    *,
    to: str,
    dtype: str,
    biases: dict[str, Any] | None,
    damage: dict[str, Any] | None,
) -> dict[str, Any]:
    """The manifest as plain values."""
    return {
        "schema": SCHEMA,
        "made_by": "qwen2tool convert",
        "versions": {"qwen2tool": __version__, **{package: version(package) for package in PACKAGES}},
        "source": describe_source(view, name),
        "to": to,
        "dtype": dtype,
        "mapping": job.mapping,
        "config": config_changes(view.origin.config, job.config),
        "biases": biases,
        "damage": damage,
        "tensors": {slot.name: _entry(view, job, slot, hashes[slot.name]) for slot in job.slots},
    }


def _entry(view: View, job: Job, slot: Slot, digest: str) -> dict[str, Any]:
    entry = {"sha256": digest, "dtype": slot.dtype, "shape": list(slot.shape), "how": job.how[slot.name]}
    sources = [_stored_name(view, info.name) for info in job.sources[slot.name]]
    if sources:
        entry["from"] = sources
    if job.copied(slot.name):
        entry["source_sha256"] = digest
    return entry


def _stored_name(view: View, name: str) -> str:
    """What the source's own files call a tensor, where that is not its name in a Qwen2."""
    if view.origin.format == "gguf":
        from qwen2tool.convert.gguf_write import gguf_name

        return gguf_name(name)
    if view.origin.geometry.model_type == "qwen":
        from qwen2tool.convert.qwen1 import source_of

        stored, third = source_of(name)
        return stored if third is None else f"{stored}[{third}/3]"
    return name
