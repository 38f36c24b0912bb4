"""A 72B's geometry in 6 GB: four layers, 152,064 rows of head, nothing whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.edits import edit_config

ROOT = Path(__file__).parent.parent.parent
DISK = 14e9
MEASURED = """
import sys
from qwen2tool.console import resident_peak
from qwen2tool.data.samples import Sample
from qwen2tool.verify.run import verify

ids = [list(range(start, start + 128)) for start in (11, 5000, 140000)]
samples = [Sample(ids=tuple(row), scored=(True,) * 128, record=n) for n, row in enumerate(ids)]
report = verify(sys.argv[1], sys.argv[2], samples)
own = [layer.own["attention"] for layer in report.layers]
print(report.verdict, resident_peak(), report.figures.tokens, min(own), report.figures.kld_mean)
"""


@pytest.mark.long
def test_a_72b_geometry_stays_within_6_gb(tmp_path: Path) -> None:
    """The candidate is the same shards under another RoPE base: every layer's attention has to differ."""
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK:.0e} bytes of disk in {tmp_path}")
    whole, other = tmp_path / "72b", tmp_path / "other"
    script = ROOT / "scripts" / "make_checkpoint.py"
    subprocess.run([sys.executable, script, "qwen2-72b", whole, "--layers", "4"], check=True)
    other.mkdir()
    for file in whole.iterdir():
        if file.suffix == ".safetensors":
            (other / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, other / file.name)
    edit_config(other, rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    outcome = subprocess.run([sys.executable, "-c", MEASURED, whole, other], check=True, capture_output=True, text=True)
    shutil.rmtree(whole)
    verdict, peak, tokens, own, kld = outcome.stdout.split()
    assert (verdict, int(tokens)) == ("different", 3 * 127)
    assert float(own) > 0.01 and float(kld) > 0
    assert int(peak) < 6e9
