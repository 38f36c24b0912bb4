"""Tables of benchmarks/train_step.py and benchmarks/kernels.py for the terminal and the README."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from measured import NOT_MEASURED, load_if_measured, made_by, table

PEERS = {
    "ours": "qwen2tool", "ours_eager": "qwen2tool, no graphs", "unsloth": "Unsloth", "liger": "HF + Liger",
    "hf": "HF + PEFT", "hf_kbit": "HF + PEFT, kbit",
}  # fmt: skip
"""Trainers of benchmarks/train_peer.py that are compared, as the README calls them."""


def speed() -> str:
    """The training-step table, and for each measurement what made it."""
    found = load_if_measured("train_step")
    if not found:
        return NOT_MEASURED
    origins = dict.fromkeys(f"{made_by(part)}{_peer_versions(part)}" for part in found.values())
    return "\n\n".join((speed_table(found), *_from_fp32(found), *origins))


def speed_table(found: dict[str, Any]) -> str:
    """Parts of train_step.json: milliseconds and peak allocated GB of each trainer, then how ours stands."""
    if not found:
        return NOT_MEASURED
    peers = [peer for peer in PEERS if any(peer in part["peers"] for part in found.values())]
    columns = ("", *(PEERS[peer] for peer in peers), "times Unsloth", "of the floor", "losses apart")
    return table(columns, (row for name, part in found.items() for row in _speed_rows(name, part, peers)))


def _speed_rows(name: str, part: dict[str, Any], peers: list[str]) -> Iterable[tuple[str, ...]]:
    """One row, and with accumulation another one for the micro-batch."""
    ours = part["peers"].get("ours", {})
    ratio = f"{ours['times_unsloth']:.2f}x" if "times_unsloth" in ours else "-"
    share = f"{ours['floor_fraction']:.0%}" if "floor_fraction" in ours else "-"
    ends = (ratio, share, _losses_apart(part["peers"]))
    micro = part["accumulation"]
    cells = (_speed_cell(part["peers"].get(peer), "ms") for peer in peers)
    yield (f"{name}: {_setting_text(part)}", *cells, *ends)
    if micro > 1:
        cells = (_speed_cell(part["peers"].get(peer), "micro_batch_ms") for peer in peers)
        yield (f"{name}: one micro-batch of it", *cells, *ends)


def _losses_apart(peers: dict[str, Any]) -> str:
    """The largest difference of a step's loss from that of HF + PEFT, in fp32 if it ran so; else of Unsloth."""
    order = ("ours", "hf_fp32", "hf", "unsloth")
    losses = [peers[peer]["losses"] for peer in order if "losses" in peers.get(peer, {})]
    if "losses" not in peers.get("ours", {}) or len(losses) < 2:
        return "-"
    return _largest(losses[0], losses[1], 3)


def _largest(ours: list[Any], theirs: list[Any], digits: int) -> str:
    """The largest distance; `max` alone would pass over a NaN, which files hold as text."""
    gaps = [abs(float(own) - float(other)) for own, other in zip(ours, theirs, strict=True)]
    return f"{max(gaps):.{digits}f}" if all(map(isfinite, gaps)) else "not finite"


def _from_fp32(found: dict[str, Any]) -> Iterable[str]:
    """A line for each part in which HF + PEFT ran in fp32 too: how far from it the others' losses lie at most."""
    for name, part in found.items():
        losses = {peer: record["losses"] for peer, record in part["peers"].items() if "losses" in record}
        truth = losses.pop("hf_fp32", None)
        if truth and losses:
            shown = ", ".join(
                f"{label} {_largest(losses[peer], truth, 4)}" for peer, label in PEERS.items() if peer in losses
            )
            yield f"{name}, the largest of {len(truth)} distances from the losses of HF + PEFT in fp32: {shown}."


def _speed_cell(record: dict[str, Any] | None, key: str) -> str:
    if record is None:
        return "-"
    if "error" in record:
        return str(record["error"]).split(":")[0]
    return f"{record[key]:,.0f} ms, {record['memory_gb']['peak_allocated']:.1f} GB"


def _setting_text(part: dict[str, Any]) -> str:
    micro = f"{part['accumulation']} x " if part["accumulation"] > 1 else ""
    layers = f", {part['layers']} layers" if part.get("layers") else ""
    kept = f", {part['budget_gb']:g} GB" if part["budget_gb"] else ""
    kept += ", no checkpointing" if part["recompute"] == "none" else ""
    kept += ", a pass with the adapter off before" if part.get("reference_pass") else ""
    return (
        f"{part['geometry']}{layers}, {micro}{part['batch']} x {part['length']}, "
        f"{'16 bit' if part['quantize'] == 'none' else part['quantize']}, r {part['rank']}, "
        f"dropout {part['dropout']:g}{kept}"
    )


def _peer_versions(part: dict[str, Any]) -> str:
    names = {"liger-kernel": "Liger", "unsloth": "Unsloth"}
    found: dict[str, str] = {}
    for run in part["runs"]:
        found |= run.get("versions", {})
    text = ", ".join(f"{shown} {found[name]}" for name, shown in names.items() if name in found)
    ceilings = part["ceilings"]
    rates = (
        f"copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, products {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s"
    )
    return f" {text + '; ' if text else ''}{rates}."


def kernels() -> str:
    found = load_if_measured("kernels")
    return "\n\n".join(f"{kernel_table(part)}\n\n{made_by(part)}" for part in found.values()) or NOT_MEASURED


def kernel_table(part: dict[str, Any]) -> str:
    """Ops of benchmarks/kernels.py: microseconds of ours and of the others, bandwidth or rate against its ceiling."""
    others = list(dict.fromkeys(name for row in part["rows"] for name in row["microseconds"] if name != "ours"))
    rows = []
    for row in part["rows"]:
        times = [row["microseconds"].get(name) for name in ("ours", *others)]
        rates = (f"{row['bytes_per_s'] / 1e9:,.0f} GB/s, {row['of_copy']:.0%}" if "of_copy" in row else "-",
                 f"{row['of_products']:.0%}" if "of_products" in row else "-")  # fmt: skip
        rows.append((row["op"], row["shape"], *(_time_cell(time) for time in times), *rates))
    return table(("op", "shape", "ours", *others, "of copy", "of products"), rows)


def _time_cell(time: float | str | None) -> str:
    if time is None:
        return "-"
    return time.split(":")[0] if isinstance(time, str) else f"{time:,.0f} us" if time >= 100 else f"{time:.1f} us"
