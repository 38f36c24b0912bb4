"""Opens models on a hub with the real client in a process of its own (huggingface_hub reads its endpoint at import).

`python -m tests.checkpoint.remote_client JOBS` runs JSON jobs [function, repo, revision] one after the other and prints
for each what it found, or the user error.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import open_checkpoint, resolve
from qwen2tool.checkpoint.inventory import take_inventory
from qwen2tool.checkpoint.remote import is_remote_adapter, open_remote
from qwen2tool.errors import UserError


def opened(repo: str, revision: str | None) -> dict[str, Any]:
    from qwen2tool.checkpoint.facts import files_section

    start = time.perf_counter()
    checkpoint = open_remote(repo, revision)
    seconds = time.perf_counter() - start
    found = take_inventory(checkpoint)
    return {
        "seconds": seconds,
        "torch": "torch" in sys.modules,
        "commit": checkpoint.commit,
        "path": str(checkpoint.path),
        "layers": checkpoint.geometry.num_hidden_layers,
        "tensors": {n: [t.dtype, list(t.shape), t.file.name, t.start, t.end] for n, t in checkpoint.tensors.items()},
        "missing": found.missing,
        "extra": found.extra,
        "files": files_section(checkpoint),
        "side": sorted(file.name for file in checkpoint.folder.iterdir()),
    }


def fetched(repo: str, revision: str | None) -> dict[str, Any]:
    folder = resolve(repo, revision)
    return {"folder": str(folder), "files": sorted(file.name for file in folder.iterdir())}


def counted(repo: str, revision: str | None) -> dict[str, Any]:
    checkpoint = open_checkpoint(repo, revision=revision)
    return {"format": checkpoint.format, "tensors": len(checkpoint.tensors), "seed": checkpoint.config.get("seed")}


def main(jobs: list[tuple[str, str, str | None]]) -> list[Any]:
    functions = {"open": opened, "fetch": fetched, "count": counted, "adapter": is_remote_adapter}
    results: list[Any] = []
    for name, repo, revision in jobs:
        try:
            results.append(functions[name](repo, revision))
        except UserError as error:
            results.append({"error": error.what, "fix": error.fix})
    return results


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
