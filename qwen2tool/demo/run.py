"""`qwen2tool demo`: inspect, SFT, DPO, merge, verify, push --dry-run on a small trained Qwen2, and one closing table.

Beside the path that works runs the one that must not: a copy of the merged model whose biases were dropped is handed to
the same commands. The demo fails (exit code 1) where one of them lets it through, or where the good one is refused.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2tool.assets import (
    HELD_OUT_INSTRUCTIONS,
    HELD_OUT_PREFERENCES,
    INSTRUCTIONS,
    PREFERENCES,
    TINY_QWEN2,
    split,
)
from qwen2tool.checkpoint.folder import open_checkpoint, resolve
from qwen2tool.checkpoint.inventory import require_whole
from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.checkpoint.writer import require_apart, require_free
from qwen2tool.console import print_table, remark, say
from qwen2tool.demo.damage import damaged_copy
from qwen2tool.errors import EXIT_FINDING, UserError

LORA = {"rank": 16, "alpha": 32, "dropout": 0.05, "recompute": "none", "logging_steps": 1}
SFT = {
    "learning_rate": 2e-3,
    "epochs": 6,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "scheduler": "cosine",
    "max_length": 512,
}
DPO = {
    "learning_rate": 1.5e-4,
    "epochs": 6,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "beta": 0.1,
    "max_length": 512,
}
"""Chosen for a model of two million parameters and a few hundred short records."""
LARGER = {"sft": {"learning_rate": 2e-4, "epochs": 2}, "dpo": {"learning_rate": 5e-5, "epochs": 2}}
"""What another model gets instead: rates that published checkpoints bear."""
HUB_NAME = "your-name/tiny-qwen2-demo"


def run_demo(folder: Path, model: str | None, *, overwrite: bool = False) -> int:
    """Runs everything in `folder` and prints the table; returns the exit code.

    Args:
        folder: made new; every product is left in it.
        model: another base than tiny-qwen2: a folder or a Hub id.
        overwrite: replace a folder that exists and holds a demo or the like (see `require_free`).

    Raises:
        UserError: the folder exists, or the base is unusable.
    """
    require_free(folder, overwrite)
    require_apart(folder, *([Path(model)] if model and Path(model).exists() else []))
    base = resolve(model) if model else TINY_QWEN2
    require_whole(open_checkpoint(base))
    load_tokenizer(base)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    demo = _Demo(folder, base, str(model or base))
    demo.write_data()
    steps = (
        ("qwen2tool inspect: is the base whole?", demo.inspect),
        ("qwen2tool train: SFT on instructions, loss on the answers only", demo.sft),
        ("qwen2tool train --task dpo: preferences; the SFT adapter is the start and the reference", demo.dpo),
        ("qwen2tool merge: the adapter into the base, tensor by tensor", demo.merge),
        ("qwen2tool verify-equivalence: is the merged model the function that was trained?", demo.verify),
        ("qwen2tool push --dry-run: what would go to the Hub", demo.push),
        ("The counter-example: the merged model without its q/k/v biases, as careless tools write it", demo.damage),
    )
    for number, (title, step) in enumerate(steps, 1):
        start = time.perf_counter()
        say(f"\n[{number}/{len(steps)}] {title}")
        step()
        remark(f"({time.perf_counter() - start:.1f} s)")
    demo.print_closing_table()
    return 0 if demo.sound else EXIT_FINDING


class _Demo:
    """One run; each step leaves in `self` what the closing table needs."""

    def __init__(self, folder: Path, base: Path, base_name: str) -> None:
        self.folder, self.base, self.base_name = folder, base, base_name
        self.merged, self.broken = folder / "merged", folder / "without-biases"
        self.reports: dict[str, Any] = {}
        self.accepted: set[str] = set()
        self.refused: dict[str, str | None] = {}

    def write_data(self) -> None:
        for name, file, held_out in (
            ("sft", INSTRUCTIONS, HELD_OUT_INSTRUCTIONS),
            ("dpo", PREFERENCES, HELD_OUT_PREFERENCES),
        ):
            for part, text in zip(("train", "held-out"), split(file, held_out), strict=True):
                (self.folder / f"{name}-{part}.jsonl").write_text(text, encoding="utf-8")

    def inspect(self) -> None:
        """Inventory of the base, values included."""
        from qwen2tool.checkpoint.report import inspect_checkpoint
        from qwen2tool.checkpoint.show import print_report

        report = inspect_checkpoint(self.base, values=True)
        print_report(report)
        self.accepted |= {"inspect"} if report.exit_code == 0 else set()

    def sft(self) -> None:
        """The adapter's first half."""
        self._train("sft", SFT | LORA)

    def dpo(self) -> None:
        """The adapter's second half."""
        self._train("dpo", DPO | {"recompute": "none", "adapter": str(self.folder / "sft" / "adapter")})

    def _train(self, task: str, options: dict[str, Any]) -> None:
        from qwen2tool.training.report import print_report
        from qwen2tool.training.run import train
        from qwen2tool.training.settings import load_settings

        files = {
            key: str(self.folder / f"{task}-{part}.jsonl")
            for key, part in (("data", "train"), ("eval_data", "held-out"))
        }
        names = {"task": task, "model": self.base_name, "output": str(self.folder / task)}
        gentler = LARGER[task] if self.base != TINY_QWEN2 else {}
        self.reports[task] = report = train(load_settings(None, options | gentler | files | names))
        print_report(report)
        self.accepted.add("train")

    @property
    def adapter(self) -> Path:
        return self.folder / "dpo" / "adapter"

    def merge(self) -> None:
        """Base + adapter as one checkpoint."""
        from qwen2tool.merge.report import print_report
        from qwen2tool.merge.run import merge

        print_report(merge(self.base, self.adapter, self.merged))
        self.accepted.add("merge")

    def verify(self) -> None:
        """The merged model against base + adapter."""
        self.reports["merged"] = self._verify(self.merged)

    def _verify(self, candidate: Path) -> Any:
        import torch

        from qwen2tool.data.choose import choose_samples
        from qwen2tool.verify.run import verify
        from qwen2tool.verify.show import print_report

        samples = choose_samples(self.base, None, self.folder / "sft-held-out.jsonl", 512)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        report = verify(self.base, candidate, samples, adapter=self.adapter, device=device)
        print_report(report)
        return report

    def push(self) -> None:
        """The plan of an upload."""
        from qwen2tool.hub.plan import plan_push
        from qwen2tool.hub.show import print_plan

        print_plan(plan_push(self.merged, HUB_NAME))
        self.accepted.add("push")

    def damage(self) -> None:
        """The broken copy before every command."""
        lost = damaged_copy(self.merged, self.broken, lambda layer, projection: True)
        say(f"{self.broken}: {lost} bias tensors dropped")
        self.refused = {name: _refusal(attempt) for name, attempt in self._attempts().items()}
        for name, reason in self.refused.items():
            say(f"{name}: {'refused: ' + reason if reason else 'accepted, which it must not be'}")
        self.reports["broken"] = self._verify(self.broken)

    def _attempts(self) -> dict[str, Callable[[], Any]]:
        from qwen2tool.hub.plan import plan_push
        from qwen2tool.merge.run import merge
        from qwen2tool.training.run import train
        from qwen2tool.training.settings import load_settings

        names = {
            "model": str(self.broken),
            "data": str(self.folder / "sft-train.jsonl"),
            "output": str(self.folder / "never"),
        }
        return {
            "inspect": self._inspect_broken,
            "train": lambda: train(load_settings(None, names)),
            "merge": lambda: merge(self.broken, self.adapter, self.folder / "never"),
            "push": lambda: plan_push(self.broken, HUB_NAME),
        }

    def _inspect_broken(self) -> None:
        from qwen2tool.checkpoint.report import inspect_checkpoint

        report = inspect_checkpoint(self.broken)
        if report.exit_code:
            raise UserError(report.verdict, "see qwen2tool inspect")

    @property
    def sound(self) -> bool:
        """Whether the good model passed everything and the broken one nothing."""
        good, broken = self.reports["merged"], self.reports["broken"]
        about_biases = all(reason and "biases" in reason for reason in self.refused.values())
        refused = about_biases and broken.verdict == "different"
        return bool(refused and good.verdict == "equivalent" and self.accepted == set(self.refused))

    def print_closing_table(self) -> None:
        sft, dpo = self.reports["sft"], self.reports["dpo"]
        rows: list[tuple[object, ...]] = [
            ("SFT loss, first and last tenth of the steps", sft.first_loss, sft.last_loss),
            ("perplexity on held-out instructions (SFT)", sft.eval_before.perplexity, sft.eval_after.perplexity),
            ("reward accuracy on held-out pairs (DPO)", dpo.eval_before.accuracy, dpo.eval_after.accuracy),
            ("reward margin on held-out pairs (DPO)", dpo.eval_before.margin, dpo.eval_after.margin),
        ]
        say("")
        print_table("Training", ("", "before", "after"), rows)
        say("")
        print_table("Proof", ("", "whole model", "without q/k/v biases"), self._proof_rows())
        say(f"\nEverything is in {self.folder}/")

    def _proof_rows(self) -> list[tuple[object, ...]]:
        both = self.reports["merged"], self.reports["broken"]
        figures = [report.figures for report in both]
        rows: list[tuple[object, ...]] = [
            ("merged against base + adapter: verdict", *(report.verdict for report in both)),
            ("mean KLD", *(f.kld_mean for f in figures)),
            ("same top-1 token", *(f"{f.same_top:.1%}" for f in figures)),
            ("perplexity", *(f.ppl_candidate for f in figures)),
        ]
        words = {True: "accepted", False: "refused"}
        rows += [(name, words[name in self.accepted], words[reason is None]) for name, reason in self.refused.items()]
        return rows


def _refusal(attempt: Callable[[], Any]) -> str | None:
    """The sentence with which a command refuses, None if it does not."""
    try:
        attempt()
    except UserError as error:
        return error.what
    return None
