"""Ours beside the peers: milliseconds and memory of a training step, each trainer in its own process, interleaved.

    python benchmarks/train_step.py --work FOLDER [--settings large small] [--peers ours unsloth] [--seconds 570]

Per setting: a random checkpoint of a published geometry (made once under --work, outside the checkout), then --rounds
times all peers one after the other, each a fresh process of train_peer.py. A peer that is not installed or fails is
kept with its error's last line and not tried again in later rounds; with --seconds, what no longer fits is kept as "not
started". The result file is written after every process; a setting measured anew replaces its old entry, so several
calls can fill one file. Each setting holds the ceilings measured in its own call, on the same GPU, and the floor that
follows from them (ceilings.py).

The imports of the next process, and nothing else of it, overlap what is being measured (processes.py); then it waits
for its turn, which no figure counts. Settings measured so say `overlapped_imports`. A process beside which another one
waited has no `device_used`: that would count the other's CUDA context. Calls on several GPUs (CUDA_VISIBLE_DEVICES) may
run side by side, each with a --work and a --result of its own.

For peers from a folder of unpacked wheels set PYTHONPATH; without git the commit is read from QWEN2TOOL_COMMIT.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from common import environment, machine, run_script, write_result  # noqa: E402
from speed_tables import speed_table  # noqa: E402

from benchmarks.ceilings import floor  # noqa: E402
from benchmarks.processes import Ahead, Process  # noqa: E402
from benchmarks.train_peer import PEERS, Job, Work  # noqa: E402

ALL = ("unsloth", "ours", "liger", "hf", "hf_kbit")
OUT_OF_TIME = "not started: --seconds were used up"
LEAST_SECONDS = 10.0
"""No process is worth starting with less left."""
WITHOUT_KBIT = ("unsloth", "ours", "liger", "hf")
"""For a 16-bit base: there PEFT's preparation would cast the whole model to fp32."""


@dataclass(frozen=True, kw_only=True)
class Setting(Work):
    """What is trained, of a published `geometry`, by `peers` in the order in which they take turns.

    `recompute` holds for the peers. Ours runs its memory plan within `budget_gb`, or, where that is 0, within what
    Unsloth's run before it peaked at; without either, `recompute` holds for it too.
    """

    geometry: str
    peers: tuple[str, ...] = ALL


SETTINGS = {
    "large": Setting(geometry="qwen1.5-7b", batch=4, length=2048),
    "large_dropout": Setting(geometry="qwen1.5-7b", batch=4, length=2048, dropout=0.05),
    "large_42gb": Setting(
        geometry="qwen1.5-7b", batch=4, length=2048, recompute="none", budget_gb=42, peers=("unsloth", "ours")
    ),
    "reference_pass": Setting(geometry="qwen1.5-7b", batch=4, length=1024, reference_pass=1),
    "seed": Setting(geometry="qwen1.5-7b", batch=1, length=1024, dropout=0.05, accumulation=16),
    "small": Setting(geometry="qwen1.5-7b", batch=1, length=1024, rank=8, budget_gb=5.3),
    "gqa": Setting(geometry="qwen2-7b", batch=4, length=2048),
    "half_b": Setting(geometry="qwen2-0.5b", batch=8, length=1024, quantize="none", peers=(*WITHOUT_KBIT, "hf_fp32")),
    "one_and_half_b": Setting(geometry="qwen2-1.5b", batch=1, length=1024),
}


