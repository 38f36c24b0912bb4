"""The two sides of a comparison, opened: which tensors each has, and which adapters stand beside a layer unmerged.

The reference's adapters are not added to its weights: they run beside them as PEFT runs them, out = W x + b + s B A x.
So the truth shares no code with any merge, and the noise is that of the function that was trained. A candidate's
adapters are added to its weights in fp32, as a merge does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, Adapter, delta, open_adapter, require_fit
from qwen2tool.checkpoint.folder import open_checkpoint, resolve
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.reader import read_tensor
from qwen2tool.checkpoint.view import AnyTensor, Derived, View
from qwen2tool.convert.read import as_checkpoint, open_qwen2
from qwen2tool.errors import UserError

Base = Literal["16bit", "nf4"]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One adapter's part in one linear: A (rank, in), B (out, rank) in fp32, and their scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What it adds to the linear's output, in the dtype of A (as PEFT computes it)."""
        added: torch.Tensor = torch.nn.functional.linear(torch.nn.functional.linear(x.to(self.a.dtype), self.a), self.b)
        return added * self.scaling


@dataclass(frozen=True, kw_only=True)
class Side:
    """What layers are read from, and the adapters beside them."""

    view: View
    adapters: tuple[Adapter, ...] = ()

    @property
    def layers(self) -> int:
        return self.view.geometry.num_hidden_layers

    def low_rank(self, module: str, device: str) -> list[LowRank]:
        """The adapters' parts in `module`, in order."""
        found = [adapter.pairs[module] for adapter in self.adapters if module in adapter.pairs]
        return [
            LowRank(
                a=read_tensor(pair.a).to(device, torch.float32),
                b=read_tensor(pair.b).to(device, torch.float32),
                scaling=pair.scaling,
            )
            for pair in found
        ]

    def update(self, name: str) -> torch.Tensor | None:
        """What a merge adds to the weight `name`, fp32; None where nothing does."""
        module = name.removesuffix(".weight")
        parts = [delta(adapter.pairs[module]) for adapter in self.adapters if module in adapter.pairs]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] if parts else None


@dataclass(frozen=True, kw_only=True)
class Sides:
    """`stored` is what tensors are held against: the reference's base as stored, whatever carries the adapters."""

    reference: Side
    candidate: Side
    stored: View


def open_sides(
    reference: str | Path,
    candidate: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    adapter_on: Base = "16bit",
    candidate_adapters: Sequence[str | Path] = (),
) -> Sides:
    """Opens both. A side that is named by an adapter folder is its base with that adapter.

    Raises:
        UserError: a reference that is no whole Qwen2 (exit code 2: nobody can know then), a candidate that is none at
            all, an adapter that does not fit.
    """
    base, mine = _with_base(reference, adapters)
    if adapter_on == "nf4" and not mine:
        raise UserError("--adapter-on is nf4, but there is no --adapter", "Name the adapter, or leave it out")
    try:
        stored = open_qwen2(base)
        if _drops_biases(stored):
            raise UserError(
                f"{stored.path}: in Llama's layout with attention_bias off, so readers drop its biases",
                "Set attention_bias to true in its config.json",
            )
    except UserError as error:
        raise UserError(f"the reference is not whole: {error.what}", error.fix) from None
    _require_once(mine)
    opened = tuple(open_adapter(resolve(adapter)) for adapter in mine)
    for adapter in opened:
        # Another base than the trained one is a note: a merge onto it was asked for by name, and has to be judged.
        require_fit(adapter, as_checkpoint(stored), allow_other_base=True)
    carrier = open_qwen2(base, nf4=True) if adapter_on == "nf4" else stored
    other, theirs = _with_base(candidate, candidate_adapters)
    _require_once(theirs)
    view = open_qwen2(other, adapters=theirs, whole=False, allow_other_base=True)
    if _drops_biases(view):
        view = replace(view, tensors={n: t for n, t in view.tensors.items() if not n.endswith(".bias")})
    return Sides(reference=Side(view=carrier, adapters=opened), candidate=Side(view=view), stored=stored)


def _require_once(adapters: Sequence[str | Path]) -> None:
    """Passes adapters that are each named once: a side that is an adapter's folder has that adapter already."""
    paths = [resolve(adapter).resolve() for adapter in adapters]
    again = next((path for n, path in enumerate(paths) if path in paths[:n]), None)
    if again is not None:
        raise UserError(
            f"{again}: named twice for one side, which would add the adapter twice",
            "Name an adapter's folder as the side itself, or its base with --adapter, not both",
        )


def _drops_biases(view: View) -> bool:
    """Whether config.json makes every reader pass over the biases, present or not: a Qwen2 that was renamed a Llama."""
    config = view.origin.config
    return config.get("model_type") == "llama" and not config.get("attention_bias")


@contextmanager
def tokenizer_folder(*names: str | Path) -> Iterator[Path]:
    """A folder with the tokenizer of the first of `names` that has one; a GGUF file's is written out for the while.

    Where none has one, the folder of the first, for whoever loads it to complain about.
    """
    with ExitStack() as stack:
        folders = []
        for name in names:
            path = resolve(_with_base(name, [])[0])
            if path.suffix == ".gguf":
                path = _write_tokenizer(path, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            path = path if path.is_dir() else path.parent
            folders.append(path)
            if any((path / file).is_file() for file in ("tokenizer.json", "vocab.json")):
                yield path
                return
        yield folders[0]


def _write_tokenizer(file: Path, folder: Path) -> Path:
    from qwen2tool.convert.gguf_tokenizer import side_files_of_gguf

    for name, data in side_files_of_gguf(open_checkpoint(file)).items():
        (folder / name).write_bytes(data)
    return folder


def _with_base(name: str | Path, adapters: Sequence[str | Path]) -> tuple[str | Path, list[str | Path]]:
    """(what to open, the adapters on it): an adapter folder stands for the base that it names."""
    path = resolve(name)
    if not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
        return name, list(adapters)
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path / ADAPTER_CONFIG}: names no base", "Name the base, and the adapter with --adapter")
    return base, [name, *adapters]


def zeros_where_missing(view: View, shapes: dict[str, tuple[int, ...]]) -> dict[str, AnyTensor]:
    """The tensors of a view, with zeros for the biases it lacks: what transformers makes of such a checkpoint."""
    tensors = dict(view.tensors)
    for name, shape in shapes.items():
        if name.endswith(".bias") and name not in tensors:
            tensors[name] = Derived(name=name, dtype="F32", shape=shape, sources=(), compute=_zeros(shape))
    return tensors


def _zeros(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(shape)
