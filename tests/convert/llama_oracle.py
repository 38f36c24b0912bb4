"""llama.cpp as an oracle: what keeps its own faults out of the comparison."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def plain_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as the file has them: packed for AMX, they make llama.cpp's products crash (ggml-org/llama.cpp#20824)."""
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it compiles llama.cpp)")
    default = package.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(package.llama_cpp, "llama_model_default_params", plain)
