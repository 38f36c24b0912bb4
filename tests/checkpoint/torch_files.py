"""torch's zip files put together by hand, member by member, with any pickle in them."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def as_bins(folder: Path, shards: int = 1) -> Path:
    """Replaces the safetensors of `folder` by pytorch_model.bin, or by so many shards and their index."""
    import json

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors*")):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = list(state)
    files = {
        name: f"pytorch_model-{1 + i * shards // len(names):05d}-of-{shards:05d}.bin" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """A zip with `x/data.pkl` and members `x/NAME`, __ in a name standing for a slash."""
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            out.writestr(f"x/{name.replace('__', '/')}", data)
    return path


def edited(source: Path, target: Path, **changes: bytes | None) -> Path:
    """A copy of a torch file with members replaced, added, or with None removed."""
    with zipfile.ZipFile(source) as old:
        top = next(name for name in old.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        members = {name.removeprefix(top): old.read(name) for name in old.namelist()}
    members |= {name.replace("__", "/"): data for name, data in changes.items()}  # type: ignore[misc]
    with zipfile.ZipFile(target, "w") as out:
        for name, data in members.items():
            if data is not None:
                out.writestr(f"x/{name}", data)
    return target


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as old:
        return old.read(next(name for name in old.namelist() if name.endswith("/data.pkl")))


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def tensor_ops(count: int = 4, shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", kind: str = "Float") -> bytes:
    """Opcodes that push one tensor on storage data/0, of which torch would hold `count` items."""
    storage = b"(X\x07\0\0\0storagectorch\n" + kind.encode() + b"Storage\nX\x01\0\0\x000X\x03\0\0\0cpuJ"
    storage += count.to_bytes(4, "little") + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89" + hooks + b"tR"


def state_of(tensor: bytes, name: bytes = b"w") -> bytes:
    """The pickle of {name: tensor} whose tensor these opcodes push."""
    return b"\x80\x02}X" + len(name).to_bytes(4, "little") + name + tensor + b"s."


def dumps(value: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    pickle.Pickler(out, protocol=protocol).dump(value)
    assert list(pickletools.genops(out.getvalue()))
    return out.getvalue()
