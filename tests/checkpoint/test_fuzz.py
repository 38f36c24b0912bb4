"""Whatever is damaged, a user reads one sentence: three hundred random faults in headers, indices, configs."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest

from qwen2tool.checkpoint.adapter import fingerprint, open_adapter, require_fit
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import rope_disagreement, with_both_spellings
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.errors import UserError
from tests.checkpoint.files import FIRST, INDEX, SECOND, SMALL, raw_file, split_header
from tests.checkpoint.mutate import mutate_bytes, mutate_json
from tests.tiny import write_adapter, write_tiny

ROUNDS = 100


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    base = write_tiny(root / "base", **SMALL)
    return base, write_adapter(root / "adapter", base, rank=2, alpha=3, rank_pattern={"q_proj": 3})


def damage(kind, base, adapter, dice) -> None:
    if kind == "bytes":
        file = dice.choice(
            (base / FIRST, base / SECOND, base / INDEX, base / "config.json", *adapter.glob("adapter_*"))
        )
        file.write_bytes(mutate_bytes(file.read_bytes(), dice))
    elif kind == "header":
        file = dice.choice((base / FIRST, base / SECOND, adapter / "adapter_model.safetensors"))
        header, data = split_header(file)
        raw_file(file, mutate_json(header, dice), data)
    else:
        file = dice.choice((base / INDEX, base / "config.json", adapter / "adapter_config.json"))
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), dice)))


def open_everything(base, adapter) -> str:
    """Every check that a command makes on headers; what it says, or "passed"."""
    try:
        checkpoint = open_checkpoint(base)
        rope_disagreement(checkpoint.config), with_both_spellings(checkpoint.config)
        require_whole(checkpoint)
        fingerprint(checkpoint)
        require_fit(open_adapter(adapter), checkpoint)
    except UserError as error:
        assert error.what and error.fix and "\n" not in str(error)
        return "refused"
    return "passed"


@pytest.mark.parametrize("kind", ["bytes", "header", "json"])
def test_only_user_errors_come_out(kind, small, tmp_path):
    dice, outcomes = random.Random(f"qwen2tool {kind}"), Counter()
    for number in range(ROUNDS):
        base, adapter = (shutil.copytree(folder, tmp_path / f"{number}-{folder.name}") for folder in small)
        damage(kind, base, adapter, dice)
        outcomes[open_everything(base, adapter)] += 1
        shutil.rmtree(base), shutil.rmtree(adapter)
    assert outcomes["refused"] >= (ROUNDS // 5 if kind == "json" else ROUNDS // 2), outcomes
    assert open_everything(*small) == "passed"
