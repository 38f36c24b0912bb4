"""Ten thousand damaged files of every format: a sentence or a result, at once, in little memory, and nothing written.

`QWEN2TOOL_FUZZ=200000 pytest tests/convert/test_fuzz.py` is the longer run: so many inputs instead of ten thousand.
What is written is seen twice: as Python's audit events, wherever it lies, and in the folder around the files.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2tool.checkpoint.adapter_report import inspect_adapter
from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.view import read
from qwen2tool.convert.gguf_tokenizer import side_files_of_gguf
from qwen2tool.convert.read import open_qwen2
from qwen2tool.convert.run import convert
from qwen2tool.errors import UserError
from qwen2tool.verify.inventory import compare_inventories
from qwen2tool.verify.sides import open_sides
from qwen2tool.verify.usable import refusal
from tests.checkpoint.files import FIRST, INDEX, SMALL, raw_file, split_header
from tests.checkpoint.mutate import mutate_bytes, mutate_json
from tests.checkpoint.torch_files import as_bins, edited, pickle_of
from tests.convert.common import write_gguf
from tests.convert.packed import NF4, save_packed
from tests.convert.watch import WATCH
from tests.tiny import write_adapter, write_tiny

INPUTS = int(os.environ.get("QWEN2TOOL_FUZZ", "10000"))
Damage = Callable[[Path, random.Random], Path]
"""Damages one file of a folder, and says which."""
ROOM = 300_000_000
"""Bytes of address space that reading a file of some kilobytes may add."""
SECONDS = 10


class Target(NamedTuple):
    """A folder in order, which of its files are damaged and how, what reads it, and its share of the inputs."""

    folder: Path
    damage: Damage
    reads: Callable[[Path], object]
    share: int = 10


def in_bytes(*names: str) -> Damage:
    def damage(folder: Path, dice: random.Random) -> Path:
        file = folder / dice.choice(names)
        file.write_bytes(mutate_bytes(file.read_bytes(), dice))
        return file

    return damage


def in_json(*names: str) -> Damage:
    def damage(folder: Path, dice: random.Random) -> Path:
        file = folder / dice.choice(names)
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), dice)))
        return file

    return damage


def in_header(*names: str) -> Damage:
    def damage(folder: Path, dice: random.Random) -> Path:
        file = folder / dice.choice(names)
        header, data = split_header(file)
        return raw_file(file, mutate_json(header, dice), data)

    return damage


def in_pickle(name: str) -> Damage:
    """Damage under a zip that is in order, its checksums included."""

    def damage(folder: Path, dice: random.Random) -> Path:
        file = folder / name
        edited(file, folder / "edited", data__pkl=None, **{"data.pkl": mutate_bytes(pickle_of(file), dice)})
        return (folder / "edited").replace(file)

    return damage


def in_quant_state(folder: Path, dice: random.Random) -> Path:
    """The JSON that bitsandbytes keeps as a tensor of bytes."""
    file = folder / "model.safetensors"
    state = load_file(file)
    name = dice.choice([name for name in state if "quant_state" in name])
    text = json.dumps(mutate_json(json.loads(bytes(state[name].tolist())), dice)).encode()
    state[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(state, file, metadata={"format": "pt"})
    return file


def shown(report: Any) -> Any:
    """The report itself, after all that --json gives was made of it."""
    json.dumps(report.to_json())
    return report


def inspect_all(folder: Path) -> object:
    return shown(inspect_checkpoint(folder))


def inspect_lone(folder: Path) -> object:
    return shown(inspect_checkpoint(folder / "lone.safetensors"))


def view_all(folder: Path) -> object:
    view = open_qwen2(folder, whole=False)
    return [read(view.tensors[name]) for name in list(view.tensors)[:4]]


def read_gguf(folder: Path) -> object:
    view = open_qwen2(folder / "m.gguf")
    return [read(tensor) for tensor in view.tensors.values()], side_files_of_gguf(view.origin)


def inspect_gguf(folder: Path) -> object:
    return shown(inspect_checkpoint(folder / "m.gguf"))


def inspect_lora(folder: Path) -> object:
    return shown(inspect_adapter(folder))


def compared_with(reference: Path) -> Callable[[Path], object]:
    """What `verify-equivalence` asks of a candidate before it reads a tensor."""

    def reads(folder: Path) -> object:
        sides = open_sides(reference, folder)
        compare_inventories(sides.stored, sides.candidate.view)
        if (why := refusal(sides.candidate.view)) is not None:
            raise UserError(why, "Copy config.json again")
        return sides

    return reads


def with_vocab_json(folder: Path) -> Path:
    """The same tokenizer as older checkpoints have it."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    (folder / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in stored["added_tokens"]}))
    (folder / "tokenizer.json").unlink()
    return folder


