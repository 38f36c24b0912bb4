"""`convert --to gguf`: one file, its manifest beside it, and what the file holds held against what it was made from.

The file is read back through the same door as any GGUF: every tensor is compared with the one it was written from, so
that a rounding that was asked for by name is stated as a number, and everything else is known to be exact.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import cast

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.reader import raw_chunks
from qwen2tool.checkpoint.view import View
from qwen2tool.checkpoint.writer import Slot, write_json
from qwen2tool.console import progress
from qwen2tool.convert.gguf_write import GgufKind, write_gguf
from qwen2tool.convert.lossy import measure_rounding
from qwen2tool.convert.manifest import MANIFEST, make_manifest
from qwen2tool.convert.plan import Job, stored
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.report import ConvertReport, report_of
from qwen2tool.convert.restore import Restored
from qwen2tool.errors import UserError


def write_gguf_file(
    view: View, name: str | Path, out: Path, kind: str, overwrite: bool, restored: Restored | None, start: float
) -> ConvertReport:
    """Writes `view` (of the source `name`) to the file `out`, complete or not at all; `start` is when the run began.

    Raises:
        UserError: see `write_gguf`; an output that is a part of the source.
    """
    require_no_part(out, view)
    with progress("writing GGUF", sum(tensor.nbytes for tensor in view.tensors.values())) as advance:
        write_gguf(
            view, out, cast(GgufKind, kind), overwrite=overwrite,
            on_tensor=lambda tensor, _: advance(view.tensors[tensor].nbytes),
        )  # fmt: skip
    after = open_qwen2(out)
    rounding = measure_rounding(view, after, f"rounded to {kind.upper()}")
    job, hashes = _job(view, out, kind)
    manifest = make_manifest(
        view,
        name,
        job,
        hashes,
        to="gguf",
        dtype=kind,
        biases=restored.to_json() if restored else None,
        damage=rounding.to_json() if rounding else None,
    )
    write_json(out.with_suffix("." + MANIFEST), manifest)
    nbytes = sum(info.nbytes for info in after.origin.tensors.values())
    return report_of(out, view, job, manifest, ["tokenizer"], 0, nbytes, restored, time.perf_counter() - start)


def require_no_part(out: Path, view: View) -> None:
    """Passes where `out` is none of the files that `view` is read from.

    Raises:
        UserError: it is one.
    """
    if out.exists() and out.resolve() in {info.file.resolve() for info in view.origin.tensors.values()}:
        raise UserError(f"{out}: replacing it would delete what it is made from", "Choose another output")


def _job(view: View, out: Path, kind: str) -> tuple[Job, dict[str, str]]:
    """What was written, as a job that is done, and the sha256 of each tensor's bytes in the file."""
    written = open_checkpoint(out).tensors
    hashes: dict[str, str] = {}
    with progress("hashing", sum(info.nbytes for info in written.values())) as advance:
        for tensor, info in written.items():
            digest = hashlib.sha256()
            for piece in raw_chunks(info):
                digest.update(piece)
            hashes[tensor] = digest.hexdigest()
            advance(info.nbytes)
    how = {}
    for tensor, info in written.items():
        same = view.tensors[tensor].dtype == info.dtype
        how[tensor] = "kept" if same else f"from {view.tensors[tensor].dtype} to {info.dtype}"

    def done(*_: object) -> None:
        raise AssertionError("a GGUF is written whole")

    job = Job(
        slots=[Slot(name=info.name, dtype=info.dtype, shape=info.shape) for info in written.values()],
        write=done,
        config=view.config,
        how=how,
        sources={tensor: stored(view.tensors[tensor]) for tensor in written},
        mapping=f"GGUF's names of a Qwen2; matrices {kind.upper()}, biases and norms F32; config.json kept inside",
    )
    return job, hashes
