"""Where a folder says it comes from: base model, licence, the record of the run that wrote it.

A public card must not guess. A base is named only as a Hub id (the Hub rejects a card with a local path in it), a
licence only where the folder itself states one. Local paths are shortened to their last part: a home folder is
nobody's business.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qwen2tool.checkpoint.adapter import ADAPTER_CONFIG, PROVENANCE_FILE
from qwen2tool.checkpoint.folder import HUB_ID
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.errors import UserError

SIDECARS = (PROVENANCE_FILE, "qwen2tool_merge.json")
"""What our trainer and our merge write beside their results."""
BASE_KEYS = ("base_model_name_or_path", "base_model", "base")
CACHE_FOLDER = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
"""How the Hub's cache names the folder of a model."""
FRONT_MATTER = re.compile(r"\A---\r?\n(?P<yaml>.*?)^---\s*$", re.DOTALL | re.MULTILINE)
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
APACHE_TITLE = re.compile(r"\s*Apache License\s+Version 2\.0")


def read_sidecars(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> contents of the records that our own commands left in `folder`."""
    return {name: read_json(folder / name) for name in SIDECARS if (folder / name).is_file()}


def stated_base(folder: Path) -> str | None:
    """What adapter_config.json or a sidecar of ours names as the base, be it a path or a Hub id."""
    records = list(read_sidecars(folder).values())
    if (folder / ADAPTER_CONFIG).is_file():
        records.insert(0, read_json(folder / ADAPTER_CONFIG))
    for record in records:
        for key in BASE_KEYS:
            value = record.get(key)
            if isinstance(value, str) and value:
                return value
    return None


def as_hub_id(base: str, folder: Path) -> str | None:
    """`base` as owner/name where it is a Hub id or lies in the Hub's cache; None for a local path.

    A relative path such as runs/base looks like an id, so one that exists here or at any level above `folder` is none.
    """
    for part in Path(base).parts:
        if cached := CACHE_FOLDER.fullmatch(part):
            return f"{cached['owner']}/{cached['name']}"
    if not HUB_ID.fullmatch(base):
        return None
    return None if any((root / base).exists() for root in (Path(), *folder.resolve().parents)) else base


def front_matter(text: str, source: str) -> dict[str, Any]:
    """The YAML block at the top of a card; empty where there is none.

    Raises:
        UserError: it is no valid YAML mapping. `source` names the card in the message.
    """
    block = FRONT_MATTER.match(text)
    if block is None:
        return {}
    try:
        value = yaml.safe_load(block["yaml"])
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"{source}: its front matter is no valid YAML ({line})", "Repair the block between ---"
        ) from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{source}: its front matter is no mapping", "Write key: value lines between ---")
    return value or {}


def stated_license(folder: Path) -> str | None:
    """The Hub's name of the licence that the folder's own card or LICENSE states, else None."""
    readme = folder / "README.md"
    if readme.is_file():
        stated = front_matter(readme.read_text(encoding="utf-8", errors="replace"), str(readme)).get("license")
        if isinstance(stated, str):
            return stated
    for name in LICENSE_FILES:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            stated = front_matter(text, str(folder / name)).get("license")
            if isinstance(stated, str):
                return stated
            return "apache-2.0" if APACHE_TITLE.match(text) else None
    return None


def is_local(value: str) -> bool:
    """Whether `value` can only be a path on a disk: absolute, from ~ or ., a Windows path, or too deep for an id."""
    return value.startswith(("/", "~", ".")) or "\\" in value or value.count("/") > 1


def local_paths(record: Any) -> list[str]:
    """All strings in `record`, however deep, that are absolute paths."""
    if isinstance(record, str):
        return [record] if record.startswith(("/", "~/")) or re.match(r"[A-Za-z]:\\", record) else []
    items = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    return [path for item in items for path in local_paths(item)]


def without_paths(record: Any) -> Any:
    """`record` with every absolute path in it shortened to its last part."""
    if isinstance(record, str):
        return re.split(r"[/\\]", record.rstrip("/\\"))[-1] if local_paths(record) else record
    if isinstance(record, dict):
        return {key: without_paths(value) for key, value in record.items()}
    return [without_paths(value) for value in record] if isinstance(record, list) else record
