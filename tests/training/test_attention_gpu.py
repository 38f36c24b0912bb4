"""On a GPU: the batch that kills stock attention, with key biases as real Qwen2 has them.

The real case needs the published checkpoint (QWEN2TOOL_REAL_MODEL) and the records it was seen on
(QWEN2TOOL_ALPACA, alpaca_en_demo.json of LLaMA-Factory's data folder).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qwen2tool.routing.attention import safe_attention
from qwen2tool.training.run import train
from qwen2tool.training.settings import load_settings

LENGTHS = (72, 75, 176, 448)
"""Token lengths of the batch at which TRL's default run got its NaN; 448 % 128 == 64."""


@pytest.mark.gpu
def test_masked_attention_with_large_key_biases_has_a_finite_gradient():
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (len(LENGTHS), 14, max(LENGTHS), 64)
    query, key, value, upstream = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32) for _ in range(4)
    )
    constant = torch.randn(64, generator=generator, device="cuda")
    key = key + 100 * constant / constant.norm()
    query = query - 6 * constant / constant.norm()  # scores far below zero: the row's log-sum-exp is what breaks cuDNN
    real = torch.arange(max(LENGTHS), device="cuda") < torch.tensor(LENGTHS, device="cuda")[:, None]
    mask = real[:, None, None, :] & torch.ones(shape[2], shape[2], device="cuda").tril().bool()
    inputs = [t.bfloat16().requires_grad_() for t in (query, key, value)]
    with safe_attention():
        output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        output.backward(upstream.bfloat16() * real[:, None, :, None])
    assert all(t.grad.isfinite().all() for t in inputs)


def records_of_the_batch(tokenizer, file: Path) -> list[dict]:
    from qwen2tool.data.encode import encode_conversation
    from qwen2tool.data.records import read_conversations

    records = json.loads(file.read_text())
    found: dict[int, dict] = {}
    for number, conversation in enumerate(read_conversations(file)):
        length = len(encode_conversation(tokenizer, conversation, number, 4096).ids)
        if length in LENGTHS:
            found.setdefault(length, records[number])
    return [found[length] for length in LENGTHS]


@pytest.mark.gpu
@pytest.mark.skipif(
    "QWEN2TOOL_REAL_MODEL" not in os.environ or "QWEN2TOOL_ALPACA" not in os.environ,
    reason="needs QWEN2TOOL_REAL_MODEL and QWEN2TOOL_ALPACA",
)
def test_ours_trains_through_the_very_batch(tmp_path):
    from qwen2tool.checkpoint.load import load_tokenizer

    model = Path(os.environ["QWEN2TOOL_REAL_MODEL"])
    records = records_of_the_batch(load_tokenizer(model), Path(os.environ["QWEN2TOOL_ALPACA"]))
    (tmp_path / "batch.json").write_text(json.dumps(records))
    fields = {
        "model": str(model), "data": str(tmp_path / "batch.json"), "quantize": "nf4", "gradient_accumulation": 1,
        "epochs": 3, "dropout": 0.0, "device": "cuda",
    }  # fmt: skip
    report = train(load_settings(None, fields | {"output": str(tmp_path / "ours")}))
    assert report.steps == 3 and report.last_loss < report.first_loss

    # The negative control: stock transformers on the same batch, padded, on the backend that torch picks for itself.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert not padded_gradient(model, tmp_path / "batch.json").isfinite().all()
    with safe_attention():
        assert padded_gradient(model, tmp_path / "batch.json").isfinite().all()


def padded_gradient(folder: Path, file: Path) -> torch.Tensor:
    """Of the loss in the embeddings, by transformers in bf16, sequences padded on the right."""
    from transformers import Qwen2ForCausalLM

    from qwen2tool.checkpoint.load import load_tokenizer
    from qwen2tool.data.encode import encode_conversation
    from qwen2tool.data.records import read_conversations

    tokenizer = load_tokenizer(folder)
    samples = [encode_conversation(tokenizer, c, n, 4096) for n, c in enumerate(read_conversations(file))]
    shape = len(samples), max(len(sample.ids) for sample in samples)
    ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), torch.zeros(shape)
    for row, sample in enumerate(samples):
        end = len(sample.ids)
        ids[row, :end], mask[row, :end] = torch.tensor(sample.ids), 1
        labels[row, :end] = torch.where(torch.tensor(sample.scored), ids[row, :end], -100)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    embedded = model.get_input_embeddings()(ids.cuda()).detach().requires_grad_()
    model.requires_grad_(False)
    model(inputs_embeds=embedded, attention_mask=mask.long().cuda(), labels=labels.cuda()).loss.backward()
    return embedded.grad
