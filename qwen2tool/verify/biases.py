"""Which q/k/v biases are gone, zero or changed, in words: "the v bias of layer 12 is zero"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from qwen2tool.checkpoint.inventory import BIAS_NAME, QKV
from qwen2tool.verify.tensors import TensorComparison


def describe_biases(missing: Iterable[str], found: Iterable[TensorComparison], layers: int) -> list[str]:
    """One clause for each group of projections in one state in the same layers.

    Args:
        missing: names that the candidate lacks; others than biases are passed over.
        found: comparisons; biases that are identical or one rounding away are passed over.
        layers: of the reference, to say "all".
    """
    states = dict.fromkeys(missing, "missing")
    states |= {t.name: "zero" if t.zeroed else "different" for t in found if t.kind == "different"}
    where: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, state in states.items():
        if (match := BIAS_NAME.fullmatch(name)) and match[2] in QKV:
            where[state, match[2]].append(int(match[1]))
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (state, projection), numbers in where.items():
        groups[state, tuple(sorted(numbers))].append(projection)
    return [_clause(sorted(names, key=QKV.index), numbers, state, layers) for (state, numbers), names in groups.items()]


def _clause(projections: Sequence[str], numbers: Sequence[int], state: str, layers: int) -> str:
    single = len(projections) == len(numbers) == 1
    noun, verb = ("bias", "is") if single else ("biases", "are")
    return f"the {join(projections)} {noun} of {_layers(numbers, layers)} {verb} {state}"


def _layers(numbers: Sequence[int], layers: int) -> str:
    if len(numbers) == layers > 1:
        return f"all {layers} layers"
    return ("layer " if len(numbers) == 1 else "layers ") + join(list(_runs(numbers)))


def _runs(numbers: Sequence[int]) -> Iterable[str]:
    """Ascending numbers with neighbours drawn together: 0-2, 5."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield str(numbers[start]) if end - start == 1 else f"{numbers[start]}-{numbers[end - 1]}"
            start = end


def join(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
