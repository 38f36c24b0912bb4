"""What is wrong between two checkpoints, in words, where the pattern is known: "the v bias of layer 12 is zero".

The stages before say that and where two sides differ; here each difference is held against the ways in which tools and
people damage checkpoints (`patterns`). Pairs are read again one at a time: every vector, and at most `MOST_MATRICES`
matrices, whose pattern then stands for the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen2tool.checkpoint.view import AnyTensor, View
from qwen2tool.verify.inventory import HEAD, TABLE, InventoryComparison, cannot_run, used_tensors
from qwen2tool.verify.limits import SMALLEST_MEAN_KLD
from qwen2tool.verify.patterns.adapters import find_factors, find_not_finite, findings_of, pairs_of
from qwen2tool.verify.patterns.entries import examine, examine_plainly
from qwen2tool.verify.patterns.files import (
    find_in_config,
    find_in_inventory,
    find_in_shapes,
    find_in_storage,
    find_other_model,
    find_split_head,
)
from qwen2tool.verify.patterns.finding import Finding, noun
from qwen2tool.verify.patterns.lowrank import find_rank
from qwen2tool.verify.patterns.places import Places, find_places
from qwen2tool.verify.patterns.sentences import CODES, sentence, without_config
from qwen2tool.verify.statistics import LogitFigures
from qwen2tool.verify.tensors import TensorComparison, numbers

if TYPE_CHECKING:
    from qwen2tool.checkpoint.adapter import Adapter

MOST_MATRICES = 64
MOST_OF_ALL = 0.5
MOST_DETAILS = 4
"""Sentences of one kind; beyond, one stands for all."""
WORST = 3
UNLIKE = 0.1
"""Cosine below which two large matrices have nothing in common; 1 / sqrt(entries) is chance."""
MAY_BE_WANTED = (
    "rounded_weights", "entry_rounded", "quantised_weights", "low_rank_update", "arithmetic", "unknown",
    "reference_not_finite", "adapter_not_finite",
)  # fmt: skip
"""Codes that name no mistake of the candidate: a dtype, a quantisation, training, the machine, a reference that is
itself broken, or nothing known."""
ROUNDED_SUMS = "the base with the adapters, rounded more than once on the way"
"""Adapters merged one after the other, or in 16-bit arithmetic."""
Pairs = dict[str, tuple[AnyTensor, AnyTensor]]
"""Name -> (reference's, candidate's) of what differs and is not explained yet; each step takes out what it explains."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One thing that is wrong: `code` for programs (a key of `sentences.CODES`), `sentence` for people, which ends
    with what to do; `tensors` are those concerned, or fields of config.json."""

    code: str
    sentence: str
    tensors: tuple[str, ...]

    @property
    def is_fault(self) -> bool:
        """Whether somebody's mistake is named; the rest may be wanted, or is judged by what it does."""
        if self.code == "rows_changed":  # in a table, tokens were added or trained
            return not {TABLE, HEAD} >= set(self.tensors)
        return self.code not in MAY_BE_WANTED


def diagnose(
    reference: View,
    candidate: View,
    inventory: InventoryComparison,
    tensors: Sequence[TensorComparison],
    figures: LogitFigures | None = None,
    adapters: Sequence[Adapter] = (),
) -> list[Diagnosis]:
    """The differences between two sides in words, the most certain first; empty where there is none.

    Args:
        inventory, tensors: what the first two stages found.
        figures: of the logits; tells a difference that is not in the files.
        adapters: that the candidate should hold. `reference` may hold them already (its view says so) or not.
    """
    layers = reference.geometry.num_hidden_layers
    if other := [*find_other_model(inventory)]:
        return _sentences(other, layers, candidate)
    differing = {t.name: t for t in tensors if t.kind == "different"}
    mine, theirs = used_tensors(reference), used_tensors(candidate)
    found = [
        *find_in_config(inventory, fits=cannot_run(candidate) is None),
        *find_in_inventory(reference, candidate, inventory),
        *find_in_shapes(reference, candidate, inventory),
        *find_split_head(reference, candidate, differing),
    ]
    if any(finding.name == HEAD for finding in found):
        differing.pop(HEAD, None)
    pairs: Pairs = {name: (mine[name], theirs[name]) for name in differing}
    found += _from_vectors(pairs)
    found += _from_adapters(pairs, adapters)
    found += _from_places(reference, differing, pairs)
    found += _from_storage(pairs, differing)
    found += _from_entries(reference, differing, pairs)
    unknown = [name for name in differing if name in pairs]
    found += _from_ranks(unknown, pairs, bool(adapters))
    found += _from_nowhere(reference, [name for name in unknown if name in pairs], differing)
    if not found and figures is not None and not figures.kld_mean <= SMALLEST_MEAN_KLD and _all_identical(tensors):
        found.append(Finding(code="arithmetic", name="logits"))
    return _sentences(_one_rounding(found), layers, candidate)


def _from_vectors(pairs: Pairs) -> list[Finding]:
    """Plain relations of biases and norms, before they are looked for in other places: norms resemble each other."""
    plainly = (examine_plainly(n, numbers(m), numbers(t)) for n, (m, t) in pairs.items() if noun(n) != "weight")
    found = [finding for finding in plainly if finding is not None]
    _take_out(pairs, found)
    return found


