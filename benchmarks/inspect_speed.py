"""How long `qwen2tool inspect` takes on a 7B and on a 72B in shards of 4 GB: process start to exit, median of several.

    python benchmarks/inspect_speed.py [--runs 9] [--geometry NAME ...] [--result FILE]

The shards are sparse files with true headers and random biases: nothing else is read, so 145 GB need not exist. A
tokenizer.json of the real size (151,643 tokens and as many merges) lies beside them with a chat template, since reading
those is much of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from io import SEEK_CUR
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from common import write_result  # noqa: E402
from geometries import ROWS, published_config  # noqa: E402

from qwen2tool.checkpoint.geometry import expected_tensors, geometry, with_both_spellings  # noqa: E402
from qwen2tool.checkpoint.writer import Slot, plan_shards, write_index, write_json, write_safetensors  # noqa: E402

GEOMETRIES = ("qwen2.5-7b", "qwen2.5-72b")
SHARD_BYTES = 4_000_000_000
BASE_TOKENS = 151_643
COMMANDS = {
    "inspect": ["-m", "qwen2tool", "inspect"],
    "inspect --json": ["-m", "qwen2tool", "inspect", "--json"],
    "library": [
        "-c",
        "import sys; from qwen2tool.checkpoint.report import inspect_checkpoint; "
        "sys.exit(inspect_checkpoint(sys.argv[1]).exit_code)",
    ],
    "python alone": ["-c", "pass"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--geometry", nargs="+", choices=list(ROWS), default=GEOMETRIES, metavar="NAME")
    parser.add_argument("--result", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    result = {name: time_geometry(name, options.runs) for name in options.geometry}
    print(json.dumps(result, indent=1))
    if options.result:
        command = ["python", "benchmarks/inspect_speed.py", "--runs", str(options.runs), "--geometry"]
        write_result(options.result, [*command, *options.geometry], result)


def time_geometry(geometry_name: str, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = write_sparse(folder, geometry_name)
        found = {name: measure(command, folder, runs) for name, command in COMMANDS.items()}
    for name, seconds in found.items():
        times = f"{seconds['wall']:.3f} s wall (least {seconds['least']:.3f}), {seconds['cpu']:.3f} s CPU"
        print(f"{geometry_name:12} {name:15} {times}, medians of {runs}")
    return {"shards": shards, "runs": runs, "cpus": os.cpu_count(), "seconds": found}


def write_sparse(folder: Path, geometry_name: str) -> int:
    """A checkpoint whose data are holes, but for its biases; returns the number of shards."""
    config = published_config(geometry_name)
    slots = [Slot(name=n, dtype="BF16", shape=s) for n, s in expected_tensors(geometry(config)).items()]
    shards = plan_shards(slots, SHARD_BYTES)
    for file, members in shards.items():
        write_safetensors(folder / file, members, write_bias_or_skip)
        with (folder / file).open("rb") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little")
        os.truncate(folder / file, header + sum(slot.nbytes for slot in members))
    write_index(folder, shards)
    write_json(folder / "config.json", with_both_spellings(config))
    write_tokenizer(folder)
    return len(shards)


def write_bias_or_skip(slot: Slot, handle: BinaryIO) -> None:
    """Random bf16 biases: the upper halves of fp32 numbers."""
    if slot.name.endswith(".bias"):
        numbers = np.random.default_rng(len(slot.name)).normal(size=slot.shape).astype("<f4")
        handle.write((numbers.view("<u4") >> 16).astype("<u2").tobytes())
    else:
        handle.seek(slot.nbytes, SEEK_CUR)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json with as many tokens and merges as Qwen2's and its 22 added tokens; the bundled chat template."""
    shutil.copy(ROOT / "qwen2tool" / "assets" / "tiny-qwen2" / "tokenizer_config.json", folder)
    vocabulary = {f"tok{index:x}": index for index in range(BASE_TOKENS)}
    merges = [["tok", f"{index:x}"] for index in range(BASE_TOKENS - 256)]
    added = [{"id": BASE_TOKENS + i, "content": f"<|added{i}|>", "special": True} for i in range(22)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added, "model": model})


def measure(command: list[str], folder: Path, runs: int) -> dict[str, float]:
    """Median wall and CPU seconds of a process; one run before them warms the disk cache.

    Raises:
        SystemExit: the command failed.
    """
    wall, cpu = [], []
    for _ in range(runs + 1):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        line = [sys.executable, *command, str(folder)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            raise SystemExit(f"{line} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    middle = statistics.median
    return {"wall": round(middle(wall[1:]), 4), "least": round(min(wall[1:]), 4), "cpu": round(middle(cpu[1:]), 4)}


if __name__ == "__main__":
    main()
