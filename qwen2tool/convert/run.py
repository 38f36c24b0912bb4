"""`convert`: any checkpoint that holds a Qwen2 to another layout, dtype or packing; lossless, or refused.

Plan, write, prove, move: the plan says of each tensor whether it is copied or computed; shards are written one tensor
at a time and survive a kill (`store`); the result is opened as what it claims to be before it takes its name.

Memory: the largest computed tensor; copied ones pass through in pieces of 16 MB.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool import __version__
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.side_files import damaged_side_files
from qwen2tool.checkpoint.view import View
from qwen2tool.checkpoint.writer import (
    atomic_folder,
    copy_side_files,
    plan_shards,
    require_apart,
    require_free,
    write_index,
    write_json,
)
from qwen2tool.console import progress, remark
from qwen2tool.convert.manifest import MANIFEST, make_manifest, public_name
from qwen2tool.convert.plan import Dtype, Job, Target, plan_job
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.report import ConvertReport, report_of
from qwen2tool.convert.restore import Restored, with_biases, zero_bias_warning
from qwen2tool.convert.store import Store, resumable
from qwen2tool.errors import UserError

SHARD_BYTES = 5_000_000_000
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for.

    Attributes:
        to: "qwen2" (a Hugging Face folder), "llama", "nf4" (bitsandbytes), "gguf" (one file).
        dtype: of the output's floats; "keep" leaves each tensor in its own.
        gguf_type: f32, f16, bf16 or q8_0, for the matrices of a GGUF.
        max_shard_bytes: data in one file at most, a larger tensor gets one of its own.
        drop_biases: leave the q/k/v biases out, in Llama's layout; needs `allow_lossy`.
        allow_lossy: let a cast round, or biases go; the damage is measured and written down.
        tie_head: of a GGUF whose one table is stored in two roundings, make one again.
        max_length: of a Qwen (1): positions to claim; refused beyond what it was trained for, if it scales there.
    """

    to: Target = "qwen2"
    dtype: Dtype = "keep"
    gguf_type: str = "f16"
    max_shard_bytes: int = SHARD_BYTES
    drop_biases: bool = False
    allow_lossy: bool = False
    tie_head: bool = False
    max_length: int | None = None

    def check(self) -> None:
        """Passes options that go together.

        Raises:
            UserError: two of them do not.
        """
        if self.drop_biases and not self.allow_lossy:
            raise UserError(
                "--drop-biases makes another, far worse model of this one",
                "Pass --allow-lossy as well if that is what you want; the damage will be measured and written down",
            )
        if self.drop_biases and self.to != "llama":
            raise UserError(f"--drop-biases goes with --to llama, not with --to {self.to}", "Leave one of them out")
        if self.dtype != "keep" and self.to in ("nf4", "gguf"):
            other = "--gguf-type" if self.to == "gguf" else "a conversion of its own, before this one"
            raise UserError(f"--dtype does not go with --to {self.to}", f"Use {other}")


