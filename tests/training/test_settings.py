"""Settings from files and flags; wrong ones are named with what to write instead."""

import pytest
import yaml

from qwen2tool.errors import UserError
from qwen2tool.training.settings import load_settings

NEEDED = {"model": "m", "data": "d", "output": "o"}


def file_of(tmp_path, **values):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(NEEDED | values))
    return file


def test_flags_override_the_file(tmp_path):
    settings = load_settings(file_of(tmp_path, rank=8, epochs=3), {"rank": 16, "alpha": None})
    assert (settings.lora_rank, settings.lora_alpha, settings.epochs) == (16, 16, 3.0)


def test_yaml_writes_floats_and_lists_its_own_way(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlearning_rate: 2e-5\ntargets: [q_proj, v_proj]\n")
    settings = load_settings(file, {})
    assert settings.learning_rate == 2e-5 and settings.lora_targets == ("q_proj", "v_proj")
    assert load_settings(None, NEEDED | {"targets": "q_proj,v_proj"}).targets == settings.targets


def test_what_is_written_reads_back_the_same(tmp_path):
    settings = load_settings(None, NEEDED | {"rank": 8, "targets": "q_proj", "warmup_ratio": 0.1, "max_steps": 7})
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(settings.to_dict()))
    assert load_settings(file, {}) == settings


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'learning_rat'\. Did you mean 'learning_rate'"):
        load_settings(file_of(tmp_path, learning_rat=1e-4), {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": None}, "--model is missing"),
        ({"rank": 0}, "--rank is 0"),
        ({"rank": 1.5}, "--rank is 1.5"),
        ({"task": "ppo"}, "--task is 'ppo'"),
        ({"quantize": "int3"}, "--quantize is 'int3'"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"learning_rate": "fast"}, "--learning-rate is 'fast'"),
        ({"targets": "q_proj,lm_head"}, "--targets is 'lm_head'"),
        ({"adapter": "a", "rank": 8}, "--rank and --adapter exclude"),
        ({"recompute": "maybe"}, "--recompute is 'maybe'"),
        ({"skip_too_long": "maybe"}, "--skip-too-long is 'maybe'"),
        ({"graphs": "on"}, "--graphs is 'on'"),
        ({"routes": "fast"}, "--routes is 'fast'"),
        ({"memory_budget": 0}, "--memory-budget is 0"),
        ({"quantize": 4}, "--quantize is 4"),
        ({"quantize": True}, "--quantize is True"),
        ({"task": 7}, "--task is 7"),
        ({"task": ["dpo"]}, "--task is ['dpo']"),
        ({"dtype": 16}, "--dtype is 16"),
        ({"epochs": True}, "--epochs is True. Give a number"),
        ({"epochs": float("inf")}, "--epochs is inf"),
        ({"learning_rate": float("inf")}, "--learning-rate is inf"),
        ({"weight_decay": -5.0}, "--weight-decay is -5.0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**40}, "--seed is 1099511627776"),
        ({"targets": []}, "--targets is []"),
        ({"model": 5}, "--model is 5. Give text"),
        ({"scheduler": "constant", "warmup_ratio": 0.1}, "--scheduler constant knows no warm-up"),
    ],
)
def test_wrong_values_are_named(values, words):
    with pytest.raises(UserError) as caught:
        load_settings(None, {k: v for k, v in (NEEDED | values).items() if v is not None})
    assert words in str(caught.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="no settings in it"):
        load_settings(file, {})
    file.write_text("model: [unclosed")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(file, {})


def test_a_null_in_the_file_is_the_default(tmp_path):
    blank = file_of(tmp_path, learning_rate=None, batch_size=None, report_to=None, seed=None)
    assert load_settings(blank, {}) == load_settings(None, NEEDED)
