"""Writes the measured tables of the README from benchmarks/results/*.json, between their markers.

    python scripts/readme_tables.py [--check]

With --check nothing is written and a README that is not up to date is exit code 1 (a test runs it).
"""

from __future__ import annotations

import re
import sys
from typing import Any

from common import ROOT
from measured import NOT_MEASURED, load, load_if_measured, made_by, table
from speed_tables import kernels, speed

LAYERS = (0, 1, 2, 4, 8, 12, 16, 20, 21, 23)
ELSEWHERE = {
    "none": "5.56", "all biases": "9,600,000", "all q biases": "3,090", "all k biases": "232",
    "all v biases": "7,980,000", "v bias of layer 12": "5.54", "v bias of layer 23": "13.7",
}  # fmt: skip
"""Perplexities of the same model measured with transformers alone, before this tool existed, on 24 answers as well."""


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


TRAINERS = {
    "cudnn off": "TRL, cuDNN attention forbidden", "cudnn on": "TRL, cuDNN attention on (the default)",
    "unsloth": "TRL on Unsloth",
}  # fmt: skip
"""Peers of scripts/real_model.py, as the README calls them."""


def training() -> str:
    """Runs of one task alone take the place of those of both: they are the later ones."""
    found = load("real_model")
    ours, peers = ([found[part + task] for task in ("", "_sft", "_dpo") if part + task in found]
                   for part in ("train", "peers"))  # fmt: skip
    origins = dict.fromkeys([*map(made_by, ours), *(made_by(part, ("trl", "unsloth")) for part in peers)])
    tables = [{name: run for part in parts for name, run in part.items()} for parts in (ours, peers)]
    return "\n\n".join((training_table(*tables), *origins))


def training_table(ours: dict[str, Any], peers: dict[str, Any]) -> str:
    """Parts of real_model.json; with useful tokens a second and memory where our own run has them."""
    sft, dpo = ours["sft"]["report"], ours.get("dpo", {}).get("report", {})
    before, rate = f"{sft['eval_before']['nll']:.3f}", ours["sft"].get("useful_tokens_per_s")
    speed = _rate_cells(ours["sft"] | {"peak_memory_bytes": sft["peak_memory"]}, rate)
    after = (f"{sft['eval_after']['nll']:.3f}", "finite", *_dpo(dpo.get("eval_after")))
    rows = [
        ("qwen2tool", before, *after, f"{sft['step_seconds']:.2f} s", *speed),
        *(_peer(peers, key, before, rate) for key in TRAINERS if f"sft, {key}" in peers),
    ]
    columns = ("", "NLL before", "after SFT", "gradients", "DPO accuracy", "DPO margin", "SFT step")
    return table((*columns, *(("useful tokens/s", "qwen2tool's to it", "peak memory") if rate else ())), rows)


