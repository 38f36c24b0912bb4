"""Every op of qwen2tool.kernels by itself: microseconds, bytes, and the share of what the GPU can do.

    python benchmarks/kernels.py [--ops rms_norm_forward head ...] [--rows 8192 1024]

Shapes are those of Qwen1.5-7B, bf16. Times are medians of CUDA events over inputs and outputs that go round more memory
than the cache holds, without the launches' host time (see ceilings.median_seconds). Beside each op: PyTorch's, Liger's
and bitsandbytes' where they have it, and bare matrix products. Bandwidth is the op's *fewest* bytes over its time, as a
share of the copy measured in the same process; the rate likewise, of the best product. An op or a peer that fails is
kept with its error.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The script's folder leaves the path: this file is not the `kernels` that transformers and bitsandbytes look for.
sys.path[:] = [str(ROOT), str(ROOT / "scripts"), *(entry for entry in sys.path if entry not in (str(HERE), str(ROOT)))]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from speed_tables import kernel_table  # noqa: E402

from benchmarks import ceilings  # noqa: E402
from benchmarks import kernel_cases as simple  # noqa: E402
from benchmarks import product_cases as products  # noqa: E402
from benchmarks.kernel_cases import Case, Sizes  # noqa: E402

OPS: dict[str, Callable[[Sizes], Case]] = {
    "rms_norm_forward": simple.rms_norm_forward,
    "rms_norm_backward": partial(simple.rms_norm_backward, residual=False),
    "rms_norm_backward, residual added": partial(simple.rms_norm_backward, residual=True),
    "rope_forward": simple.rope_forward,
    "rope_backward": simple.rope_backward,
    "swiglu_forward": simple.swiglu_forward,
    "swiglu_backward": partial(simple.swiglu_backward, again=False),
    "swiglu_backward, h again": partial(simple.swiglu_backward, again=True),
    "dequantise, gate": partial(products.dequantise, projections=1),
    "dequantise, gate and up": partial(products.dequantise, projections=2),
    "keep_bits": products.keep_bits,
    "masked_product": products.masked_product,
    "masked_grad_a": products.masked_grad_a,
    "masked_grad_x": products.masked_grad_x,
    "lora_group, qkv forward": partial(products.lora_qkv, backward=False),
    "lora_group, qkv both": partial(products.lora_qkv, backward=True),
    "attend, uniform forward": partial(products.attention, ragged=False, backward=False),
    "attend, uniform both": partial(products.attention, ragged=False, backward=True),
    "attend, ragged forward": partial(products.attention, ragged=True, backward=False),
    "attend, ragged both": partial(products.attention, ragged=True, backward=True),
    "head, both": products.head,
}
WEIGHTS_ONLY = ("dequantise, gate", "dequantise, gate and up")
"""Ops whose size is the weight's: measured once, not for every number of rows."""
ROWS, LENGTH = [8192, 1024], 2048
"""Tokens of a pass, and of its sequences, unless others are asked for."""


def main() -> None:
    options = parse()
    limits = ceilings.measure(options.device, **({} if options.device == "cuda" else ceilings.SMOKE))
    found: dict[str, Any] = {"ceilings": limits, "rows": []}
    command = ["python", "benchmarks/kernels.py", *sys.argv[1:]]
    part = part_name(options)
    for name in OPS:
        if not any(name.startswith(prefix) for prefix in options.ops):
            continue
        for count in options.rows[:1] if name in WEIGHTS_ONLY else options.rows:
            sizes = Sizes(rows=count, length=min(count, options.length), device=options.device)
            found["rows"].append(measure(name, sizes, limits))
            print(f"{name:35} {found['rows'][-1]['shape']:28} {found['rows'][-1]['microseconds']}", flush=True)
        write_result(options.result, command, {part: found})
    print(kernel_table(found))


def part_name(options: argparse.Namespace) -> str:
    """Of the result file's: some ops measured anew, or other shapes, replace nothing else."""
    words = ["kernels", *filter(None, options.ops)]
    words += ["rows", *map(str, options.rows)] if options.rows != ROWS else []
    words += ["length", str(options.length)] if options.length != LENGTH else []
    return " ".join([*words, options.device] if options.device != "cuda" else words)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=[""], help="beginnings of names; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a sequence, or all rows if they are fewer")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json")
    options = parser.parse_args()
    unknown = [ops for ops in options.ops if not any(name.startswith(ops) for name in OPS)]
    if unknown:
        parser.error(f"no op begins with {unknown[0]!r}; there are {', '.join(OPS)}")
    if any(count % min(count, options.length) for count in options.rows):
        parser.error(f"--rows must be multiples of --length {options.length}, or fewer")
    return options


def measure(name: str, sizes: Sizes, limits: dict[str, Any]) -> dict[str, Any]:
    """One row of the result: times in microseconds, an error's text where one failed; shares of the ceilings."""
    torch.manual_seed(0)
    try:
        case = OPS[name](sizes)
    except Exception as error:
        return {"op": name, "shape": f"{sizes.rows} rows", "microseconds": {"ours": reason(error)}}
    times = {run: microseconds(make, case.sets, sizes.device == "cuda") for run, make in case.runs.items()}
    row: dict[str, Any] = {"op": name, "shape": case.shape, "bytes": case.bytes, "flops": case.flops}
    return row | {"microseconds": times} | shares(case, times["ours"], limits)


def microseconds(make: Callable[[], Callable[[int], object]], sets: int, cuda: bool) -> float | str:
    try:
        return round(1e6 * ceilings.median_seconds(make(), sets=sets, cuda=cuda, repeats=30 if cuda else 3), 2)
    except Exception as error:
        return reason(error)
    finally:
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def shares(case: Case, ours: float | str, limits: dict[str, Any]) -> dict[str, float]:
    """What ours reaches of both ceilings, where the case counts bytes or flops."""
    if isinstance(ours, str):
        return {}
    found = {}
    if case.bytes:
        found["bytes_per_s"] = case.bytes / ours * 1e6
        found["of_copy"] = found["bytes_per_s"] / limits["copy_bytes_per_s"]
    if case.flops:
        found["flops_per_s"] = case.flops / ours * 1e6
        found["of_products"] = found["flops_per_s"] / limits["flops_per_s"]
    return found


if __name__ == "__main__":
    main()
