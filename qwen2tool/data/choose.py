"""Which text two models are compared on: the user's own, or the bundled held-out instructions."""

from __future__ import annotations

from pathlib import Path

from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.data.encode import encode_conversation, encode_text
from qwen2tool.data.records import read_conversations
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError


def choose_samples(folder: Path, text: Path | None, data: Path | None, max_length: int) -> list[Sample]:
    """Samples of the file that is named, tokenised by the tokenizer in `folder`, each of at most `max_length` tokens.

    Raises:
        UserError: both files are named, the file is missing or malformed, or nothing in it counts.
    """
    if text and data:
        raise UserError("--text and --data exclude each other", "Give one of them")
    tokenizer = load_tokenizer(folder)
    if text:
        if not text.is_file():
            raise UserError(f"{text}: no such file, or a folder", "Check the path given to --text")
        samples = encode_text(tokenizer, text.read_text(encoding="utf-8", errors="replace"), max_length)
    else:
        file, last = (data, 0) if data else _bundled()
        conversations = read_conversations(file)[-last:]
        samples = [encode_conversation(tokenizer, c, n, max_length) for n, c in enumerate(conversations)]
        samples = [sample for sample in samples if any(sample.scored[1:])]
    if not samples:
        raise UserError(
            f"{text or data or 'the bundled text'}: nothing in it can be scored",
            "Give a longer text, or raise --max-length",
        )
    return samples


def _bundled() -> tuple[Path, int]:
    from qwen2tool.assets import HELD_OUT_INSTRUCTIONS, INSTRUCTIONS

    return INSTRUCTIONS, HELD_OUT_INSTRUCTIONS
