"""SFT and DPO as what `run` needs of a task: a data set, a trainer over it, a score on held-out records.

Both are made before the first step, which is when DPO takes its reference log-probs: once a run, with dropout off.
"""

from __future__ import annotations

from typing import Any, Protocol

from qwen2tool.training.batches import DpoCollator, SampleDataset, SftCollator
from qwen2tool.training.dataset import Records
from qwen2tool.training.evaluate import DpoScore, SftScore, dpo_score, pair_log_probs, sft_score
from qwen2tool.training.fast import Plans
from qwen2tool.training.model import Placement
from qwen2tool.training.settings import TrainSettings
from qwen2tool.training.trainer import DpoTrainer, GuardedTrainer, SftTrainer

Score = SftScore | DpoScore


class Task(Protocol):
    """What a run trains on and how it is judged."""

    def trainer(self, **options: Any) -> GuardedTrainer:
        """The trainer over the training records; `options` are those of transformers.Trainer."""
        ...

    def score(self) -> Score | None:
        """The model as it stands on the held-out records, None without any."""
        ...


class _Common:
    """What both tasks hold: the settings, the model, where it is and how it runs, the records."""

    def __init__(
        self,
        settings: TrainSettings,
        model: Any,
        placement: Placement,
        train: Records,
        held_out: Records | None,
        plans: Plans,
    ) -> None:
        self._settings, self._model, self._placement = settings, model, placement
        self._train, self._held_out, self._plans = train, held_out, plans

    def _cut(self, sequences: int) -> tuple[int | None, int | None]:
        """What a collator is told: the sequences there are at most where passes are filled up for graphs (a record is
        `sequences` of them), and the tokens of a pass."""
        micro_batches = self._settings.gradient_accumulation if self._plans.cut else 1
        most = self._settings.batch_size * micro_batches * sequences
        return most if self._plans.graphs else None, self._plans.cut

    def _how(self) -> dict[str, Any]:
        """What a trainer of either task is told of how passes run."""
        return {
            "graphs": self._plans.graphs,
            "reserve": self._plans.reserve,
            "autocast": lambda: self._placement.autocast,
        }


class SftTask(_Common):
    """Supervised fine-tuning: samples in, mean NLL out."""

    def trainer(self, **options: Any) -> GuardedTrainer:
        """See Task."""
        return SftTrainer(
            places=self._train.places,
            model=self._model,
            train_dataset=SampleDataset(self._train.items),
            data_collator=SftCollator(*self._cut(1)),
            **self._how(),
            **options,
        )

    def score(self) -> Score | None:
        """See Task."""
        if self._held_out is None:
            return None
        how = self._placement, self._settings.batch_size, self._plans.cut
        return sft_score(self._model, self._held_out.items, *how)


class DpoTask(_Common):
    """Preference tuning: pairs in, rewards against the reference out."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._train_reference = self._log_probs(self._train)
        self._held_out_reference = self._log_probs(self._held_out) if self._held_out else []

    def _log_probs(self, records: Records) -> list[tuple[float, float]]:
        how = self._placement, self._settings.batch_size, self._plans.cut
        return pair_log_probs(self._model, records.items, *how)

    def trainer(self, **options: Any) -> GuardedTrainer:
        """See Task."""
        pairs = [(*pair, *logs) for pair, logs in zip(self._train.items, self._train_reference, strict=True)]
        return DpoTrainer(
            beta=self._settings.beta,
            places=self._train.places,
            model=self._model,
            train_dataset=SampleDataset(pairs),
            data_collator=DpoCollator(*self._cut(2)),
            **self._how(),
            **options,
        )

    def score(self) -> Score | None:
        """See Task."""
        if self._held_out is None:
            return None
        policy = self._log_probs(self._held_out)
        return dpo_score(policy, self._held_out_reference, self._held_out.items, self._settings.beta)
