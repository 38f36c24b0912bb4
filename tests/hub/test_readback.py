"""Every way in which the Hub's copy can differ from the plan, from a copy that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import HfApi

from qwen2tool.errors import EXIT_FINDING, UserError
from qwen2tool.hub.plan import plan_push
from qwen2tool.hub.readback import read_back

SHARD = "model-00001-of-00002.safetensors"
BIAS, WEIGHT = "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"


class Copy:
    """Answers the two questions that `read_back` asks with `sizes` and `tensors`, which a test may damage."""

    def __init__(self, plan: Any) -> None:
        self.sizes: dict[str, int | None] = {file.name: file.size for file in plan.files}
        self.tensors = {
            file: {name: SimpleNamespace(dtype=t.dtype, shape=list(t.shape)) for name, t in tensors.items()}
            for file, tensors in copy.deepcopy(plan.tensors).items()
        }

    def model_info(self, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.sizes.items()])

    def parse_safetensors_file_metadata(self, repo_id: str, file: str, **_: Any) -> Any:
        return SimpleNamespace(tensors=self.tensors[file])


def drop_two(remote: Copy) -> None:
    del remote.tensors[SHARD][WEIGHT], remote.tensors[SHARD][BIAS]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda c: c.sizes.update({"config.json": 1}), "config.json has 1 bytes on the Hub, "),
        (lambda c: c.sizes.pop(SHARD), f"{SHARD} is missing on the Hub (commit abc)"),
        (lambda c: setattr(c.tensors[SHARD][BIAS], "shape", [1]), f"has {BIAS} as BF16 [1], not BF16 [64]"),
        (lambda c: setattr(c.tensors[SHARD][BIAS], "dtype", "F16"), f"has {BIAS} as F16 [64], not BF16 [64]"),
        (lambda c: c.tensors[SHARD].update(spare=c.tensors[SHARD][BIAS]), "holds spare, which was not sent"),
        (drop_two, f"lacks {BIAS} (2 of "),
    ],
)
def test_a_difference_is_named(base_folder: Path, damage: Callable[[Copy], Any], complaint: str) -> None:
    plan = plan_push(base_folder, "me/tiny")
    remote = Copy(plan)
    read_back(cast(HfApi, remote), plan, "abc")
    damage(remote)
    with pytest.raises(UserError) as caught:
        read_back(cast(HfApi, remote), plan, "abc")
    assert complaint in caught.value.what
    assert caught.value.exit_code == EXIT_FINDING


def test_a_hub_that_lists_no_sizes_is_no_fault(base_folder: Path) -> None:
    plan = plan_push(base_folder, "me/tiny")
    remote = Copy(plan)
    remote.sizes = dict.fromkeys(remote.sizes)
    read_back(cast(HfApi, remote), plan, "abc")
