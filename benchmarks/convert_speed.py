"""What `convert` and the comparison of tensors take beside `cp` of the same files, from disk to disk: medians.

    python benchmarks/convert_speed.py [--gigabytes 2] [--runs 5] [--work FOLDER] [--result FILE]

The checkpoint has a 7B's matrices of random bytes, as many layers as the size allows, in shards of 500 MB. `convert`
reads, writes and hashes every byte (sha256 in the manifest) and syncs each file; `cp` is followed by `sync` of its
files. `compare` reads a checkpoint and its copy, tensor by tensor, as `verify-equivalence` does; its rate counts one of
the two. All files are dropped from the page cache before each run, runs alternate, and the whole process is timed.
Between dropping and running lie ten seconds: a virtual machine gives freed memory back to its host after two, so that
the first gigabytes of whatever starts at once cost half of what they cost afterwards (seen: `cp` of 4 GB in 4.6 and 7.2
s, `cmp` of 4 and 4 GB in 7.5 and 16 s).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from common import write_result  # noqa: E402
from geometries import published_config  # noqa: E402

from qwen2tool.checkpoint.geometry import expected_tensors, geometry, with_both_spellings  # noqa: E402
from qwen2tool.checkpoint.writer import Slot, plan_shards, write_index, write_json, write_safetensors  # noqa: E402

SHARD_BYTES = 500_000_000
FIXED = {"vocab_size": 8192, "layer_types": None}
"""A small vocabulary, so that the layers are most of it."""
KINDS = {
    "convert --to llama": ["--to", "llama"],
    "convert, other shards": ["--max-shard-size", "300MB"],
}


SETTLE_SECONDS = 10

COMPARE = (
    "import sys; from qwen2tool.convert.read import open_qwen2; from qwen2tool.verify.tensors import compare_tensors; "
    "one, other = map(open_qwen2, sys.argv[1:]); "
    "assert all(t.kind == 'identical' for t in compare_tensors(one, other))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (three times the size)")
    parser.add_argument("--result", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        source = Path(scratch) / "source"
        size = write_random(source, options.gigabytes * 1e9)
        seconds = measure(source, Path(scratch), options.runs)
    copying = statistics.median(seconds["cp"])
    rates = {name: round(size / statistics.median(found) / 1e6) for name, found in seconds.items()}
    result = {
        "bytes": size,
        "seconds": {name: [round(value, 3) for value in found] for name, found in seconds.items()},
        "megabytes_per_second": rates,
        "of_cp": {name: round(copying / statistics.median(found), 3) for name, found in seconds.items()},
    }
    print(json.dumps(result, indent=1))
    if options.result:
        command = ["python", "benchmarks/convert_speed.py", "--gigabytes", str(options.gigabytes), "--runs"]
        write_result(options.result, [*command, str(options.runs)], {"beside cp": result})


def write_random(folder: Path, target: float) -> int:
    """A checkpoint of about `target` bytes; returns how many of data there are."""
    folder.mkdir()
    config = {key: value for key, value in (published_config("qwen2.5-7b") | FIXED).items() if value is not None}
    layers, size = 0, 0.0
    while size < target:
        layers += 1
        config["num_hidden_layers"] = config["max_window_layers"] = layers
        slots = [Slot(name=n, dtype="BF16", shape=s) for n, s in expected_tensors(geometry(config)).items()]
        size = sum(slot.nbytes for slot in slots)
    piece = random.Random(0).randbytes(1 << 24)

    def fill(slot: Slot, handle: BinaryIO) -> None:
        for start in range(0, slot.nbytes, len(piece)):
            handle.write(piece[: slot.nbytes - start])

    shards = plan_shards(slots, SHARD_BYTES)
    for file, members in shards.items():
        write_safetensors(folder / file, members, fill)
    write_index(folder, shards)
    write_json(folder / "config.json", with_both_spellings(config))
    return sum(slot.nbytes for slot in slots)


def forget(*folders: Path) -> None:
    """Drops their files from the page cache, where a checkpoint that is to be converted is not."""
    os.sync()
    for file in (file for folder in folders for file in folder.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(source: Path, work: Path, runs: int) -> dict[str, list[float]]:
    """Seconds of every run but the first, which warms the caches of both."""
    commands = {"cp": ["sh", "-c", f"cp -r '{source}' '{work / 'out'}' && sync '{work / 'out'}'/*"]}
    for name, flags in KINDS.items():
        commands[name] = [sys.executable, "-m", "qwen2tool", "convert", str(source), str(work / "out"), *flags]
    copy = shutil.copytree(source, work / "copy")
    commands["compare"] = [sys.executable, "-c", COMPARE, str(source), str(copy)]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            forget(source, copy)
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            if run:
                seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(work / "out", ignore_errors=True)
    return seconds


if __name__ == "__main__":
    main()