def _dpo(score: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{score['accuracy']:.3f}", f"{score['margin']:.3f}") if score else ("-", "-")


def _rate_cells(run: dict[str, Any], ours: float | None) -> tuple[str, ...]:
    """Useful tokens a second, how many times that ours is, and GB."""
    if ours is None:
        return ()
    rate = run.get("useful_tokens_per_s")
    memory = f"{run['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in run else "-"
    return (f"{rate:,.0f}", f"{ours / rate:.2f}x", memory) if rate else ("-", "-", memory)


def _peer(peers: dict[str, Any], key: str, before: str, ours: float | None) -> tuple[str, ...]:
    sft = peers[f"sft, {key}"]
    dpo = _dpo(peers.get(f"dpo, {key}", {}).get("held_out", {}).get("dpo"))
    if "losses" not in sft:
        reason = (sft["error"].strip().splitlines() or ["failed"])[-1].split(":")[0]
        return (TRAINERS[key], before, reason, "-", *dpo, "-", *_rate_cells(sft, ours))
    bad = next((n for n, norm in enumerate(sft["grad_norms"], 1) if norm == "nan"), None)
    gradients = f"NaN from step {bad}, loss logged as 0" if bad else "finite"
    nll = sft["held_out"].get("sft", {}).get("nll", "-")
    after = {"nan": "NaN", "-": "-"}.get(nll) or f"{nll:.3f}"
    step = f"{sft['median_step_seconds']:.2f} s"
    return (TRAINERS[key], before, after, gradients, *dpo, step, *_rate_cells(sft, ours))


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


DISTANCES = (
    "routed against reference",
    "routed against reference in float32",
    "reference against reference in float32",
)
"""What scripts/trajectories.py compares."""


def trajectories() -> str:
    """Differences of losses, and what made each of them."""
    found = load_if_measured("trajectories")
    origins = dict.fromkeys(made_by(part) for part in found.values())
    return "\n\n".join((trajectory_table(found), *origins)) if found else NOT_MEASURED


def trajectory_table(found: dict[str, Any]) -> str:
    """Parts of trajectories.json, a row a dtype: mean and largest |difference| of losses, and how the runs ended."""
    columns = ("", "dtype", "routed - reference", "routed - fp32", "reference - fp32", "routed", "reference")
    rows = []
    for name, part in found.items():
        for dtype in dict.fromkeys(run["dtype"] for run in part["runs"]):
            lines = [line for line in part["comparisons"] if line["dtype"] == dtype]
            cells = (_distance_cell([line for line in lines if line["what"] == what]) for what in DISTANCES)
            runs = [run for run in part["runs"] if run["dtype"] == dtype]
            ends = (_end_cell([run for run in runs if run["routes"] == routes]) for routes in ("auto", "reference"))
            rows.append((name, dtype, *cells, *ends))
    return table(columns, rows)


def _distance_cell(lines: list[dict[str, Any]]) -> str:
    """Over all seeds; a comparison without a step in common says nothing."""
    lines = [line for line in lines if line["steps"]]
    if not lines:
        return "-"
    means, largest = ([float(line[name]) for line in lines] for name in ("mean", "max"))
    return f"{sum(means) / len(means):.2g} ({max(largest):.2g})"


def _end_cell(runs: list[dict[str, Any]]) -> str:
    """The worst of the seeds: where a run stopped, or how many steps the loss scaler left out and the last of them."""
    if not runs:
        return "-"
    stopped = [len(run["losses"]) + 1 for run in runs if not run["finite"]]
    if stopped:
        return f"not finite at step {min(stopped)}"
    last = max((step for run in runs for step in run["skipped_at"]), default=0)
    skipped = max(run["skipped"] for run in runs)
    return f"finite, {skipped} of {len(runs[0]['losses'])} skipped, the last at {last}" if skipped else "finite"


IMPLEMENTATIONS = {
    "ours": "qwen2tool", "hf sdpa": "HF sdpa", "hf eager": "HF eager", "liger": "HF + Liger", "unsloth": "Unsloth",
}  # fmt: skip
"""Of scripts/gradient_proof.py, as the README calls them."""
SHOWN_LAYERS = (0, 1, 2, 4, 8, 12, 16, 20)


def gradients() -> str:
    """Errors of LoRA gradients of each model measured, then those of q_proj over norms of k biases."""
    found = load_if_measured("gradients")
    if not found:
        return NOT_MEASURED
    return "\n\n".join(
        text
        for part in found.values()
        for text in (gradient_table(part), _gradient_setting(part), norm_table(part), made_by(part))
    )


def gradient_table(part: dict[str, Any]) -> str:
    """A part of gradients.json: error of all adapters, of q, k and v_proj, and of q_proj layer by layer."""
    count = max(len(run.get("q_proj", ())) for runs in part["errors"].values() for run in runs.values())
    layers = [layer for layer in SHOWN_LAYERS if layer < count]
    columns = ("", "dtype", "all", "q_proj", "k_proj", "v_proj", *(f"q of layer {layer}" for layer in layers))
    rows = []
    for dtype, runs in part["errors"].items():
        for who, run in runs.items():
            if "error" in run:
                rows.append((IMPLEMENTATIONS[who], dtype, str(run["error"]).split(":")[0], *["-"] * (3 + len(layers))))
                continue
            errors = (run["all"], *(run[f"{p}_proj_all"] for p in "qkv"), *(run["q_proj"][layer] for layer in layers))
            rows.append((IMPLEMENTATIONS[who], dtype, *map(_error_cell, errors)))
    return table(columns, rows)


def norm_table(part: dict[str, Any]) -> str:
    """A part of gradients.json: error of q_proj (median and worst layer) for each norm of the k biases."""
    found = part["k_bias"]
    rows = [
        (IMPLEMENTATIONS[who], dtype, *map(_norm_cell, errors))
        for dtype, runs in found["errors"].items()
        for who, errors in runs.items()
    ]
    return table(("q_proj, norm of k biases", "dtype", *(f"{norm:g}" for norm in found["norms"])), rows)


def _norm_cell(error: dict[str, float | str]) -> str:
    whole, middle, worst = (_error_cell(error[name]) for name in ("q_proj", "median", "worst"))
    return whole if isinstance(error["worst"], str) else f"{whole} ({middle}, {worst})"


def _gradient_setting(part: dict[str, Any]) -> str:
    text = f"{part['model']}: {part['tokens']} tokens of {part['data']}, {part['answer_tokens']} of them scored"
    return f"{text}, LoRA r {part['setting']['rank']} on all linears; errors against fp32 with plain attention."


def _error_cell(error: float | str) -> str:
    return "not finite" if isinstance(error, str) else f"{error:.2%}"


TABLES = {
    "biases": biases, "damage": damage, "training": training, "merged": merged, "seven": seven, "speed": speed,
    "kernels": kernels, "trajectories": trajectories, "gradients": gradients,
}  # fmt: skip


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
