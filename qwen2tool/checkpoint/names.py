"""Tensors that are there under the names of a wrapper: an unmerged adapter, a compiled model, a larger model's part.

Saving a wrapped model keeps its words in every name (`base_model.model.`, `base_layer`, `_orig_mod`, `language_model`),
and saving the decoder alone loses the leading `model.`. By names alone such a file lacks every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = frozenset(
    ("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module", "base_layer", "language_model")
)
"""Words that saving a wrapped model leaves in names."""


def find_renamed(missing: Iterable[str], extra: Iterable[str]) -> dict[str, str]:
    """Missing name -> the extra name that is the same but for the words of wrappers."""
    places: dict[str, list[str]] = {}
    for name in extra:
        places.setdefault(_core(name), []).append(name)
    return {name: found[0] for name in missing if len(found := places.get(_core(name), [])) == 1}


def difference(name: str, other: str) -> str:
    """How `other` differs from `name`, in words that are the same for every tensor of one wrapper."""
    mine, theirs = name.split("."), other.split(".")
    more, less = _without(theirs, mine), _without(mine, theirs)
    parts = [f"{word} {'.'.join(words)}" for word, words in (("with", more), ("without", less)) if words]
    return " and ".join(parts)


def _core(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _without(words: list[str], others: list[str]) -> list[str]:
    """`words` less one of each of `others`, the last ones first: a wrapper stands in front."""
    left = list(others)
    kept = []
    for word in reversed(words):
        if word in left:
            left.remove(word)
        else:
            kept.append(word)
    return kept[::-1]