def with_adapter_bin(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return folder


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    root = tmp_path_factory.mktemp("fuzz")
    base = write_tiny(root / "base", **(SMALL | {"vocab_size": 384}))
    lone = root / "lone"
    lone.mkdir()
    whole = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(whole, lone / "lone.safetensors")
    bins = as_bins(shutil.copytree(base, root / "bins"))
    adapter = write_adapter(root / "adapter", base, rank=2, alpha=3, rank_pattern={"q_proj": 3})
    wide = write_tiny(root / "wide", num_hidden_layers=1, vocab_size=384)
    packed = save_packed(wide, root / "packed", **NF4)
    gguf = root / "gguf"
    gguf.mkdir()
    write_gguf(open_qwen2(wide), gguf / "m.gguf", "q8_0")
    bin_shards = as_bins(shutil.copytree(base, root / "bin-shards"), shards=2)
    older = with_vocab_json(shutil.copytree(base, root / "older"))
    adapter_bin = with_adapter_bin(shutil.copytree(adapter, root / "adapter-bin"))
    side_files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    return {
        "safetensors, bytes": Target(base, in_bytes(FIRST, INDEX, "config.json"), inspect_all),
        "safetensors, header": Target(base, in_header(FIRST), inspect_all, 20),
        "config and index": Target(base, in_json("config.json", INDEX), inspect_all, 20),
        "side files": Target(base, in_json(*side_files), inspect_all),
        "side files, bytes": Target(base, in_bytes(*side_files), inspect_all, 5),
        "older tokenizer": Target(older, in_json("vocab.json", "added_tokens.json"), inspect_all, 3),
        "view": Target(base, in_json("config.json", INDEX), view_all),
        "one file": Target(lone, in_header("lone.safetensors"), inspect_lone),
        "torch zip": Target(bins, in_bytes("pytorch_model.bin"), inspect_all, 10),
        "torch pickle": Target(bins, in_pickle("pytorch_model.bin"), inspect_all, 10),
        "torch index": Target(bin_shards, in_json("pytorch_model.bin.index.json"), inspect_all, 3),
        "adapter": Target(adapter, in_json("adapter_config.json"), inspect_lora),
        "adapter, header": Target(adapter, in_header("adapter_model.safetensors"), inspect_lora),
        "adapter, bytes": Target(
            adapter, in_bytes("adapter_config.json", "adapter_model.safetensors"), inspect_lora, 5
        ),
        "adapter, pickle": Target(adapter_bin, in_pickle("adapter_model.bin"), inspect_lora, 5),
        "compared": Target(base, in_json("config.json"), compared_with(base), 2),
        "compared, adapter": Target(adapter, in_json("adapter_config.json"), compared_with(base), 3),
        "packed": Target(packed, in_header("model.safetensors"), view_all, 3),
        "quant state": Target(packed, in_quant_state, view_all, 3),
        "gguf": Target(gguf, in_bytes("m.gguf"), inspect_gguf, 15),
        "gguf, numbers and tokenizer": Target(gguf, in_bytes("m.gguf"), read_gguf, 5),
    }


@contextmanager
def bounded() -> Iterator[None]:
    """An allocation beyond ROOM fails, and so does what takes SECONDS."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def outcome(reads: Callable[[Path], object], folder: Path) -> str:
    with WATCH.written() as written:
        try:
            with bounded():
                report = reads(folder)
        except UserError as error:
            assert error.what and error.fix and "\n" not in str(error)
            report = None
    assert not written, f"reading wrote {written}"
    if report is None:
        return "refused"
    return "found" if getattr(report, "exit_code", 0) else "passed"


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def fuzz(target: Target, work: Path, dice: random.Random, inputs: int) -> Counter[str]:
    """Damages one file at a time, reads the folder, puts the file back."""
    folder = shutil.copytree(target.folder, work / target.folder.name)
    right = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    before, found = tree(work), Counter[str]()
    for _ in range(inputs):
        file = target.damage(folder, dice)
        found[outcome(target.reads, folder)] += 1
        file.write_bytes(right[file])
    assert tree(work) == before, "reading wrote something"
    return found


def test_every_reader(targets, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    shares, total = sum(target.share for target in targets.values()), Counter[str]()
    for name, target in targets.items():
        dice = random.Random(f"qwen2tool {name}")
        inputs = -(-INPUTS * target.share // shares)
        found = fuzz(target, tmp_path / name.replace(" ", "-"), dice, inputs)
        record_property(name, dict(found))
        assert found["refused"] + found["found"] >= inputs // 20, f"{name}: {found}"
        assert outcome(target.reads, target.folder) == "passed", name
        total += found
    assert total.total() >= INPUTS


def converted(source: Path, target: Path) -> str:
    """Whether a conversion wrote or refused; it may change `target` and the hidden folder that becomes it."""
    before = tree(target.parent)
    with WATCH.written() as written:
        try:
            convert(source, target)
            found = "written"
        except UserError:
            found = "refused"
    names = [Path(path).relative_to(target.parent).parts[:1] for path in written if not path.startswith("/dev/")]
    assert all(name and (name[0] == target.name or name[0].startswith(f".{target.name}.")) for name in names), written
    after = [path for path in tree(target.parent) if found == "refused" or not path.is_relative_to(target)]
    assert after == before
    return found


def test_a_conversion_of_damaged_files_writes_inside_its_output_or_nothing(targets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dice, found = random.Random("qwen2tool convert"), Counter[str]()
    for name in ("config and index", "torch pickle", "gguf"):
        folder, damage = targets[name].folder, targets[name].damage
        for _ in range(40):
            source = shutil.copytree(folder, tmp_path / "in")
            damage(source, dice)
            found[converted(source / "m.gguf" if name == "gguf" else source, tmp_path / "out")] += 1
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.rmtree(source)
    assert found["written"] > 5 and found["refused"] > 20, found


def hangs(_: Path) -> None:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("reads", "seen"),
    [
        (lambda _: bytearray(2 * ROOM), MemoryError),
        (lambda _: torch.empty(2 * ROOM, dtype=torch.uint8), RuntimeError),
        (hangs, TimeoutError),
        (lambda _: (_ for _ in ()).throw(zipfile.BadZipFile), zipfile.BadZipFile),
        (lambda _: (_ for _ in ()).throw(UserError("no remedy", "")), AssertionError),
        (lambda folder: (folder / "note").write_text("read"), AssertionError),
        (lambda folder: (folder / "config.json").open("r+").close(), AssertionError),
        (lambda folder: (folder.parent.parent / "elsewhere").mkdir(), AssertionError),
        (lambda folder: (folder / "config.json").rename(folder / "other"), AssertionError),
    ],
    ids=["memory", "memory of torch", "hang", "traceback", "no remedy", "a file", "a change", "outside", "a move"],
)
def test_each_forbidden_outcome_is_seen(tmp_path, monkeypatch, reads, seen):
    """Negative controls: what no reader may do."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    folder = tmp_path / "around" / "folder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(seen):
        outcome(reads, folder)
    assert outcome(lambda folder: (folder / "config.json").exists(), folder) == "passed"


@pytest.mark.parametrize("place", ["beside", "../above"])
def test_a_conversion_that_writes_elsewhere_is_seen(targets, tmp_path, monkeypatch, place):
    source, work = targets["gguf"].folder / "m.gguf", tmp_path / "work"
    work.mkdir()
    assert converted(source, work / "out") == "written"
    shutil.rmtree(work / "out")

    def escapes(source: Path, target: Path) -> None:
        (work / place).write_text("here")

    monkeypatch.setattr(sys.modules[__name__], "convert", escapes)
    with pytest.raises((AssertionError, ValueError)):
        converted(source, work / "out")


def test_sizes_of_a_config_are_those_of_its_tensors(tmp_path):
    """transformers makes a table of head_dim numbers on the CPU: it is not asked to where no tensor has them."""
    huge = write_tiny(tmp_path / "huge", **SMALL)
    reads = compared_with(huge)
    assert outcome(reads, huge) == "passed"
    wide = shutil.copytree(huge, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"head_dim": 2**31}))
    assert outcome(reads, wide) == "passed"
