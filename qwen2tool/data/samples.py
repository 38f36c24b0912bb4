"""The unit that training and verification share: one sequence of token ids and which of them count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenised record.

    Attributes:
        ids: token ids.
        scored: same length; `scored[i]` means that token i counts as a target, predicted from `ids[:i]`.
            `scored[0]` is never used: nothing predicts the first token.
        record: position of the record in its file, from 0; for messages that name it.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    record: int

    def shortened(self, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(ids=self.ids[:length], scored=self.scored[:length], record=self.record)