def convert(
    source: str | Path,
    out: Path,
    options: Options | None = None,
    *,
    biases_from: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Writes the model at `source` to the new folder `out` (with "gguf" a new file).

    Args:
        source: anything that `open_qwen2` opens: folder, file or Hub id.
        out: complete or not there. A run that was killed goes on where it was when it is called again.
        biases_from: the checkpoint that `source` was made from, for the q/k/v biases that `source` lost.
        revision: of a Hub id.
        overwrite: replace `out`, a file or a folder that holds a model (see `require_free`).

    Raises:
        UserError: what cannot be read, said or held without loss; an output that exists; a full disk.
    """
    start = time.perf_counter()
    options = options or Options()
    options.check()
    if options.to != "gguf":
        require_free(out, overwrite)
    view, original, restored = _open(source, biases_from, revision, options)
    warnings = tuple(_warnings(view))
    for warning in warnings:
        remark(f"warning: {warning}")
    if options.to == "gguf":
        from qwen2tool.convert.to_gguf import require_no_part, write_gguf_file

        if original is not None:
            require_no_part(out, original)
        key = _key(view, original, options)
        return write_gguf_file(view, source, out, options.gguf_type, key, overwrite, restored, start, warnings)
    require_apart(out, view.path, *((original.path,) if original else ()))
    job = plan_job(view, options.to, options.dtype, drop_biases=options.drop_biases, allow_lossy=options.allow_lossy)
    key = _key(view, original, options)
    with atomic_folder(out, overwrite) as folder, resumable(out, key, Store) as store:
        manifest, side_files = _fill(store, view, source, out, job, options, restored)
        store.move_into(folder)
    nbytes = sum(slot.nbytes for slot in job.slots)
    seconds = time.perf_counter() - start
    return report_of(
        out, view, job, manifest, side_files, nbytes, restored, seconds, warnings, resumed_shards=store.resumed
    )


def _warnings(view: View) -> Iterator[str]:
    """What is wrong with the source and no reason to refuse it."""
    if zero := zero_bias_warning(view):
        yield zero
    if view.origin.format != "gguf":
        for name, why in damaged_side_files(view.origin).items():
            yield f"{view.origin.folder / name}: {why}; the conversion goes on and repairs nothing of it"


def _open(
    source: str | Path, biases_from: str | Path | None, revision: str | None, options: Options
) -> tuple[View, View | None, Restored | None]:
    view = open_qwen2(
        source,
        revision=revision,
        whole=biases_from is None,
        tie_head=options.tie_head,
        max_length=options.max_length,
    )
    if view.origin.assumed:
        raise UserError(f"{view.path}: {view.origin.assumed[0]}", "Put its config.json beside it: a guess is no proof")
    if biases_from is None:
        return view, None, None
    original = open_qwen2(biases_from)
    whole, restored = with_biases(view, original, biases_from)
    return whole, original, restored


def _key(view: View, original: View | None, options: Options) -> str:
    """What a resumed run must have in common with the one before it: the same bytes in, the same bytes out."""
    sides = [_files(side.origin) for side in (view, original) if side is not None]
    return hashlib.sha256(json.dumps([__version__, sides, vars(options)]).encode()).hexdigest()


def _files(checkpoint: Checkpoint) -> list[list[object]]:
    """The files as they are now; a fingerprint would miss a change in the middle of a matrix."""
    config = checkpoint.folder / "config.json"
    files = {info.file for info in checkpoint.tensors.values()} | ({config} if config.is_file() else set())
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def _fill(
    store: Store, view: View, source: str | Path, out: Path, job: Job, options: Options, restored: Restored | None
) -> tuple[dict[str, Any], list[str]]:
    """Everything that the output holds, in the store's folder; returns the manifest and the side files' names."""
    shards = plan_shards(job.slots, options.max_shard_bytes)
    with progress("converting", sum(slot.nbytes for slot in job.slots)) as advance:
        hashes = store.write(shards, job.write, advance)
    if len(shards) > 1:
        write_index(store.folder, shards)
    write_json(store.folder / "config.json", job.config)
    side_files = _copy_side_files(view, store.folder)
    damage = _measure(view, store.folder, job, options, store.resumed, (public_name(source), out.resolve().name))
    if not options.drop_biases:
        open_qwen2(store.folder)
    manifest = make_manifest(
        view,
        source,
        job,
        hashes,
        to=options.to,
        dtype=options.dtype,
        biases=restored.to_json() if restored else None,
        damage=damage,
    )
    write_json(store.folder / MANIFEST, manifest)
    return manifest, side_files


def _copy_side_files(view: View, folder: Path) -> list[str]:
    """Tokenizer, template, generation settings and licence: copied from a folder, rebuilt from what holds its own."""
    found: list[str] = []
    if view.origin.format == "gguf":
        from qwen2tool.convert.gguf_tokenizer import side_files_of_gguf

        rebuilt = side_files_of_gguf(view.origin)
        for name, content in rebuilt.items():
            (folder / name).write_bytes(content)
        found = list(rebuilt)
    elif view.kind.startswith("Qwen 1"):
        from qwen2tool.convert.qwen1_tokenizer import write_side_files as write_qwen1

        found = write_qwen1(view.origin, folder)
    else:
        found = copy_side_files(view.origin.folder, folder)
    for file in sorted(file for pattern in LICENCES for file in view.origin.folder.glob(pattern) if file.is_file()):
        if file.name not in found:
            shutil.copyfile(file, folder / file.name)
            found.append(file.name)
    return found


def _measure(
    view: View, folder: Path, job: Job, options: Options, resumed: int, names: tuple[str, str]
) -> dict[str, Any] | None:
    """The damage of a lossy conversion of names[0] to names[1], and the model card that says so; None without one."""
    if options.to == "nf4":
        from qwen2tool.convert.lossy import measure_rounding

        rounding = measure_rounding(view, open_qwen2(folder), "rounded to NF4")
        return rounding.to_json() if rounding else None
    what = _loss(view, job, options, resumed)
    if not what:
        return None
    from qwen2tool.convert.lossy import measure, model_card

    damage = measure(view, open_qwen2(folder, whole=not options.drop_biases), folder, what)
    (folder / "README.md").write_text(model_card(names[1], names[0], damage), encoding="utf-8")
    return damage.to_json()


def _loss(view: View, job: Job, options: Options, resumed: int) -> str:
    """What was lost, in words; the changes in shards of an earlier run were not counted, and may be there."""
    parts = []
    if options.drop_biases:
        parts.append(f"all {3 * view.geometry.num_hidden_layers} q, k and v biases")
    if job.changes or (resumed and any(map(job.narrows, job.how))):
        parts.append(f"numbers rounded to {options.dtype}")
    return " and ".join(parts)
