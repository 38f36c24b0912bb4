"""The corpus and the tokenizer of ``tiny-qwen2``.

The corpus is the English part of LLaMA-Factory's demo data: two plain-text files and three chat files, the chats
rendered as ChatML. The split into training and validation is by whole documents and does not depend on the training
seed, so that runs with different seeds are scored on the same text. The tokenizer is a byte-level BPE with Qwen2's
pre-tokeniser, trained on the training documents alone: every byte is in its alphabet, so any text survives a round
trip. It takes a second.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
DEFAULT_SYSTEM = "You are a helpful assistant."
PLAIN_SOURCES = ("wiki_demo.txt", "c4_demo.jsonl")
CHAT_SOURCES = ("alpaca_en_demo.json", "dpo_en_demo.json", "glaive_toolcall_en_demo.json")

# Qwen2's published pre-tokeniser: contractions, words, single digits, punctuation, line ends, blanks.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the corpus and the file it came from."""

    source: str
    text: str

    @property
    def is_chat(self) -> bool:
        """Whether the text is a ChatML conversation."""
        return self.source in CHAT_SOURCES


def chatml(turns: Iterable[tuple[str, str]]) -> str:
    """Render (role, content) pairs as ChatML, with the default system turn where none is given."""
    turns = list(turns)
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)


def _alpaca(record: dict[str, Any]) -> list[tuple[str, str]]:
    prompt = record["instruction"] + ("\n" + record["input"] if record.get("input") else "")
    return [("user", prompt), ("assistant", record["output"])]


def _sharegpt(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Keep the system, human and gpt turns (tool calls and their results go), and the preferred answer of a pair."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [*record["conversations"], *([record["chosen"]] if "chosen" in record else [])]
    return [(roles[turn["from"]], turn["value"]) for turn in turns if turn["from"] in roles]


def _texts(data: Path, source: str) -> Iterator[str]:
    raw = (data / source).read_text(encoding="utf-8")
    if source.endswith(".txt"):
        yield from raw.splitlines()
    elif source.endswith(".jsonl"):
        yield from (json.loads(line)["text"] for line in raw.splitlines())
    else:
        render = _alpaca if source.startswith("alpaca") else _sharegpt
        yield from (chatml(render(record)) for record in json.loads(raw))


def load_documents(data: Path) -> list[Document]:
    """Read the corpus, one document per article, page or conversation; exact repeats are kept once."""
    documents = (
        Document(source=source, text=text)
        for source in (*PLAIN_SOURCES, *CHAT_SOURCES)
        for text in _texts(data, source)
        if text.strip()
    )
    return list(dict.fromkeys(documents))


def split_documents(documents: list[Document], *, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Put ``fraction`` of each source's documents (at least one) into validation: those whose seeded hash is smallest.

    Both lists come back in hash order, which mixes the sources.
    """

    def rank(document: Document) -> str:
        return hashlib.sha256(f"{seed}:{document.text}".encode()).hexdigest()

    ordered = sorted(documents, key=rank)
    training: list[Document] = []
    validation: list[Document] = []
    taken = dict.fromkeys((document.source for document in documents), 0)
    wanted = {name: max(1, round(fraction * sum(d.source == name for d in documents))) for name in taken}
    for document in ordered:
        held_out = taken[document.source] < wanted[document.source]
        taken[document.source] += held_out
        (validation if held_out else training).append(document)
    return training, validation


def train_tokenizer(documents: list[Document], *, entries: int) -> Tokenizer:
    """Train a byte-level BPE of ``entries`` tokens, then append the three special ones, as Qwen2 numbers its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((_without_specials(document.text) for document in documents), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _without_specials(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[int]:
    """Encode the documents into one stream, each closed by <|endoftext|>."""
    (end,) = tokenizer.encode(END_OF_TEXT).ids
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return [token for encoding in encodings for token in [*encoding.ids, end]]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write tokenizer.json (compact) and tokenizer_config.json in the layout Qwen2's own folders have."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
