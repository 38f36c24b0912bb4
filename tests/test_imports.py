"""The rooms of the package import each other in the allowed directions only, and no file has grown past two."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "qwen2tool"
EVERYBODY = {"errors", "console"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "assets": set(),
    "checkpoint": set(),
    "data": {"checkpoint", "assets"},
    "kernels": set(),
    "routing": {"kernels", "checkpoint"},
    "convert": {"checkpoint"},
    "merge": {"checkpoint"},
    "verify": {"checkpoint", "convert", "routing", "data"},
    "training": {"routing", "kernels", "checkpoint", "data"},
    "hub": {"checkpoint"},
}
ALLOWED["demo"] = {*ALLOWED}
ALLOWED["commands"] = {*ALLOWED}
ALLOWED["cli"] = {"commands"}
ALLOWED["__init__"] = set()
ALLOWED["__main__"] = {"cli"}
MAX_LINES = 400


def room_of(module: str) -> str:
    """qwen2tool.merge.run -> merge; the package itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """(module of ours that is imported, whether inside a function), relative imports resolved."""
    tree = ast.parse(source)
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *([base] if base else [])])
            # `from qwen2tool import merge` imports a room, `from qwen2tool import __version__` a value
            names = [f"{base}.{alias.name}" if base == PACKAGE else base for alias in node.names]
        for name in names:
            if name.split(".")[0] == PACKAGE and name != f"{PACKAGE}.__version__":
                yield name, id(node) in inside


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports and must not, in words."""
    room, found = room_of(module), []
    for name, inside in imports(module, source, is_package):
        other = room_of(name)
        if other not in {room} | EVERYBODY | ALLOWED.get(room, set()):
            found.append(f"{module} imports {name}")
        elif room == "commands" and other not in {room} | EVERYBODY and not inside:
            found.append(f"{module} imports {name} outside a function")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts), file


def test_directions():
    found = [v for name, file in modules() for v in violations(name, file.read_text(), file.name == "__init__.py")]
    assert found == []


def test_every_room_has_its_rule():
    assert {room_of(name) for name, _ in modules()} <= ALLOWED.keys()


def test_nobody_imports_the_command_line():
    users = {
        name for name, file in modules() for other, _ in imports(name, file.read_text()) if room_of(other) == "cli"
    }
    assert users <= {f"{PACKAGE}.__main__"}
    assert "qwen2tool.cli" in (ROOT / "cli.py").read_text()


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("qwen2tool.checkpoint.bad", "from qwen2tool.merge.run import merge", "imports qwen2tool.merge.run"),
        ("qwen2tool.checkpoint.bad", "import qwen2tool.data.encode", "imports qwen2tool.data.encode"),
        ("qwen2tool.checkpoint.bad", "def f():\n    from qwen2tool import hub", "imports qwen2tool.hub"),
        ("qwen2tool.merge.bad", "from ..verify import run", "imports qwen2tool.verify"),
        ("qwen2tool.merge.bad", "from .. import verify", "imports qwen2tool.verify"),
        (
            "qwen2tool.kernels.bad",
            "from qwen2tool.checkpoint.reader import read_tensor",
            "imports qwen2tool.checkpoint",
        ),
        ("qwen2tool.demo.bad", "from qwen2tool.cli import main", "imports qwen2tool.cli"),
        ("qwen2tool.commands.bad", "from qwen2tool.merge.run import merge", "outside a function"),
        ("qwen2tool.cli", "def f():\n    from qwen2tool.merge.run import merge", "imports qwen2tool.merge"),
        ("qwen2tool.cellar.bad", "from qwen2tool.hub import plan", "imports qwen2tool.hub"),
        ("qwen2tool.hub.bad", "if TYPE_CHECKING:\n    from qwen2tool.training.run import train", "qwen2tool.training"),
    ],
)
def test_a_planted_import_is_found(module, source, words):
    (found,) = violations(module, source)
    assert found.startswith(module) and words in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "qwen2tool.merge.good",
            "from qwen2tool import __version__\nfrom qwen2tool.checkpoint.reader import read_tensor",
        ),
        ("qwen2tool.merge.good", "from .plan import plan_merge\nfrom ..errors import UserError\nimport torch"),
        ("qwen2tool.commands.good", "def f():\n    from qwen2tool.merge.run import merge"),
        ("qwen2tool.cli", "from qwen2tool.commands.merge import merge"),
        ("qwen2tool.__main__", "from qwen2tool.cli import main"),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert violations(module, source) == []


def test_no_file_is_two():
    rooms = (PACKAGE, "tests", "scripts", "benchmarks")
    lengths = {file: len(file.read_text().splitlines()) for room in rooms for file in (ROOT / room).rglob("*.py")}
    assert {str(file): n for file, n in lengths.items() if n > MAX_LINES} == {} and len(lengths) > 20
