"""What only a process of its own shows: peak memory, a kill in the middle of writing, a disk that is full."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.merge.run import merge
from tests.merge.common import same_bytes, tensors_of

WIDE = """
import json, sys
from pathlib import Path
import torch
from qwen2tool.checkpoint.adapter import delta, open_adapter
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.checkpoint.writer import Slot, write_safetensors
from qwen2tool.console import resident_peak as peak
from qwen2tool.merge.run import merge
from tests.merge.common import write_plain_adapter

torch.set_num_threads(1)
folder, small_base, small_adapter = map(Path, sys.argv[1:])

base = folder / "base"
base.mkdir()
config = {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 1,
          "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 512, "torch_dtype": "bfloat16"}
(base / "config.json").write_text(json.dumps(config))
piece = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16().view(torch.uint8)
piece = piece.numpy().tobytes()

def fill(slot, handle):
    for start in range(0, slot.nbytes, len(piece)):
        handle.write(piece[: slot.nbytes - start])

slots = [Slot(name=name, dtype="BF16", shape=shape) for name, shape in expected_tensors(geometry(config)).items()]
write_safetensors(base / "model.safetensors", slots, fill)
module = "model.layers.0.mlp.gate_proj"
adapter = write_plain_adapter(folder / "adapter", {module: (torch.ones(8, 2048), torch.ones(16384, 8))})
merge(small_base, small_adapter, folder / "warm")
before = peak()
report = merge(base, adapter, folder / "out")
ours = peak()
weight = read_tensor(open_checkpoint(base).tensors[module + ".weight"])
merged = (weight.float() + delta(open_adapter(adapter).pairs[module])).to(weight.dtype)
naive = peak()
same = merged.equal(read_tensor(open_checkpoint(folder / "out").tensors[module + ".weight"]))
print(json.dumps({"size": sum(s.nbytes for s in slots), "ours": ours - before, "naive": naive - before, "same": same,
                  "reported": report.peak_memory == ours}))
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from qwen2tool.merge import run

write, calls = run.write_tensor, []

def write_and_die(tensor, handle):
    calls.append(tensor)
    if len(calls) == 15:
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensor, handle)

run.write_tensor = write_and_die
run.merge(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), overwrite=True)
"""

FULL = """
import resource, sys
from pathlib import Path
from qwen2tool.errors import UserError
from qwen2tool.merge.run import merge

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    merge(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), overwrite=True)
except UserError as error:
    print(error)
"""


def python(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_peak_memory_is_a_few_blocks(base_folder, adapter_folder, tmp_path):
    """224 MB, 67 MB the largest tensor: under 150 MB above what a tiny merge needs; whole matrices need over 300."""
    done = python(WIDE, tmp_path, base_folder, adapter_folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] > 200e6 and found["same"] and found["reported"]
    assert found["ours"] < 150e6 < 300e6 < found["naive"], found


def test_killed_while_writing(base_folder, adapter_folder, tmp_path):
    out = tmp_path / "out"
    assert python(KILLED, base_folder, adapter_folder, out).returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.partial-") and any(file.stat().st_size for file in partial.iterdir())
    merge(base_folder, adapter_folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    require_whole(open_checkpoint(out))


def test_killed_while_replacing_leaves_the_old(base_folder, adapter_folder, tmp_path):
    out = tmp_path / "out"
    merge(base_folder, adapter_folder, out)
    before = tensors_of(out)
    assert python(KILLED, base_folder, adapter_folder, out).returncode == -signal.SIGKILL
    after = tensors_of(out)
    assert before.keys() == after.keys() and all(same_bytes(before[name], after[name]) for name in before)


def test_full_disk(base_folder, adapter_folder, tmp_path):
    out = tmp_path / "out"
    done = python(FULL, base_folder, adapter_folder, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "disk full or file too large" in done.stdout and str(out) in done.stdout
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "trainer_state.json").write_text("{}")
    assert "disk full" in python(FULL, base_folder, adapter_folder, out).stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "trainer_state.json"]
