"""A model on a hub, opened by ranged requests of the real client: what a folder says, for a few hundred kB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen2tool.checkpoint.facts import files_section
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, geometry
from qwen2tool.checkpoint.header import parse_header
from qwen2tool.checkpoint.writer import Slot, plan_shards, write_index
from tests.checkpoint.edits import drop
from tests.checkpoint.torch_files import as_bins
from tests.hub.client import from_shell
from tests.hub.server import Hub, Repo, running_hub

CONFIG_72B = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FIRST, SECOND = "1" * 40, "2" * 40


def plant_72b(folder: Path, lost: str = "") -> dict[str, Path]:
    """The files of a 72B whose shards are true headers in front of a hole; without tensor `lost`."""
    names = {name: shape for name, shape in expected_tensors(geometry(CONFIG_72B)).items() if name != lost}
    slots = [Slot(name=name, dtype="BF16", shape=shape) for name, shape in names.items()]
    shards = plan_shards(slots, 4_000_000_000)
    folder.mkdir()
    for file, planned in shards.items():
        header, begin = {}, 0
        for slot in planned:
            header[slot.name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [begin, begin + slot.nbytes]}
            begin += slot.nbytes
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + begin)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG_72B))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "tokenizer.json").write_bytes(b" " * 11_000_000)
    return {file.name: file for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hub():
    with running_hub() as running:
        yield running


def put(hub: Hub, repo: str, folder: Path, **more: Path) -> None:
    """`folder` as the newest commit of `repo`; `more` are branches with folders of their own."""
    branches = {"main": FIRST} | dict.fromkeys(more, SECOND)
    files = {FIRST: {file.name: file.read_bytes() for file in folder.iterdir()}}
    for other in more.values():
        files[SECOND] = {file.name: file.read_bytes() for file in other.iterdir()}
    hub.repos[repo] = Repo(private=False, files=files, branches=branches)


def ask(home: Path, url: str, *jobs: tuple[str, str, str | None], **env: str):
    """One result a job, from one process."""
    file = home / "jobs.json"
    file.write_text(json.dumps(jobs))
    options = {"HF_TOKEN": "reader", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    run = from_shell(home, url, "tests.checkpoint.remote_client", str(file), env=options)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_72b_for_a_few_hundred_kilobytes(hub, tmp_path):
    files = plant_72b(tmp_path / "72b")
    hub.repos["big/whole"] = Repo(private=False, files={FIRST: files}, branches={"main": FIRST})
    lost = "model.layers.41.self_attn.k_proj.bias"
    damaged = plant_72b(tmp_path / "lost", lost)
    hub.repos["big/lost"] = Repo(private=False, files={FIRST: damaged}, branches={"main": FIRST})
    before, asked = hub.sent, len(hub.requests)
    (found,) = ask(tmp_path, hub.url, ("open", "big/whole", None))
    sent, requests = hub.sent - before, hub.requests[asked:]
    assert (found["layers"], len(found["tensors"]), found["missing"], found["extra"]) == (80, 80 * 12 + 3, [], [])
    shards = found["files"]["shards"]
    assert len(shards) == sum(name.startswith("model-") for name in files) > 35
    assert {s["name"]: s["bytes"] for s in shards} == {s["name"]: files[s["name"]].stat().st_size for s in shards}
    assert found["files"]["bytes"] > 145e9 and found["files"]["index"] == "consistent"
    assert sum(".safetensors" in r and "index" not in r for r in requests) == len(shards)  # one each
    assert 100_000 < sent < 500_000 and found["seconds"] < 10 and not found["torch"]
    assert not any(request.endswith("tokenizer.json") for request in requests)
    assert "11.0 MB" in found["files"]["unread"]["tokenizer.json"] and "tokenizer.json" not in found["side"]
    (found,) = ask(tmp_path, hub.url, ("open", "big/lost", None))
    assert found["missing"] == [lost]


def test_remote_and_local_say_the_same(hub, base_folder, base_copy, tmp_path):
    drop(base_copy, "layers.1.self_attn.q_proj.bias")
    put(hub, "me/tiny", base_folder, lossy=base_copy)
    whole, lossy, commit = ask(
        tmp_path, hub.url, ("open", "me/tiny", None), ("open", "me/tiny", "lossy"), ("open", "me/tiny", SECOND)
    )
    for found, folder in ((whole, base_folder), (lossy, base_copy)):
        local = open_checkpoint(folder)
        tensors = {n: [t.dtype, list(t.shape), t.file.name, t.start, t.end] for n, t in local.tensors.items()}
        assert found["tensors"] == tensors and found["path"] == "me/tiny"
        here = files_section(local)
        assert all(found["files"][key] == here[key] for key in ("bytes", "index", "declared_bytes", "tensor_bytes"))
        shards = [[(s["name"], s["bytes"], s["tensors"]) for s in files["shards"]] for files in (found["files"], here)]
        assert shards[0] == shards[1] and (here["unread"], here["commit"]) == ({}, None)
    assert (whole["commit"], lossy["commit"], commit["missing"]) == (FIRST, SECOND, lossy["missing"])
    assert lossy["missing"] == ["model.layers.1.self_attn.q_proj.bias"] and whole["missing"] == []


def damaged_copy(folder: Path, target: Path, **changes: bytes | None) -> Path:
    shutil.copytree(folder, target)
    for name, data in changes.items():
        file = target / name.replace("__", "-").replace("_st", ".safetensors")
        file.unlink() if data is None else file.write_bytes(data)
    return target


def test_what_cannot_be_opened_is_one_sentence(hub, base_folder, adapter_folder, base_copy, tmp_path):
    shard = "model-00002-of-00002.safetensors"
    cut = shutil.copytree(base_folder, tmp_path / "cut")
    (cut / shard).write_bytes((cut / shard).read_bytes()[:-1])
    gone = shutil.copytree(base_folder, tmp_path / "gone")
    (gone / shard).unlink()
    bare = shutil.copytree(base_folder, tmp_path / "bare")
    (bare / "config.json").unlink()
    huge = shutil.copytree(base_folder, tmp_path / "huge")
    (huge / "tokenizer_config.json").write_bytes(b" " * 20_000_001)
    for name, folder in {"whole": base_folder, "cut": cut, "gone": gone, "bare": bare, "huge": huge}.items():
        put(hub, f"bad/{name}", folder)
    put(hub, "bad/adapter", adapter_folder)
    put(hub, "bad/bins", as_bins(base_copy))
    for name, count in {"two": 2, "none": 0}.items():
        ggufs = tmp_path / f"ggufs-{name}"
        ggufs.mkdir()
        (ggufs / "config.json").write_text("{}")
        for number in range(count):
            (ggufs / f"q{number}.gguf").write_bytes(b"GGUF")
        put(hub, f"bad/{name}-ggufs", ggufs)
    hub.repos["bad/gated"] = Repo(
        private=False, files=hub.repos["bad/whole"].files, branches={"main": FIRST}, gated=True
    )
    wanted = {
        ("open", "bad/cut", None): rf"bad/cut/{shard}: truncated",
        ("open", "bad/gone", None): f"names shard {shard}",
        ("open", "bad/bare", None): "no config.json",
        ("open", "bad/huge", None): "its tokenizer_config.json has 20.0 MB",
        ("open", "bad/adapter", None): "a PEFT adapter",
        (
            "open",
            "bad/bins",
            None,
        ): "no model.safetensors and no index on the Hub, whose headers could be read (it has other .bin",
        ("open", "bad/gated", None): "bad/gated: is gated, and you have no access",
        ("fetch", "bad/gated", None): "is gated",
        ("open", "bad/none", None): "bad/none: no such folder here, and the Hub shows no such model",
        ("fetch", "bad/none", None): "the Hub shows no such model",
        ("open", "bad/whole", "no-such"): "bad/whole: has no revision 'no-such'",
        ("fetch", "bad/whole", "no-such"): "has no revision 'no-such'",
        ("fetch", "bad/two-ggufs", None): "bad/two-ggufs: holds 2 .gguf files (q0.gguf, q1.gguf",
        ("fetch", "bad/none-ggufs", None): "holds no weights",
        ("open", "bad/two-ggufs", None): "(it has other .gguf files)",
        ("adapter", "bad/none", None): "shows no such model",
    }
    results = ask(tmp_path, hub.url, *wanted)
    for job, found in zip(wanted, results, strict=True):
        assert wanted[job] in found["error"] and found["fix"], (job, found)
        assert "http" not in found["error"] and "reader" not in found["error"]
    hub.whole_files = True
    try:
        (found,) = ask(tmp_path, hub.url, ("open", "bad/whole", None))
        assert "sends whole files only" in found["error"]
    finally:
        hub.whole_files = False


def test_offline_and_unreachable(hub, base_folder, tmp_path):
    put(hub, "me/kept", base_folder)
    jobs = (("open", "me/kept", None), ("fetch", "me/kept", None))
    for found in ask(tmp_path, hub.url, *jobs, HF_HUB_OFFLINE="1"):
        assert "HF_HUB_OFFLINE is set" in found["error"]
    for found in ask(tmp_path, "http://127.0.0.1:9", *jobs):
        assert "cannot be reached" in found["error"] and "network" in found["fix"]
    for found in ask(tmp_path, hub.url, *jobs, HF_TOKEN="stranger"):
        assert "error" in found and "stranger" not in json.dumps(found)
    assert "error" not in ask(tmp_path, hub.url, jobs[1])[0]
    (found,) = ask(tmp_path, hub.url, jobs[1], HF_HUB_OFFLINE="1")  # what was fetched before is there
    assert "config.json" in found["files"]


def test_downloads_hold_what_is_needed_and_no_more(hub, base_folder, adapter_folder, base_copy, tmp_path):
    both = as_bins(shutil.copytree(base_folder, tmp_path / "both"))
    for file in base_folder.glob("*.safetensors*"):
        shutil.copyfile(file, both / file.name)
    (both / "modeling_own.py").write_text("raise SystemExit")
    other = shutil.copytree(base_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 5}))
    put(hub, "get/both", both, next=other)
    put(hub, "get/bins", as_bins(base_copy, 2))
    put(hub, "get/adapter", adapter_folder)
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "model.gguf").write_bytes(b"GGUF")
    put(hub, "get/gguf", lone)
    hub.repos["get/both"].files[FIRST]["original/consolidated.safetensors"] = b"large"
    fetched, bins, adapter, is_one, is_none, first, branch, gguf = ask(
        tmp_path,
        hub.url,
        ("fetch", "get/both", None),
        ("count", "get/bins", None),
        ("fetch", "get/adapter", None),
        ("adapter", "get/adapter", None),
        ("adapter", "get/both", None),
        ("count", "get/both", None),
        ("count", "get/both", "next"),
        ("fetch", "get/gguf", None),
    )
    assert gguf["files"] == ["model.gguf"]
    assert fetched["files"] == sorted(file.name for file in base_folder.iterdir())
    assert bins == {"format": "bin", "tensors": 39, "seed": None}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(adapter["files"])
    assert (is_one, is_none) == (True, False)
    assert (first["seed"], branch["seed"]) == (None, 5)


def test_the_planted_headers_are_true(tmp_path):
    """The 72B of this test is a checkpoint that opens here as well, so what is measured is not a lucky fake."""
    files = plant_72b(tmp_path / "72b")
    local = open_checkpoint(tmp_path / "72b")
    assert local.nbytes == sum(2 * info.numel for info in local.tensors.values()) > 145e9
    shard = next(file for name, file in files.items() if name.startswith("model-00002"))
    with shard.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = parse_header(shard, handle.read(length), 8 + length, shard.stat().st_size)
    assert header.tensors.keys() == {name for name, info in local.tensors.items() if info.file == shard}
