"""The pickle inside a .bin file, as data: which tensors it describes, with nothing imported, called or built.

A pickle is a program for a stack machine, and its GLOBAL and REDUCE run any function of any module: loading a
downloaded .bin has been a way to take over a machine. torch's `weights_only` runs it in a restricted machine of its
own; this is a smaller one, since a checkpoint needs only strings, numbers, dicts and three functions of torch, whose
calls are recorded instead of made. Anything else is refused by name. Arguments are decoded by the standard library's
pickletools, which builds no objects; the number of steps is bounded, and no key is hashed that is no string (the
hash of a tuple that holds itself twice, forty times over, never ends).
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool.errors import UserError

MAX_OPCODES = 1_000_000
"""A 72B in one file has 50,000; a million take two seconds."""
UNSAFE = "Do not load it with other tools either; get the model as safetensors"
DAMAGED = "Download or copy the file again: it is damaged"
STATE_ONLY = "Save its state_dict alone: torch.save(model.state_dict(), FILE)"

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A run of `count` items of `dtype` in the archive's member data/`key`; without a dtype, of bytes."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as torch describes it: `offset` and `stride` count items of `dtype` in `storage`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{ascii(self.module)[1:-1][:60]}.{ascii(self.name)[1:-1][:60]}"


ORDERED_DICT = _Global("collections", "OrderedDict")
UNTYPED = _Global("torch.storage", "UntypedStorage")
REBUILD_V2 = _Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = _Global("torch._utils", "_rebuild_tensor_v3")
PARAMETER = _Global("torch._utils", "_rebuild_parameter")
STORAGE_CLASSES = {_Global("torch", name): dtype for name, dtype in STORAGES.items()}
DTYPE_OBJECTS = {_Global("torch", name): dtype for name, dtype in DTYPES.items()}
KNOWN = {ORDERED_DICT, UNTYPED, REBUILD_V2, REBUILD_V3, PARAMETER, *STORAGE_CLASSES, *DTYPE_OBJECTS}
MARK = _Global("", "(")
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


class _Corrupt(Exception):
    """The pickle makes no sense; the argument says why."""


def read_state(file: Path, pickled: bytes) -> dict[str, Stored]:
    """Name -> tensor of the state dict that `pickled` describes; `file` is only named in errors.

    Raises:
        UserError: it asks for a global that no checkpoint needs, holds something that is no tensor, or is damaged.
    """
    try:
        value = _Machine(file).run(pickled)
    except (_Corrupt, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = ascii(str(error))[1:-1][:80] or type(error).__name__
        raise UserError(f"{file}: its pickle is damaged ({reason})", DAMAGED) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {_kind(value)}, not a state dict", STATE_ONLY)
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise UserError(f"{file}: holds a {_kind(tensor)} under {ascii(name)[:80]}, not a tensor", STATE_ONLY)
    return value


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Stored) else type(value).__name__.lstrip("_").lower()


class _Machine:
    """The stack machine; every opcode that is not in its table is refused."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        stream = io.BytesIO(pickled)
        for _ in range(MAX_OPCODES):
            name, argument = self.step(stream)
            if name == "STOP":
                return self.stack.pop()
            if name in PUSHED:
                self.stack.append(PUSHED[name](argument))
            elif name in ACTIONS:
                ACTIONS[name](self, argument)
        raise UserError(f"{self.file}: its pickle has more than {MAX_OPCODES:,} steps", UNSAFE)

    def step(self, stream: io.BytesIO) -> tuple[str, Any]:
        """The next opcode and its argument, which is not even decoded where the opcode is none of ours."""
        code = stream.read(1)
        opcode = OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise _Corrupt(f"no opcode {code!r}" if code else "no end")
        if opcode.name not in ALLOWED:
            raise UserError(f"{self.file}: its pickle uses {opcode.name}, which no checkpoint needs", UNSAFE)
        if opcode.name == "GLOBAL":  # pickletools would take backslashes for escapes, and warn of them
            return opcode.name, (_line(stream), _line(stream))
        return opcode.name, opcode.arg.reader(stream) if opcode.arg else None

    def items(self) -> list[Any]:
        """Pops what was pushed since the last mark."""
        start = len(self.stack) - 1
        while self.stack[start] is not MARK:
            start -= 1
            if start < 0:
                raise _Corrupt("no mark")
        found = self.stack[start + 1 :]
        del self.stack[start:]
        return found

    def put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    def take(self, count: int) -> tuple[Any, ...]:
        """Pops `count` values."""
        if count > len(self.stack):
            raise _Corrupt("an empty stack")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def set_items(self, pairs: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise _Corrupt("items for no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise _Corrupt("a key that is no string")
            target[key] = value

    def append(self, values: list[Any] | tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Corrupt("items for no list")
        self.stack[-1].extend(values)

    def find(self, module: Any, name: Any) -> None:
        wanted = _Global(str(module), str(name))
        if wanted not in KNOWN:
            raise UserError(
                f"{self.file}: its pickle asks for {wanted}, which no checkpoint needs; nothing of it was run", UNSAFE
            )
        self.stack.append(wanted)

    def build(self, _: Any) -> None:
        """An OrderedDict's attributes (torch's `_metadata`: versions of modules), which say nothing of tensors."""
        if type(self.take(2)[0]) is not dict:
            raise _Corrupt("attributes for no dict")

    def build_kept(self, argument: Any) -> None:
        target = self.stack[-2]
        self.build(argument)
        self.stack.append(target)

    def storage(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", _Global() as kind, str(key), str(), int(count)) if kind in STORAGE_CLASSES:
                self.stack.append(Storage(key=key, dtype=STORAGE_CLASSES[kind], count=count))
            case ("storage", _Global() as kind, str(key), str(), int(count)) if kind == UNTYPED:
                self.stack.append(Storage(key=key, dtype=None, count=count))
            case _:
                raise _Corrupt("a storage that is none")

    def call(self, _: Any) -> None:
        function, arguments = self.take(2)
        match function, arguments:
            case _Global() as f, () if f == ORDERED_DICT:
                self.stack.append({})
            case _Global() as f, (Storage() as storage, offset, shape, stride, bool(), dict(), *_) if f == REBUILD_V2:
                self.stack.append(_stored(storage, storage.dtype, offset, shape, stride))
            case _Global() as f, (Storage() as storage, offset, shape, stride, bool(), dict(), kind, *_) if (
                f == REBUILD_V3 and isinstance(kind, _Global)
            ):
                self.stack.append(_stored(storage, DTYPE_OBJECTS.get(kind), offset, shape, stride))
            case _Global() as f, (Stored() as tensor, bool(), dict()) if f == PARAMETER:
                self.stack.append(tensor)
            case _:
                raise _Corrupt(f"a call of {function if isinstance(function, _Global) else 'no function'}")


def _line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise _Corrupt("a name without end")
    return line[:-1].decode()


def _stored(storage: Storage, dtype: str | None, offset: Any, shape: Any, stride: Any) -> Stored:
    if dtype is None or not all(map(_is_count, (offset, storage.count))):
        raise _Corrupt("a tensor without a type or place")
    if not _are_counts(shape) or not _are_counts(stride) or len(shape) != len(stride):
        raise _Corrupt("a tensor without a shape")
    return Stored(storage=storage, dtype=dtype, offset=offset, shape=shape, stride=stride)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 64 and all(map(_is_count, value))


PUSHED: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
} | dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), lambda value: value
)
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.items())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.items()),
    "GLOBAL": lambda machine, argument: machine.find(*argument),
    "STACK_GLOBAL": lambda machine, _: machine.find(*machine.take(2)),
    "BUILD": _Machine.build_kept,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
}
ALLOWED = {*PUSHED, *ACTIONS, "PROTO", "FRAME", "STOP"}
