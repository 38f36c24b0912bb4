"""Whether transformers builds and runs a layer from a config.json, asked before anything is read.

`checkpoint.config_faults` names what is known to fail; whatever else transformers complains about is passed on in its
own words. Costs a layer without memory ("meta" device).
"""

from __future__ import annotations

from copy import deepcopy

import torch

from qwen2tool.checkpoint.config_faults import config_faults
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.load import quiet_transformers
from qwen2tool.checkpoint.view import View
from qwen2tool.errors import UserError

MOST_WORDS = 160
QUERY = "model.layers.0.self_attn.q_proj.weight"


def refusal(view: View | Checkpoint) -> str | None:
    """What is wrong with the config.json of `view` for a reader, in a sentence; None where a model can be built."""
    known = next(config_faults(view.config, view.geometry.num_hidden_layers), None)
    return known or _complaint(view)


def require_usable(view: View | Checkpoint) -> None:
    """Passes a reference that can be run.

    Raises:
        UserError: transformers refuses its config.json.
    """
    if (why := refusal(view)) is not None:
        raise UserError(f"{view.path}: the reference's config.json cannot be used ({why})", "Copy config.json again")


def _complaint(view: View | Checkpoint) -> str | None:
    from transformers import Qwen2Config, Qwen2Model
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    try:
        with quiet_transformers():
            config = Qwen2Config.from_dict(deepcopy(dict(view.config)))
            config.layer_types, config.num_hidden_layers = config.layer_types[:1], 1
            with torch.device("meta"):
                Qwen2Model(config)
            if _heads_fit(view):  # on the CPU: a head_dim of 2**31 in a config of 1 kB took 13 GB
                Qwen2RotaryEmbedding(config)
    except Exception as error:  # a config that is wrong surfaces as anything
        return f"transformers: {' '.join(str(error).split())[:MOST_WORDS]}"
    return None


def _heads_fit(view: View | Checkpoint) -> bool:
    """Whether the first layer has as many q rows as config.json says, so that its sizes are those of the file."""
    query, shape = view.tensors.get(QUERY), view.geometry
    return query is not None and query.shape[:1] == (shape.num_attention_heads * shape.head_dim,)
