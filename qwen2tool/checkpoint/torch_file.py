"""A .bin or .pth file of torch, read by its headers: no torch, no unpickling, no copy of any tensor.

Since torch 1.6 such a file is a zip archive (https://docs.pytorch.org/docs/stable/notes/serialization.html):
`NAME/data.pkl` describes the tensors (read by `torch_pickle`, as data) and `NAME/data/0`, `NAME/data/1`, ... are their
bytes, stored and not deflated. So a tensor is a range of bytes of the file, just as in safetensors, and everything
that works on those works on these. Costs the archive's directory, the pickle and 30 bytes a member.
"""

from __future__ import annotations

import io
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import BinaryIO

from qwen2tool.checkpoint.header import ITEM_BYTES, Header, TensorInfo, is_text, refuse_other_downloads
from qwen2tool.checkpoint.torch_pickle import DAMAGED, Stored, read_state
from qwen2tool.errors import UserError

MAX_DIRECTORY = 4_000_000
"""Bytes of a zip directory; 1,000 tensors take 100 kB."""
MAX_PICKLE = 16_000_000
LEGACY = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02\x8a\nl\xfc")
LOCAL_HEADER = struct.Struct("<4s22xHH")
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError, EOFError, struct.error)
RESAVE = "torch.save(torch.load(FILE, weights_only=True, map_location='cpu'), FILE)"


def read_torch_file(file: Path) -> Header:
    """All tensors of `file`, in the order of its state dict.

    Raises:
        UserError: not torch's zip format, a pickle that is more than a state dict of contiguous tensors, or damage.
    """
    with file.open("rb") as handle:
        _require_zip(file, handle)
        archive = _Archive(file, handle)
        _require_little_endian(archive)
        stored = read_state(file, archive.read("data.pkl", MAX_PICKLE))
        places = archive.places({f"data/{tensor.storage.key}" for tensor in stored.values()})
    infos = (_info(file, name, tensor, places[f"data/{tensor.storage.key}"]) for name, tensor in stored.items())
    return Header(tensors={info.name: info for info in infos}, metadata={})


def _require_zip(file: Path, handle: BinaryIO) -> None:
    start = handle.read(len(LEGACY[0]))
    if start.startswith(LEGACY):
        raise UserError(
            f"{file}: written by a torch before 1.6, as a bare pickle", f"Save it again where you trust it: {RESAVE}"
        )
    refuse_other_downloads(file, start)
    if not start.startswith(b"PK\x03\x04"):
        raise UserError(f"{file}: not a file of torch (no zip archive)", DAMAGED)


class _Directory(io.BufferedReader):
    """A file that zipfile cannot be made to read at length: it takes the directory's size from the file itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(MAX_DIRECTORY + 1 if size is None or size < 0 else min(size, MAX_DIRECTORY + 1))
        if len(found) > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of more than {MAX_DIRECTORY} bytes")
        return found


class _Archive:
    """The members of a torch archive by their names below its one top folder."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file, self.handle = file, handle
        try:
            with file.open("rb", buffering=0) as raw, zipfile.ZipFile(_Directory(raw)) as archive:
                members = archive.infolist()
        except ZIP_ERRORS as error:
            raise UserError(f"{file}: corrupt zip archive ({ascii(str(error))[1:-1][:80]})", DAMAGED) from None
        self.size = file.stat().st_size
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise UserError(f"{file}: a zip archive, but not one of torch (no data.pkl in it)", DAMAGED)
        top = pickles[0].removesuffix("data.pkl")
        self.members = {m.filename.removeprefix(top): m for m in members if m.filename.startswith(top)}
        if len(self.members) != len(members):
            raise UserError(f"{file}: its archive names a member twice, or in another folder", DAMAGED)

    def read(self, name: str, most: int) -> bytes:
        start, end = self.place(name)
        if end - start > most:
            raise UserError(f"{self.file}: {name} in its archive has {end - start} bytes", DAMAGED)
        self.handle.seek(start)
        return self.handle.read(end - start)

    def place(self, name: str) -> tuple[int, int]:
        """Where the bytes of a member begin and end in the file."""
        member = self.members.get(name)
        if member is None:
            raise UserError(f"{self.file}: its archive has no {ascii(name)[1:-1][:80]}", DAMAGED)
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.flag_bits & 1
            or member.compress_size != member.file_size
        ):
            raise UserError(
                f"{self.file}: {name} in its archive is packed or encrypted, which torch does not do",
                f"Save it again where you trust it: {RESAVE}",
            )
        offset = member.header_offset
        self.handle.seek(offset if 0 <= offset < self.size else self.size)
        local = self.handle.read(LOCAL_HEADER.size)
        signature, named, extra = LOCAL_HEADER.unpack(local) if len(local) == LOCAL_HEADER.size else (b"", 0, 0)
        start = offset + LOCAL_HEADER.size + named + extra
        if signature != b"PK\x03\x04" or start + member.file_size > self.size:
            raise UserError(f"{self.file}: {name} of its archive lies outside the file", DAMAGED)
        return start, start + member.file_size

    def places(self, names: set[str]) -> dict[str, tuple[int, int]]:
        """`place` of each, which may not overlap: a small file could claim any number of large tensors."""
        found = {name: self.place(name) for name in names}
        last = 0
        for start, end in sorted(found.values()):
            if start < last:
                raise UserError(f"{self.file}: members of its archive overlap", DAMAGED)
            last = end
        return found


def _require_little_endian(archive: _Archive) -> None:
    """The member is there since torch 2.1; before that, files were as the machine was."""
    if "byteorder" in archive.members and archive.read("byteorder", 16) != b"little":
        raise UserError(f"{archive.file}: written on a big-endian machine", f"Save it again on this one: {RESAVE}")


def _info(file: Path, name: str, tensor: Stored, place: tuple[int, int]) -> TensorInfo:
    if not is_text(name):
        raise UserError(f"{file}: names a tensor {ascii(name)[:80]}", DAMAGED)
    item = ITEM_BYTES[tensor.dtype]
    stored = tensor.storage.count * ITEM_BYTES[tensor.storage.dtype or "U8"]
    start = place[0] + tensor.offset * item
    end = start + prod(tensor.shape) * item
    if stored != place[1] - place[0]:
        raise UserError(
            f"{file}: tensor {name!r} needs a storage of {stored} bytes, the archive has {place[1] - place[0]}", DAMAGED
        )
    if tensor.stride != _row_major(tensor):
        raise UserError(
            f"{file}: tensor {name!r} of shape {list(tensor.shape)} is stored with strides {list(tensor.stride)}",
            "Save it again with every tensor made contiguous(), or as safetensors",
        )
    if end > place[1]:
        raise UserError(f"{file}: tensor {name!r} ends beyond its storage", DAMAGED)
    return TensorInfo(name=name, dtype=tensor.dtype, shape=tensor.shape, file=file, start=start, end=end)


def _row_major(tensor: Stored) -> tuple[int, ...]:
    """The strides of a contiguous tensor; those of a dimension of one, or of an empty tensor, may be anything."""
    if 0 in tensor.shape:
        return tensor.stride
    wanted, step = [], 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        wanted.append(stride if size == 1 else step)
        step *= size
    return tuple(reversed(wanted))
