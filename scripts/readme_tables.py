"""Writes the measured tables of the README from benchmarks/results/*.json, between their markers.

    python scripts/readme_tables.py [--check]

With --check nothing is written and a README that is not up to date is exit code 1 (a test runs it).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from common import ROOT

RESULTS = ROOT / "benchmarks" / "results"
LAYERS = (0, 1, 2, 4, 8, 12, 16, 20, 21, 23)
ELSEWHERE = {
    "none": "5.56", "all biases": "9,600,000", "all q biases": "3,090", "all k biases": "232",
    "all v biases": "7,980,000", "v bias of layer 12": "5.54", "v bias of layer 23": "13.7",
}  # fmt: skip
"""Perplexities of the same model measured with transformers alone, before this tool existed, on 24 answers as well."""


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(columns), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def made_by(part: dict[str, Any]) -> str:
    origin = part["made_by"]
    machine = origin["machine"]
    device = machine.get("gpu") or f"CPU, {machine['cpu_threads']} threads"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"`{origin['command']}` at {origin['commit']}; {device}; {versions}."


def damage() -> str:
    part = load("real_model")["damage"]
    runs = {"none": part["itself"], **part["damaged"]}
    rows = []
    for name, run in runs.items():
        report = run["report"]
        logits = report["logits"]
        figures = (f"{logits['kld_mean']:.2g}", f"{logits['same_top']:.1%}", f"{logits['ppl_candidate']:,.4g}")
        rows.append((name, report["verdict"], *figures, ELSEWHERE[name]))
    noise = part["itself"]["report"]["floor"]
    eager = load("real_model")["noise"]["eager against sdpa"]["report"]["floor"]
    tokens = part["itself"]["report"]["logits"]["tokens"]
    columns = ("set to zero", "verdict", "mean KLD", "same top-1", "perplexity", "perplexity, measured elsewhere")
    text = (
        f"Over {tokens} tokens of 24 answers; the model's own noise (bf16 against fp32) is a mean KLD of "
        f"{noise['kld_mean']:.2g} and {noise['same_top']:.1%} same top-1; eager against sdpa in fp32, "
        f"{eager['kld_mean']:.2g} and {eager['same_top']:.1%}."
    )
    return "\n\n".join((table(columns, rows), text, made_by(part)))


def biases() -> str:
    part = load("real_model")["damage"]
    layers = part["inspect"]["report"]["values"]["biases"]
    cell = lambda layer, p: "{l2:.3g} ({max_abs:.3g})".format(**layers[str(layer)][p])  # noqa: E731
    rows = [(layer, *(cell(layer, projection) for projection in "qkv")) for layer in LAYERS]
    return table(("layer", "q: norm (largest)", "k", "v"), rows)


def training() -> str:
    found = load("real_model")
    ours, peers = found["train"], found["peers"]
    sft, dpo = ours["sft"]["report"], ours["dpo"]["report"]
    before = f"{sft['eval_before']['nll']:.3f}"
    rows = [
        (
            "qwen2tool",
            before,
            f"{sft['eval_after']['nll']:.3f}",
            "finite",
            *_dpo(dpo["eval_after"]),
            f"{sft['step_seconds']:.2f} s",
        ),
        *(_peer(peers, cudnn, before) for cudnn in ("off", "on")),
    ]
    columns = ("", "NLL before", "after SFT", "gradients", "DPO accuracy", "DPO margin", "SFT step")
    return "\n\n".join((table(columns, rows), made_by(ours["sft"] | {"made_by": ours["made_by"]})))


def _dpo(score: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{score['accuracy']:.3f}", f"{score['margin']:.3f}") if score else ("-", "-")


def _peer(peers: dict[str, Any], cudnn: str, before: str) -> tuple[str, ...]:
    sft = peers[f"sft, cudnn {cudnn}"]
    bad = next((n for n, norm in enumerate(sft["grad_norms"], 1) if norm == "nan"), None)
    gradients = f"NaN from step {bad}, loss logged as 0" if bad else "finite"
    dpo = peers.get(f"dpo, cudnn {cudnn}", {}).get("held_out", {}).get("dpo")
    name = "TRL, cuDNN attention " + ("on (the default)" if cudnn == "on" else "forbidden")
    nll = sft["held_out"]["sft"]["nll"]
    return (
        name,
        before,
        "NaN" if nll == "nan" else f"{nll:.3f}",
        gradients,
        *_dpo(dpo),
        f"{sft['median_step_seconds']:.2f} s",
    )


def merged() -> str:
    part = load("real_model")["merge"]
    rows = []
    for name, base in (("adapter on the 16-bit base", "16bit"), ("adapter on the NF4 base, as trained", "nf4")):
        report = part[f"verify, adapter on {base}"]["report"]
        logits, floor = report["logits"], report["floor"]
        rows.append(
            (
                name,
                report["verdict"],
                f"{logits['kld_mean']:.2g}",
                f"{floor['kld_mean']:.2g}",
                f"{logits['same_top']:.1%}",
            )
        )
    return table(("merged model against", "verdict", "mean KLD", "noise", "same top-1"), rows)


def seven() -> str:
    found = load("gpu_7b")
    sft, dpo, merge = (found[name]["report"] for name in ("sft", "dpo", "merge"))
    verify = found["verify"]["report"]
    gb = lambda count: f"{count / 1e9:.1f} GB"  # noqa: E731
    rows = [
        ("SFT, 20 steps of 16 records", f"{sft['step_seconds']:.2f} s a step", gb(sft["peak_memory"]) + " on the GPU"),
        ("DPO, 10 steps of 16 pairs", f"{dpo['step_seconds']:.2f} s a step", gb(dpo["peak_memory"]) + " on the GPU"),
        ("merge", f"{merge['seconds']:.0f} s", gb(merge["peak_memory"]) + " resident"),
        (
            "verify-equivalence",
            f"{found['verify']['seconds']:.0f} s",
            f"mean KLD {verify['logits']['kld_mean']:.2g}: {verify['verdict']}",
        ),
    ]
    return "\n\n".join((table(("", "time", "memory, result"), rows), made_by(found["sft"])))


TABLES = {"biases": biases, "damage": damage, "training": training, "merged": merged, "seven": seven}


def main() -> int:
    file = ROOT / "README.md"
    old = file.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", old, flags=re.DOTALL
    )
    if "--check" in sys.argv:
        return int(new != old)
    file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
