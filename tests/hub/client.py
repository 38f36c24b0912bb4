"""One push by the real client in a process of its own, as a user's shell would start it.

huggingface_hub reads its endpoint and its switches once, at import, so they are set from outside. `python -m
tests.hub.client JOB` runs a pickled (plan or folder, options) and prints the result, or the user error, as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2tool.errors import UserError
from qwen2tool.hub.plan import PushPlan, plan_push

ROOT = Path(__file__).parents[2]
REPO = "me/tiny"


def push_from_shell(
    home: Path, endpoint: str, what: PushPlan | Path, *, env: dict[str, str] | None = None, **options: Any
) -> Any:
    """What `push` returned as a dict, or {"error", "code"}; `home` holds the client's cache and no token."""
    job = home / "job.pickle"
    job.write_bytes(pickle.dumps((what, options)))
    run = from_shell(home, endpoint, "tests.hub.client", str(job), env=env)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def from_shell(
    home: Path, endpoint: str, module: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` with the client pointed at `endpoint`."""
    ours = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "writer", "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=outside | ours | {"NO_PROXY": "*"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def main(job: Path) -> dict[str, Any]:
    from qwen2tool.hub.push import push

    what, options = pickle.loads(job.read_bytes())
    try:
        plan = plan_push(what, REPO) if isinstance(what, Path) else what
        return asdict(push(plan, **options))
    except UserError as error:
        return {"error": str(error), "code": error.exit_code}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