class Deadline:
    """What is left of `seconds` since its making; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def main() -> None:
    options = parse()
    if options.list:
        for name, setting in SETTINGS.items():
            print(name, json.dumps(asdict(setting)))
        return
    deadline = Deadline(options.seconds)
    options.work.mkdir(parents=True, exist_ok=True)
    with closing(Ahead(lambda peer: start_peer(peer, options.work))) as ahead:
        found = measure_all(options, deadline, ahead)
    print(speed_table(found))


def measure_all(options: argparse.Namespace, deadline: Deadline, ahead: Ahead) -> dict[str, Any]:
    """The parts of the result file, by setting; each is written as it grows."""
    first = [turns(SETTINGS[name], options)[0][1] for name in options.settings]
    if deadline.left() > LEAST_SECONDS:
        ahead.prepare(first[0])
    ceilings = measured_ceilings(options, deadline)
    print(f"{json.dumps(machine())}\n{json.dumps(ceilings)}", flush=True)
    command = ["python", "benchmarks/train_step.py", *sys.argv[1:]]
    found: dict[str, Any] = {}
    for name, after in zip(options.settings, (*first[1:], None), strict=True):
        for part in measure(SETTINGS[name], options, deadline, ceilings, ahead, after):
            if not all(run.get("skipped") for run in part["runs"]):  # nothing measured must not replace an old result
                found[name] = part
                write_result(options.result, command, {name: part})
            print(f"{name:15} {line(part['runs'][-1])}", flush=True)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and caches, outside the checkout")
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: the setting's own")
    parser.add_argument("--rounds", type=int, default=2, help="times that every peer has its turn")
    parser.add_argument("--once", nargs="+", choices=PEERS, default=[], help="peers that run in the first round alone")
    parser.add_argument("--steps", type=int, default=0, help="steps counted; default 16, or 8 with accumulation")
    parser.add_argument("--seconds", type=float, help="start nothing that cannot end within so many seconds")
    parser.add_argument("--peer-seconds", type=float, default=300, help="most that one process may take")
    parser.add_argument("--recompute", choices=["all", "none", "auto"], help="for ours, instead of the setting's")
    parser.add_argument("--budget-gb", type=float, help="for ours, instead of the setting's")
    parser.add_argument("--layers", type=int, help="short models, for a quick look")
    parser.add_argument("--tokenizer", type=Path, help="folder of tokenizer files; default: the bundled one")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "train_step.json")
    parser.add_argument("--list", action="store_true", help="list the settings")
    options = parser.parse_args()
    if options.list:
        return options
    if options.work is None:
        parser.error("--work names the folder for checkpoints")
    if ROOT in (options.work.resolve(), *options.work.resolve().parents):
        parser.error(f"--work {options.work} lies in the checkout; checkpoints of 15 GB do not belong there")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def measured_ceilings(options: argparse.Namespace, deadline: Deadline) -> dict[str, Any]:
    script = ROOT / "benchmarks" / "ceilings.py"
    process = Process(script, ["--device", options.device], options.work, surroundings(options.work))
    ceilings = process.result(deadline.left())
    if "error" in ceilings:
        raise SystemExit(f"no ceilings: {ceilings['error']}")
    return ceilings


def turns(setting: Setting, options: argparse.Namespace) -> list[tuple[int, str]]:
    """The setting's rounds and peers in their order."""
    return [(number + 1, peer) for number in range(options.rounds) for peer in options.peers or setting.peers]


