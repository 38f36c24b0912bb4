"""Conversations and plain text as token ids, with a mask of what counts: the assistant's words and the end of its turn.

Qwen's published templates mark no assistant spans, so the text is cut where the template itself cuts it: everything
up to the generation prompt is context, what the template then adds for the answer is target, up to and with the token
that ends the turn; the line break behind it is not, since nobody waits for it. Each piece is tokenised on its own,
exactly as generation will see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qwen2tool.data.records import Conversation, Message, Preference
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, record: int, max_length: int
) -> Sample:
    """Token ids of `conversation`, cut at `max_length`; every assistant turn is scored.

    Raises:
        UserError: the template changes earlier turns when later ones are added.
    """
    ids: list[int] = []
    scored: list[bool] = []
    done = ""
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        context, answer, tail = _cut(tokenizer, conversation.messages[: turn + 1], conversation.where)
        if not context.startswith(done):
            raise UserError(
                f"{conversation.where}: the chat template rewrites earlier turns", "Use a plain ChatML template"
            )
        for text, counts in ((context[len(done) :], False), (answer, True), (tail, False)):
            piece = tokenize(tokenizer, text)
            ids += piece
            scored += [counts] * len(piece)
        done = context + answer + tail
    return Sample(ids=tuple(ids), scored=tuple(scored), record=record).shortened(max_length)


def encode_preference(
    tokenizer: PreTrainedTokenizerBase, preference: Preference, record: int, max_length: int
) -> tuple[Sample, Sample]:
    """(chosen, rejected), each the prompt and one answer, the answer scored, cut at `max_length`."""

    def one(answer: str) -> Sample:
        messages = (*preference.prompt, {"role": "assistant", "content": answer})
        context, answer, _ = _cut(tokenizer, messages, preference.where)
        prompt_ids, answer_ids = tokenize(tokenizer, context), tokenize(tokenizer, answer)
        scored = [False] * len(prompt_ids) + [True] * len(answer_ids)
        return Sample(ids=(*prompt_ids, *answer_ids), scored=tuple(scored), record=record).shortened(max_length)

    return one(preference.chosen), one(preference.rejected)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[Sample]:
    """Plain text in rows of at most `max_length` tokens, every token scored."""
    ids = tokenize(tokenizer, text)
    rows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Sample(ids=tuple(row), scored=(True,) * len(row), record=n) for n, row in enumerate(rows) if len(row) > 1]


def require_targets(samples: Iterable[Sample], places: Sequence[str], max_length: int) -> None:
    """Passes samples that each have at least one scored token.

    Raises:
        UserError: a record whose answer was cut off whole; a loss over it would be 0 / 0.
    """
    empty = sorted({sample.record for sample in samples if not any(sample.scored[1:])})
    if empty:
        raise UserError(
            f"{places[empty[0]]}: no token of the answer fits into max_length {max_length}"
            f" ({len(empty)} such records), so nothing in it carries loss",
            "Raise --max-length, shorten the prompt, or pass --skip-too-long to leave such records out",
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text`, special tokens of the template recognised, none added."""
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # lengths are our matter


def _cut(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> tuple[str, str, str]:
    """(context with generation prompt, answer with its end token, white space behind it) of a chat's last turn."""
    context = _render(tokenizer, messages[:-1], True, where)
    if context == _render(tokenizer, messages[:-1], False, where):
        raise UserError(f"{where}: the chat template has no generation prompt", "Use a ChatML template, as Qwen's are")
    whole = _render(tokenizer, messages, False, where)
    if not whole.startswith(context):
        raise UserError(
            f"{where}: the chat template's generation prompt is no prefix of its answer", "Use a plain ChatML template"
        )
    rest = whole[len(context) :]
    answer = rest.rstrip()
    return context, answer, rest[len(answer) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool, where: str
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{where}: the chat template refuses it ({reason})", "Change the record or the template"
        ) from None
    return str(text)
