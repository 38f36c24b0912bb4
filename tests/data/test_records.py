"""Every shape of record is read into one, and every refusal names file and record."""

import json

import pytest

from qwen2tool.data.records import read_conversations, read_preferences
from qwen2tool.errors import UserError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
LLAMA_FACTORY = {
    "conversations": [{"from": "human", "value": "Q"}],
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
}


def write(path, records, as_array=False):
    lines = [json.dumps(record) for record in records]
    path.write_text(f"[{','.join(lines)}]" if as_array else "\n".join(lines))
    return path


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "Q", "output": "A"}, [USER, ANSWER]),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\nI"}, ANSWER]),
        ({"instruction": "Q", "output": "A", "system": "S"}, [{"role": "system", "content": "S"}, USER, ANSWER]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": "S"}, [{"role": "system", "content": "S"}, USER, ANSWER]),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, [USER, ANSWER, USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [USER, ANSWER]),
    ],
)
def test_instruction_shapes(tmp_path, record, messages, as_array):
    (found,) = read_conversations(write(tmp_path / "d.json", [record], as_array))
    assert list(found.messages) == messages
    assert found.where.endswith("record 1" if as_array else "line 1")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        LLAMA_FACTORY,
    ],
)
def test_preference_shapes(tmp_path, record):
    (found,) = read_preferences(write(tmp_path / "d.jsonl", [record]))
    assert (list(found.prompt), found.chosen, found.rejected) == ([USER], "good", "bad")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"instruction": "Q", "output": "A"}\n{"instruction": ', ["line 2", "malformed JSON"]),
        ('[{"instruction": "Q",\n "output" "A"}]', ["line 2", "malformed JSON"]),
        ('{"instruction": "Q", "output": "A"}\n\n{"instruction": "Q"}', ["line 3", "no answer"]),
        ('{"instruction": "Q", "output": ""}', ["line 1", "no answer"]),
        ('{"output": "A"}', ["line 1", "no instruction"]),
        ('{"messages": [{"role": "user", "content": "Q"}]}', ["line 1", "no answer"]),
        ('{"messages": [{"role": "robot", "content": "Q"}]}', ["message 1", "'robot'"]),
        ('{"question": "Q"}', ["line 1", "no known shape"]),
        ('{"messages": [{"role": "assistant", "content": "A"}]}', ["line 1", "before any question"]),
        ('{"messages": [{"role": ["user"], "content": "Q"}]}', ["message 1"]),
        ('{"instruction": "Q", "output": "A", "system": ["S"]}', ["line 1", "'system' is a list"]),
        ('{"instruction": "Q", "output": "A", "history": ["Q"]}', ["line 1", "history"]),
        ('{"instruction": "Q", "output": "A\\ud800"}', ["line 1", "surrogate"]),
        ('["Q"]', ["record 1", "not an object"]),
        ("", ["no records"]),
    ],
)
def test_bad_instructions_are_named(tmp_path, text, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_conversations(file)
    assert all(word in str(caught.value) for word in ["bad.jsonl", *words]), str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": None}, "rejected"),
        ({"chosen": "bad", "rejected": "bad"}, "same text"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "different conversations"),
    ],
)
def test_bad_preferences_are_named(tmp_path, change, words):
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad"} | change
    file = write(tmp_path / "p.jsonl", [{k: v for k, v in record.items() if v is not None}])
    with pytest.raises(UserError, match="line 1") as caught:
        read_preferences(file)
    assert words in str(caught.value)


def test_a_system_prompt_beside_answers_that_repeat_the_question_is_kept(tmp_path):
    record = {"prompt": "Q", "system": "S", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (found,) = read_preferences(write(tmp_path / "p.jsonl", [record]))
    assert list(found.prompt) == [{"role": "system", "content": "S"}, USER]


def test_line_separators_inside_text_are_text(tmp_path):
    """JSON allows U+2028 and U+0085 unescaped in strings; Python's splitlines would cut the record there."""
    file = tmp_path / "d.jsonl"
    file.write_text('{"instruction": "a\u2028b\u0085c", "output": "A"}\r\n{"instruction": "Q", "output": "A"}\n')
    assert [c.messages[0]["content"] for c in read_conversations(file)] == ["a\u2028b\u0085c", "Q"]
