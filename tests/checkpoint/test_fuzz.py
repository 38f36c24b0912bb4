"""Whatever is damaged, a user reads one sentence: three hundred random faults in headers, indices, configs."""

from __future__ import annotations

import copy
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
from tests.tiny import write_adapter, write_tiny

WEIRD = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**40, 0.5, float("nan"), float("inf"), "", "x", "F32", "BF16", "F4",
    "\0", "\ud800", "../x", "n" * 400, [], [0], [0, 0], [-1, 4], [2**62, 2**62], [[]], {}, {"a": 1}, "1e6", FIRST,
    SECOND,
)  # fmt: skip
ROUNDS = 100


def paths_in(value, path=()):
    """The path of every value in a JSON document, the document's own included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_in(item, (*path, key))


def mutate_json(value, dice):
    """Replaces, removes, renames or doubles one value somewhere."""
    value = copy.deepcopy(value)
    path = dice.choice(list(paths_in(value))[1:])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = dice.choice(("replace", "replace", "replace", "remove", "rename"))
    if action == "replace":
        parent[path[-1]] = dice.choice(WEIRD)
    elif action == "remove" or isinstance(parent, list):
        del parent[path[-1]]
    else:
        parent[str(dice.choice(WEIRD))] = parent.pop(path[-1])
    return value


def mutate_bytes(blob, dice):
    """Flips, cuts, inserts or appends a few bytes, mostly in front, where the header is."""
    blob = bytearray(blob)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(min(len(blob), dice.choice((8, 64, 2000, len(blob)))))
        match dice.choice(("flip", "flip", "cut", "insert", "append")):
            case "flip":
                blob[place] ^= 1 << dice.randrange(8)
            case "cut":
                del blob[place : place + dice.choice((1, 8, 1000))]
            case "insert":
                blob[place:place] = dice.randbytes(dice.choice((1, 8)))
            case "append":
                blob += dice.randbytes(3)
        if not blob:
            break
    return bytes(blob)


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