def due(peer: str, runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> bool:
    """Whether `peer` has its turn after `runs`: it did not fail in them, and may run more than once if it did run."""
    before = [run for run in runs if run["peer"] == peer]
    return not any("error" in run for run in before) and not (before and peer in options.once)


def measure(
    setting: Setting,
    options: argparse.Namespace,
    deadline: Deadline,
    ceilings: dict[str, Any],
    ahead: Ahead,
    after: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The setting's part of the result file, again after every process; peer `after` comes when all had their turns."""
    model, failure = checkpoint(setting.geometry, options, deadline)
    part = asdict(setting) | {"layers": options.layers, "ceilings": ceilings, "overlapped_imports": True}
    runs: list[dict[str, Any]] = []
    if not failure:
        part |= floors(setting, json.loads((model / "config.json").read_text()), ceilings)
    order = turns(setting, options)
    for index, (number, peer) in enumerate(order):
        if not due(peer, runs, options):
            continue
        start = time.monotonic()
        longest = max((run["seconds"] for run in runs if run["peer"] == peer), default=0.0)
        if failure:
            found = {"error": failure, "skipped": failure == OUT_OF_TIME}
        elif deadline.left() < max(LEAST_SECONDS, longest):
            found = {"error": OUT_OF_TIME, "skipped": True}
        else:
            later = (name for _, name in order[index + 1 :] if due(name, [*runs, {"peer": peer}], options))
            seconds = min(deadline.left(), options.peer_seconds)
            found = run_peer(job(setting, peer, model, options, runs), seconds, ahead, next(later, after))
        runs.append({"peer": peer, "round": number, "seconds": round(time.monotonic() - start, 1), **found})
        yield part | {"peers": summary(runs, part.get("floor_ms", math.nan)), "runs": list(runs)}


def job(
    setting: Setting, peer: str, model: Path, options: argparse.Namespace, runs: Sequence[dict[str, Any]] = ()
) -> Job:
    """What one process is told; `runs` are those before it."""
    work = {field.name: getattr(setting, field.name) for field in fields(Work)}
    if peer.startswith("ours"):
        rival = [run["memory_gb"]["peak_allocated"] for run in runs if run["peer"] == "unsloth" and "error" not in run]
        default = setting.budget_gb or min(rival, default=0.0)
        work["budget_gb"] = default if options.budget_gb is None else options.budget_gb
        work["recompute"] = options.recompute or ("auto" if work["budget_gb"] else setting.recompute)
    else:
        work["budget_gb"] = 0.0
    warmup = 2 if setting.accumulation > 1 else 4
    counted = options.steps or (8 if setting.accumulation > 1 else 16)
    return Job(
        peer=peer, model=str(model.resolve()), steps=warmup + counted, warmup=warmup, device=options.device, **work
    )


def run_peer(job: Job, seconds: float, ahead: Ahead, following: str | None) -> dict[str, Any]:
    """The job's result, while the process of the `following` peer, if any, imports."""
    process = ahead.take(job.peer)
    ahead.prepare(following)
    found = process.result(seconds, json.dumps(asdict(job)) + "\n")
    if following:
        found.get("memory_gb", {}).pop("device_used", None)
    return found


def start_peer(peer: str, work: Path) -> Process:
    """A process that imports and then waits for the peer's job."""
    script = ROOT / "benchmarks" / "train_peer.py"
    return Process(script, ["--peer", peer, "--wait"], work, surroundings(work))


def surroundings(work: Path) -> dict[str, str]:
    """The environment of a process: Unsloth says nothing to others, and compiles into `work`."""
    extra = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str((work / "unsloth").resolve())}
    return environment() | extra


def checkpoint(geometry: str, options: argparse.Namespace, deadline: Deadline) -> tuple[Path, str]:
    """The folder of a random checkpoint, made now if it is not there, and why that failed or ""."""
    folder = options.work / (geometry if options.layers is None else f"{geometry}-{options.layers}-layers")
    if (folder / "config.json").is_file():
        return folder, ""
    if deadline.left() < 60:
        return folder, OUT_OF_TIME
    layers = ["--layers", str(options.layers)] if options.layers else []
    tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else []
    script = ROOT / "scripts" / "make_checkpoint.py"
    made = run_script(script, geometry, folder, "--device", options.device, *layers, *tokenizer)
    lines = made["error"].strip().splitlines() or ["no reason given"]
    return folder, f"no checkpoint: {lines[-1]}" if made["exit_code"] else ""


def floors(setting: Setting, config: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    """The setting's floor with its own recompute and, beside it, the one without."""
    shape = {name: getattr(setting, name) for name in ("batch", "length", "rank", "accumulation")}
    shape["reference_pass"] = bool(setting.reference_pass)
    quantised = setting.quantize == "nf4"
    own = floor(config, ceilings, **shape, quantised=quantised, recompute=setting.recompute != "none")
    bare = floor(config, ceilings, **shape, quantised=quantised, recompute=False)
    return {"floor_ms": own["ms"], "floor": own, "floor_without_recompute_ms": bare["ms"]}


def summary(runs: list[dict[str, Any]], floor_ms: float) -> dict[str, dict[str, Any]]:
    """One record a peer over its rounds: medians of times, largest memory, the first round's losses; or its error."""
    peers = {}
    for peer in dict.fromkeys(run["peer"] for run in runs):
        mine = [run for run in runs if run["peer"] == peer]
        done = [run for run in mine if "error" not in run]
        peers[peer] = over_rounds(done, floor_ms) if done else {"error": mine[-1]["error"]}
    unsloth = peers.get("unsloth", {}).get("ms")
    for record in peers.values():
        if unsloth and "ms" in record:
            record["times_unsloth"] = unsloth / record["ms"]
    return peers


def over_rounds(runs: list[dict[str, Any]], floor_ms: float) -> dict[str, Any]:
    ms = statistics.median(run["ms"] for run in runs)
    largest = {
        name: max(run["memory_gb"].get(name, 0.0) for run in runs) for name in ("peak_allocated", "peak_reserved")
    }
    alone = [run["memory_gb"]["device_used"] for run in runs if "device_used" in run["memory_gb"]]
    if alone:
        largest["device_used"] = max(alone)
    return {
        "rounds": len(runs),
        "ms": ms,
        "min_ms": min(run["min_ms"] for run in runs),
        "micro_batch_ms": statistics.median(run["micro_batch_ms"] for run in runs),
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "first_step_s": statistics.median(run["first_step_s"] for run in runs),
        "load_to_first_step_s": statistics.median(run["first_step_s"] - run["imported_s"] for run in runs),
        "memory_gb": largest,
        "floor_fraction": floor_ms / ms,
        "losses": runs[0]["losses"],
    }


def line(run: dict[str, Any]) -> str:
    """One process for the terminal."""
    start = f"round {run['round']}  {run['peer']:10}"
    if "error" in run:
        return f"{start} {run['error']}"
    memory = run["memory_gb"]
    return (
        f"{start} {run['ms']:8.1f} ms (min {run['min_ms']:.1f}), {run['tokens_per_s']:,} tokens/s, "
        f"{memory.get('peak_allocated', 0):.2f} GB allocated, {memory.get('peak_reserved', 0):.2f} reserved, "
        f"first step after {run['first_step_s']} s (imports {run['imported_s']}), "
        f"loss {run['losses'][0]} -> {run['losses'][-1]}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # closes what it started, as Ctrl-C does
    main()
