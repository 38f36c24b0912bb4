"""`import qwen2tool` is light, and its public names are the functions, however often they are asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import qwen2tool


@pytest.mark.parametrize("name", [name for name in qwen2tool.__all__ if name != "__version__"])
def test_names_stay_what_they_are(name):
    first = getattr(qwen2tool, name)
    for room in Path(qwen2tool.__file__).parent.iterdir():
        if (room / "__init__.py").is_file():
            import_module(f"qwen2tool.{room.name}")
    assert getattr(qwen2tool, name) is first and callable(first) and not isinstance(first, ModuleType)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mergd'"):
        _ = qwen2tool.mergd


def test_importing_loads_nothing_heavy():
    check = "import qwen2tool, sys; print({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "set()\n"
