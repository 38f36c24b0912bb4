"""Text in many scripts, for comparing tokenizers: prose, code, numbers, spaces, control tokens, odd characters."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS: list[str] = json.loads(Path(__file__).with_name("corpus.json").read_text(encoding="utf-8"))
NOT_NFC = 17
"""Index of the one text that normalisation changes; llama.cpp does not normalise."""
