"""JSON and JSONL files of instructions or preferences, read into one shape each; every refusal names file and record.

Shapes taken (facts of the field's data sets):
  instructions  alpaca {"instruction", "input"?, "output", "system"?}, messages {"messages": [{"role", "content"}]},
                ShareGPT {"conversations": [{"from", "value"}], "system"?}
  preferences   {"prompt", "chosen", "rejected"} as strings or message lists, and LLaMA-Factory's
                {"conversations", "chosen": {"from", "value"}, "rejected": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen2tool.errors import UserError

Message = dict[str, str]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SFT_SHAPES = 'Give it "instruction" and "output", or "messages"'
DPO_SHAPES = 'Give it "prompt", "chosen" and "rejected"'
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with roles system, user, assistant, the last one being an assistant's; `where` names the record."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One prompt (messages, the last one a user's) with a better and a worse answer."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str


def read_conversations(file: Path) -> list[Conversation]:
    """All instruction records of `file`.

    Raises:
        UserError: the file is missing or malformed (with the line), or a record has no answer.
    """
    return _read_all(file, _conversation)


def read_preferences(file: Path) -> list[Preference]:
    """All preference records of `file`.

    Raises:
        UserError: the file is missing or malformed (with the line), or a record lacks an answer or a prompt.
    """
    return _read_all(file, _preference)


def _read_all(file: Path, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    parsed = []
    for where, record in _raw_records(file):
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}, not an object", "Make every record a JSON object")
        parsed.append(parse(record, where))
    if not parsed:
        raise UserError(f"{file}: holds no records", "Name a file with at least one record")
    return parsed


def _raw_records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) for a JSON array or for JSONL, told apart by the first character."""
    if not file.is_file():
        raise UserError(f"{file}: no such file", "Check the path of the data")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})", "Save the data as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from ((f"{file} record {n}", record) for n, record in enumerate(_parse(file, text, ""), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028, which JSON allows in text
        if line.strip():
            where = f"{file} line {number}"
            yield where, _parse(file, line, f" line {number}")


def _parse(file: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        spot = place or (f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "")
        raise UserError(f"{file}{spot}: malformed JSON ({detail})", "Repair or remove that line") from None


def _conversation(record: dict[str, Any], where: str) -> Conversation:
    if "messages" in record:
        messages = _with_system(record, _messages(record["messages"], where), where)
    elif "conversations" in record:
        messages = _with_system(record, _messages(record["conversations"], where), where)
    elif "instruction" in record or "output" in record:
        question = "\n".join(text for key in ("instruction", "input") if (text := _text(record, key, where)))
        if not question:
            raise UserError(f"{where}: no instruction", SFT_SHAPES)
        answer = {"role": "assistant", "content": _text(record, "output", where)}
        turns = [*_history(record, where), {"role": "user", "content": question}, answer]
        messages = _with_system(record, turns, where)
    else:
        raise UserError(f"{where}: keys {sorted(record)[:6]} are of no known shape", SFT_SHAPES)
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: the record has no answer", "Give it one or remove it")
    if next(message["role"] for message in messages if message["role"] != "system") != "user":
        raise UserError(f"{where}: an answer stands before any question", "Begin the record with a user's turn")
    return Conversation(messages=tuple(messages), where=where)


def _preference(record: dict[str, Any], where: str) -> Preference:
    if "chosen" not in record or "rejected" not in record:
        raise UserError(f"{where}: keys {sorted(record)[:6]} are no preference", DPO_SHAPES)
    prompt = _prompt(record, where)
    (chosen_context, chosen), (rejected_context, rejected) = (
        _answer(record[side], where, side) for side in ("chosen", "rejected")
    )
    if chosen_context != rejected_context:
        raise UserError(f"{where}: chosen and rejected answer different prompts", "Pair answers to one prompt")
    if chosen_context and prompt and prompt[-len(chosen_context) :] != chosen_context:
        raise UserError(f"{where}: prompt and answers hold different conversations", "Give the prompt once")
    prompt = prompt or chosen_context  # lists that repeat the conversation carry the prompt themselves
    if not prompt or prompt[-1]["role"] != "user":
        raise UserError(f"{where}: no prompt that ends with a user's turn", DPO_SHAPES)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same text", "Remove the record: it prefers nothing")
    return Preference(prompt=tuple(prompt), chosen=chosen, rejected=rejected, where=where)


def _prompt(record: dict[str, Any], where: str) -> list[Message]:
    prompt = record.get("prompt", record.get("conversations"))
    if prompt is None:
        return []
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, where)
    return _with_system(record, messages, where)


def _history(record: dict[str, Any], where: str) -> list[Message]:
    """Earlier turns of an alpaca record: a list of [question, answer]."""
    history = record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs:
        raise UserError(f"{where}: history is no list of [question, answer]", SFT_SHAPES)
    roles = ("user", "assistant")
    return [
        _message({"role": role, "content": text}, where, number)
        for number, pair in enumerate(history, 1)
        for role, text in zip(roles, pair, strict=True)
    ]


def _answer(value: Any, where: str, side: str) -> tuple[list[Message], str]:
    """(context that the answer repeats, answer text) of a string, one message, or a list of messages."""
    if isinstance(value, str):
        messages: list[Message] = [{"role": "assistant", "content": value}]
    else:
        messages = _messages(value if isinstance(value, list) else [value], where)
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: {side} has no answer", "Give it one or remove the record")
    return messages[:-1], messages[-1]["content"]


def _with_system(record: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    system = _text(record, "system", where)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: messages are a {type(value).__name__}, not a list", "Make them a list of objects")
    return [_message(item, where, n) for n, item in enumerate(value, 1)]


def _message(item: Any, where: str, number: int) -> Message:
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    content = item.get("content", item.get("value")) if isinstance(item, dict) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise UserError(
            f"{where}: message {number} has role {role!r} and content of type {type(content).__name__}",
            'Use roles "system", "user" and "assistant" with text as content',
        )
    return {"role": ROLES[role], "content": _encodable(content, where)}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key) or ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}, not text", SFT_SHAPES)
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """JSON may escape half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character (a lone surrogate)", "Repair the text") from None
    return text
