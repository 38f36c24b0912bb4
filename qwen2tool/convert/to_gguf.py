"""`convert --to gguf`: one file, its manifest beside it, and what the file holds held against what it was made from.

The file is read back through the same door as any GGUF before it takes its name: every tensor is compared with the one
it was written from, so that a rounding that was asked for by name is stated as a number, and everything else is known
to be exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import View
from qwen2tool.checkpoint.writer import Slot, write_json
from qwen2tool.console import progress
from qwen2tool.convert.gguf_write import GgufKind, gguf_file
from qwen2tool.convert.lossy import measure_rounding
from qwen2tool.convert.manifest import MANIFEST, make_manifest
from qwen2tool.convert.plan import Job, stored
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.report import ConvertReport, report_of
from qwen2tool.convert.restore import Restored
from qwen2tool.errors import UserError


def write_gguf_file(
    view: View,
    name: str | Path,
    out: Path,
    kind: str,
    key: str,
    overwrite: bool,
    restored: Restored | None,
    start: float,
    warnings: tuple[str, ...] = (),
) -> ConvertReport:
    """Writes `view` (of the source `name`) to the file `out`, complete or not at all; `start` is when the run began.

    A run that was killed goes on where it was when it is called again with the same `key` (see `gguf_file`).

    Raises:
        UserError: see `gguf_file`; an output that is a part of the source.
    """
    require_no_part(out, view)
    with progress("writing GGUF", sum(tensor.nbytes for tensor in view.tensors.values())) as advance:
        whole = gguf_file(
            view, out, cast(GgufKind, kind), key=key, overwrite=overwrite,
            on_tensor=lambda tensor, _: advance(view.tensors[tensor].nbytes),
        )  # fmt: skip
        with whole as written:
            after = open_qwen2(written.file)
            rounding = measure_rounding(view, after, f"rounded to {kind.upper()}")
            job = _job(view, after.origin.tensors, kind)
            manifest = make_manifest(
                view,
                name,
                job,
                written.hashes,
                to="gguf",
                dtype=kind,
                biases=restored.to_json() if restored else None,
                damage=rounding.to_json() if rounding else None,
            )
            write_json(written.file.with_name(MANIFEST), manifest)
            written.file.with_name(MANIFEST).replace(out.with_suffix("." + MANIFEST))
    nbytes = sum(info.nbytes for info in after.origin.tensors.values())
    seconds = time.perf_counter() - start
    return report_of(
        out, view, job, manifest, ["tokenizer"], nbytes, restored, seconds, warnings, resumed_tensors=written.resumed
    )


def require_no_part(out: Path, view: View) -> None:
    """Passes where `out` is none of the files that `view` is read from.

    Raises:
        UserError: it is one.
    """
    if out.exists() and out.resolve() in {info.file.resolve() for info in view.origin.tensors.values()}:
        raise UserError(f"{out}: replacing it would delete what it is made from", "Choose another output")


def _job(view: View, written: Mapping[str, TensorInfo], kind: str) -> Job:
    """What was written, as a job that is done."""
    how = {}
    for tensor, info in written.items():
        same = view.tensors[tensor].dtype == info.dtype
        how[tensor] = "kept" if same else f"from {view.tensors[tensor].dtype} to {info.dtype}"

    def done(*_: object) -> None:
        raise AssertionError("a GGUF is written whole")

    return Job(
        slots=[Slot(name=info.name, dtype=info.dtype, shape=info.shape) for info in written.values()],
        write=done,
        config=view.config,
        how=how,
        sources={tensor: stored(view.tensors[tensor]) for tensor in written},
        mapping=f"GGUF's names of a Qwen2; matrices {kind.upper()}, biases and norms F32; config.json kept inside",
    )
