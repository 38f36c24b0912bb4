"""Random damage: one value of a JSON document, or a few bytes, mostly in front, where headers are."""

from __future__ import annotations

import copy

from tests.checkpoint.files import FIRST, SECOND

WEIRD = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**40, 0.5, float("nan"), float("inf"), "", "x", "F32", "BF16", "F4",
    "\0", "\ud800", "../x", "n" * 400, [], [0], [0, 0], [-1, 4], [2**62, 2**62], [[]], {}, {"a": 1}, "1e6", FIRST,
    SECOND,
)  # fmt: skip


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