def _from_adapters(pairs: Pairs, adapters: Sequence[Adapter]) -> list[Finding]:
    broken = find_not_finite(pairs, adapters)
    _take_out(pairs, broken)
    factors, rounded = {}, []
    for name in [*pairs]:
        if parts := pairs_of(name, adapters):
            mine, theirs = pairs[name]
            held = find_factors(mine, numbers(mine), numbers(theirs), parts)
            if held is None:
                continue
            if held.is_right:
                rounded.append(Finding(code="rounded_weights", name=name, detail=ROUNDED_SUMS))
            factors[name] = [(n, pair, factor) for (n, pair), factor in zip(parts, held.factors, strict=True)]
    found = [*findings_of(factors, adapters), *rounded]
    _take_out(pairs, found)
    return [*broken, *found]


def _from_places(reference: View, differing: dict[str, TensorComparison], pairs: Pairs) -> list[Finding]:
    places = Places(used_tensors(reference))
    sources = {name: places.source(name, pair[1], differing[name].relative_error) for name, pair in pairs.items()}
    found = find_places({name: source for name, source in sources.items() if source is not None}, differing)
    _take_out(pairs, found)
    return found


def _from_storage(pairs: Pairs, differing: dict[str, TensorComparison]) -> list[Finding]:
    found = [*find_in_storage(pairs, differing)]
    _take_out(pairs, found)
    return found


def _from_entries(reference: View, differing: dict[str, TensorComparison], pairs: Pairs) -> list[Finding]:
    """Every vector, and matrices spread over the model; a pattern that all of those share is that of the rest."""
    std = reference.config.get("initializer_range", 0.02)
    matrices = [name for name in pairs if noun(name) == "weight"]
    step = -(-len(matrices) // MOST_MATRICES) or 1
    read_not = {name for n, name in enumerate(matrices) if n % step and not differing[name].zeroed}
    found = []
    for name in [name for name in pairs if name not in read_not]:
        mine, theirs = pairs[name]
        finding = examine(name, numbers(mine), numbers(theirs), reference.geometry, std)
        found += [finding] if finding else []
    if len(matrices) < MOST_OF_ALL * sum(name.endswith("_proj.weight") for name in reference.tensors):
        # One matrix off the reference's grid was changed; only all of them are the originals of a quantised reference.
        found = [f for f in found if not (f.code == "quantised_weights" and f.detail.endswith("|"))]
    of_matrices = [finding for finding in found if noun(finding.name) == "weight"]
    shared = {(finding.code, _of_candidate(finding)) for finding in of_matrices}
    if len(shared) == 1 and len(of_matrices) == len(matrices) - len(read_not):
        code, detail = shared.pop()
        found += [Finding(code=code, name=name, detail=detail) for name in sorted(read_not)]
    _take_out(pairs, found)
    return found


def _of_candidate(finding: Finding) -> str:
    """The detail without what it says of the reference, whose own matrices may be quantised in several ways."""
    after = finding.detail.rpartition("|")[2]
    return f"|{after}" if finding.code == "quantised_weights" and after else finding.detail


def _from_ranks(unknown: Sequence[str], pairs: Pairs, adapted: bool) -> list[Finding]:
    """An update of low rank that nobody told us of: an adapter that one side holds."""
    found = []
    linears = sorted((n for n in unknown if n.endswith("_proj.weight")), key=lambda n: pairs[n][0].numel)
    for name in linears:  # the smallest first: most often the first one is not of low rank, and ends it
        rank = find_rank(*map(numbers, pairs[name]))
        if rank is None:
            break
        found.append(Finding(code="low_rank_update", name=name, detail="another" if adapted else ""))
    _take_out(pairs, found)
    return found


def _from_nowhere(reference: View, names: list[str], differing: dict[str, TensorComparison]) -> list[Finding]:
    """What is like nothing known; where no linear weight resembles the reference's at all, another model."""
    linears = {name for name in reference.tensors if name.endswith("_proj.weight")}
    code, detail = "unknown", _worst(names, differing)
    if linears and linears <= {name for name in names if abs(differing[name].cosine) < UNLIKE}:
        code, detail = "other_model", "none of its linear weights resembles the reference's"
    return [Finding(code=code, name=name, detail=detail) for name in names]


def _one_rounding(found: list[Finding]) -> list[Finding]:
    """Names the rounding that explains all rounded tensors, where there is one: a checkpoint is rounded as a whole."""
    ways = [finding.detail.split("|") for finding in found if finding.code == "rounded_weights"]
    common = [way for way in ways[0] if all(way in others for others in ways)] if ways else []
    return [replace(f, detail=(common or f.detail.split("|"))[0]) if f.code == "rounded_weights" else f for f in found]


def _take_out(pairs: Pairs, found: Iterable[Finding]) -> None:
    for finding in found:
        pairs.pop(finding.name, None)


def _all_identical(tensors: Sequence[TensorComparison]) -> bool:
    return all(tensor.kind == "identical" for tensor in tensors)


def _worst(names: Sequence[str], differing: dict[str, TensorComparison]) -> str:
    worst = sorted(names, key=lambda name: -differing[name].relative_error)[:WORST]
    return ", ".join(f"{name} by {differing[name].relative_error:.2g}" for name in worst)


def _sentences(found: Iterable[Finding], layers: int, candidate: View) -> list[Diagnosis]:
    """One diagnosis for each code and detail, in the order of `CODES`."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for finding in found:
        groups[finding.code][finding.detail].append(finding.name)
    diagnoses = []
    for code in sorted(groups, key=list(CODES).index):
        details = groups[code]
        if len(details) > MOST_DETAILS:
            first = next(iter(details))
            details = {f"{first}, and others likewise": [name for names in details.values() for name in names]}
        for detail, names in details.items():
            text = sentence(code, names, detail, layers)
            text = without_config(text) if candidate.origin.format == "gguf" else text
            diagnoses.append(Diagnosis(code=code, sentence=text, tensors=tuple(names)))
    return diagnoses
