"""Greedy continuations, against transformers' and PEFT's own loading of the same folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.adapter import open_adapter
from qwen2tool.checkpoint.load import load_tokenizer
from qwen2tool.convert.read import open_qwen2
from qwen2tool.data.samples import Sample
from qwen2tool.errors import UserError
from qwen2tool.verify.behaviour import Agreement, agreement, compare_generations, end_tokens, model_of, prompt_of
from qwen2tool.verify.sides import Side
from tests.verify import zoo
from tests.verify.common import random_samples, variant, without

NEW = 12


def side(folder: Path, *adapters: Path) -> Side:
    return Side(view=open_qwen2(folder, whole=False), adapters=tuple(map(open_adapter, adapters)))


def prompts() -> list[Sample]:
    return random_samples(count=3, length=10, unscored=6)


def by_transformers(model: Qwen2ForCausalLM, samples: list[Sample]) -> list[list[int]]:
    found = []
    for sample in samples:
        ids = torch.tensor([sample.ids[:6]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found.append(output[0, 6:].tolist())
    return found


def ours(folder: Path, *adapters: Path) -> list[list[int]]:
    from qwen2tool.verify.behaviour import continue_all

    opened = side(folder, *adapters)
    with model_of(opened, torch.float32, "cpu") as model:
        return continue_all(model, [prompt_of(s) for s in prompts()], NEW, end_tokens(opened.view), "test")


@pytest.mark.parametrize("tied", [False, True])
def test_continuations_are_those_of_transformers(base_folder: Path, tied_folder: Path, tied: bool) -> None:
    folder = tied_folder if tied else base_folder
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert ours(folder) == by_transformers(model, prompts())


def test_with_an_adapter_those_of_peft(base_folder: Path, adapter_folder: Path) -> None:
    from peft import PeftModel

    base = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    found = ours(base_folder, adapter_folder)
    assert found == by_transformers(model, prompts())
    assert found != ours(base_folder)


def test_a_copy_agrees_to_the_end_and_a_damaged_one_does_not(tmp_path: Path, base_folder: Path) -> None:
    same = compare_generations(side(base_folder), side(base_folder), prompts(), NEW)
    assert same.candidate == Agreement(same=1.0, agreeing=1.0, first=None)
    assert (same.prompts, same.new_tokens, same.texts) == (3, NEW, [])
    lost = variant(base_folder, tmp_path / "lost", without("v_proj.bias"))
    found = compare_generations(side(base_folder), side(lost), prompts(), NEW, tokenizer=load_tokenizer(base_folder))
    assert found.candidate.same < 1 and found.candidate.first is not None
    assert found.floor == same.floor and found.floor.agreeing > found.candidate.agreeing
    assert found.texts[0]["agrees for"] == found.candidate.first
    assert isinstance(found.texts[0]["reference"], str)
    assert set(found.to_json()) == {"prompts", "new_tokens", "floor_of", "candidate", "floor", "texts"}


def test_missing_biases_are_zeros_as_transformers_has_them(tmp_path: Path, base_folder: Path) -> None:
    lost = variant(base_folder, tmp_path / "lost", without("k_proj.bias"))
    zeroed = variant(base_folder, tmp_path / "zero", lambda s: zoo.on_biases("k", zoo.zero)(s, zoo.Zoo(3, 4, 2)))
    assert ours(lost) == ours(zeroed) != ours(base_folder)


def test_a_candidate_without_a_weight_is_refused(tmp_path: Path, base_folder: Path) -> None:
    lost = variant(base_folder, tmp_path / "lost", without("layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        compare_generations(side(base_folder), side(lost), prompts(), NEW)
    with pytest.raises(UserError, match="no prompt"):
        compare_generations(side(base_folder), side(base_folder), [], NEW)


def test_agreement_by_hand() -> None:
    truth, found = [[1, 2, 3, 4], [5, 6], [7, 8]], [[1, 2, 9, 4], [5, 6], [7]]
    assert agreement(truth, found) == Agreement(same=pytest.approx(1 / 3), agreeing=5 / 8, first=1)
    assert agreement(truth, truth) == Agreement(same=1.0, agreeing=1.0, first=None)
    assert agreement([[]], [[]]).agreeing == 1.0


def test_the_prompt_is_what_comes_before_the_first_scored_token() -> None:
    assert prompt_of(Sample(ids=(1, 2, 3, 4), scored=(False, False, True, False), record=0)) == (1, 2)
    assert prompt_of(Sample(ids=(1, 2, 3), scored=(True, True, True), record=0)) == (1,)
    assert prompt_of(Sample(ids=(1, 2, 3), scored=(True, False, False), record=0)) == (1, 2, 3)


def test_texts_end_where_generation_config_says(base_folder: Path) -> None:
    assert end_tokens(open_qwen2(base_folder)) == [2, 0]
