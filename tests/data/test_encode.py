"""What carries loss: the assistant's words and the end of its turn, nothing else; checked by decoding."""

import pytest

from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.data.encode import encode_conversation, encode_preference, encode_text, require_targets
from qwen2tool.data.records import Conversation, Preference
from qwen2tool.errors import UserError

TURNS = (
    {"role": "user", "content": "the question?"},
    {"role": "assistant", "content": "\n the answer. "},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "no more"},
)
IM_START, IM_END = 1, 2


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return load_tokenizer(base_folder)


def scored_text(tokenizer, sample):
    return tokenizer.decode([i for i, counts in zip(sample.ids, sample.scored, strict=True) if counts])


def test_only_answers_and_their_end_are_scored(tokenizer):
    sample = encode_conversation(tokenizer, Conversation(messages=TURNS, where="here"), 5, 999)
    assert scored_text(tokenizer, sample) == "\n the answer. <|im_end|>no more<|im_end|>"
    whole = tokenizer.apply_chat_template(list(TURNS), tokenize=False)
    assert tokenizer.decode(sample.ids) == whole
    assert sample.record == 5


def test_prompt_is_tokenised_as_generation_will_see_it(tokenizer):
    sample = encode_conversation(tokenizer, Conversation(messages=TURNS[:2], where="here"), 0, 999)
    prompt = tokenizer.apply_chat_template(list(TURNS[:1]), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(sample.ids[: len(ids)]) == ids
    assert not any(sample.scored[: len(ids)]) and sample.scored[len(ids)]


def test_truncation_keeps_the_start(tokenizer):
    whole = encode_conversation(tokenizer, Conversation(messages=TURNS, where="here"), 0, 999)
    cut = encode_conversation(tokenizer, Conversation(messages=TURNS, where="here"), 0, 40)
    assert cut.ids == whole.ids[:40] and cut.scored == whole.scored[:40]


def test_preference_shares_the_prompt_and_scores_each_answer(tokenizer):
    pair = Preference(prompt=TURNS[:1], chosen="the good one", rejected="bad", where="here")
    chosen, rejected = encode_preference(tokenizer, pair, 3, 999)
    start = chosen.scored.index(True)
    assert chosen.ids[:start] == rejected.ids[:start] and rejected.scored.index(True) == start
    assert scored_text(tokenizer, chosen) == "the good one<|im_end|>"
    assert scored_text(tokenizer, rejected) == "bad<|im_end|>"
    assert chosen.ids[-1] == rejected.ids[-1] == IM_END


def test_plain_text_is_scored_whole_in_rows(tokenizer):
    rows = encode_text(tokenizer, "the user reads the answer " * 20, 16)
    assert max(len(row.ids) for row in rows) == 16 and all(all(row.scored) for row in rows)
    assert tokenizer.decode([i for row in rows for i in row.ids]) == "the user reads the answer " * 20


def test_an_answer_that_does_not_fit_is_an_error_that_names_the_record(tokenizer):
    samples = [encode_conversation(tokenizer, Conversation(messages=TURNS[:2], where="w"), n, 8) for n in range(2)]
    with pytest.raises(UserError, match=r"line 1: no token of the answer fits into max_length 8 \(2 such"):
        require_targets(samples, ["data line 1", "data line 2"], 8)
    fitting = [encode_conversation(tokenizer, Conversation(messages=TURNS[:2], where="w"), 0, 999)]
    require_targets(fitting, ["data line 1"], 999)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no generation prompt"),
        ("{{ raise_exception('no system role') }}", "refuses it (no system role)"),
        ("{{ messages[0]['content' }}", "refuses it"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_named(base_folder, template, words):
    tokenizer = load_tokenizer(base_folder)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="data line 7: the chat template") as caught:
        encode_conversation(tokenizer, Conversation(messages=TURNS[:2], where="data line 7"), 0, 99)
    assert words in str(caught.value)


def test_a_damaged_tokenizer_is_named(base_copy):
    (base_copy / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(base_copy)
