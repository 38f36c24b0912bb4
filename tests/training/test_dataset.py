"""Which records are used, cut or left out, counted exactly."""

from __future__ import annotations

import json

import pytest

from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.errors import UserError
from qwen2tool.training.dataset import read_records
from tests.training.common import settings_for, write_preferences


@pytest.fixture
def tokenizer(base_folder):
    return load_tokenizer(base_folder)


def test_only_what_loses_tokens_counts_as_cut(base_folder, tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"instruction": "the question", "output": "the answer" + " reads" * n}) for n in range(3)]
    file.write_text("\n".join(lines))
    lengths = [len(s.ids) for s in read_records(tokenizer, file, settings_for(base_folder, tmp_path)).items]
    assert lengths == sorted(set(lengths))
    for length, cut in ((lengths[2], 0), (lengths[2] - 1, 1), (lengths[1], 1), (lengths[0], 2)):
        records = read_records(tokenizer, file, settings_for(base_folder, tmp_path, max_length=length))
        assert (records.cut, records.skipped, len(records.items)) == (cut, 0, 3)
        assert max(len(sample.ids) for sample in records.items) == length


def test_pairs_stay_pairs_and_one_side_too_long_leaves_both_out(base_folder, tokenizer, tmp_path):
    file = write_preferences(tmp_path / "pairs.jsonl", count=2)
    with file.open("a") as handle:
        handle.write("\n" + json.dumps({"prompt": "the question " * 99, "chosen": "yes", "rejected": "no"}))
    settings = settings_for(base_folder, tmp_path, task="dpo", max_length=150)
    with pytest.raises(UserError, match=r"line 3: .* \(1 such records\)"):
        read_records(tokenizer, file, settings)
    records = read_records(
        tokenizer, file, settings_for(base_folder, tmp_path, task="dpo", max_length=150, skip_too_long=True)
    )
    assert records.skipped == 1 and [len(item) for item in records.items] == [2, 2]
    assert [pair[0].record for pair in records.items] == [0, 1]


def test_nothing_that_fits(base_folder, tokenizer, tmp_path):
    file = write_preferences(tmp_path / "pairs.jsonl")
    settings = settings_for(base_folder, tmp_path, task="dpo", max_length=5, skip_too_long=True)
    with pytest.raises(UserError, match="no record's answer fits into max_length 5"):
        read_records(tokenizer, file, settings)


def test_a_pair_that_differs_only_behind_the_cut_prefers_nothing(base_folder, tokenizer, tmp_path):
    file = write_preferences(tmp_path / "pairs.jsonl", count=2)
    same = "the answer " * 90
    with file.open("a") as handle:
        handle.write("\n" + json.dumps({"prompt": "Q", "chosen": same + "good", "rejected": same + "bad"}))
    settings = settings_for(base_folder, tmp_path, task="dpo", max_length=120)
    with pytest.raises(UserError, match="line 3: chosen and rejected are the same up to max_length 120"):
        read_records(tokenizer, file, settings)
    skipping = settings_for(base_folder, tmp_path, task="dpo", max_length=120, skip_too_long=True)
    records = read_records(tokenizer, file, skipping)
    assert (len(records.items), records.skipped) == (2, 1)
