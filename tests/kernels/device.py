"""Where kernel tests run: a GPU if there is one, else the CPU through Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nearest_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, Triton's interpreter rounds fp32 to bf16 to nearest even, as a GPU does.

    By itself it cuts the low bits off, twice the error of a rounding: right kernels would fail on the CPU alone.
    """
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut = builder.cast_impl

    def nearest(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cut(self, src, dst_type)
        rounded = torch.from_numpy(numpy.array(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(builder, "cast_impl", nearest)
