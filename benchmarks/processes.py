"""Measuring scripts in processes of their own, and at most one that imports ahead of its turn.

A peer's imports (torch, transformers, Unsloth) take 17 to 40 of the 60 to 130 seconds of its process and leave the GPU
idle. Begun while another process measures, they cost the run nothing but host cores and the memory of a CUDA context,
where an import makes one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Process:
    """A script that prints one line "RESULT {json}", running since its making.

    It runs in `work`, where a peer's caches in the current folder then land, and in a process group of its own, so that
    stopping it stops its compile workers as well. What it says goes to unnamed files: a pipe that nobody reads until
    its turn comes could fill and hold it up. Its stdin ends when this process does.
    """

    def __init__(self, script: Path, flags: Sequence[str], work: Path, environment: Mapping[str, str]) -> None:
        self._out = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # open until `stop`
        self._err = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(script), *flags], cwd=work, env=environment, stdin=subprocess.PIPE, stdout=self._out,
            stderr=self._err, text=True, process_group=0,
        )  # fmt: skip

    def result(self, seconds: float, told: str = "") -> dict[str, Any]:
        """The RESULT after reading `told` on stdin, or its `error`: what it said last, or that it was stopped.

        Args:
            seconds: most that it may take from now on; inf is no limit.
            told: all of its stdin.
        """
        try:
            self._process.communicate(told, timeout=None if math.isinf(seconds) else max(seconds, 1.0))
            return self._said()
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {seconds:.0f} s"}
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends it and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._out, self._err):
            if stream:
                stream.close()

    def _said(self) -> dict[str, Any]:
        for stream in (self._out, self._err):
            stream.seek(0)
        out, err = self._out.read(), self._err.read()
        found = [text for text in out.splitlines() if text.startswith("RESULT ")]
        if found:
            return dict(json.loads(found[-1].removeprefix("RESULT ")))
        lines = [text.strip() for text in (err or out).splitlines() if text.strip()]
        return {"error": lines[-1] if lines else f"exit code {self._process.returncode}"}


class Ahead:
    """At most one peer's process, begun before its turn and waiting for its job; `begin` starts it by the peer's name.

    Use within `contextlib.closing`: no process outlives it.
    """

    def __init__(self, begin: Callable[[str], Process]) -> None:
        self._begin = begin
        self._waiting: tuple[str, Process] | None = None

    def prepare(self, peer: str | None) -> None:
        """Begins the process of `peer`, unless it waits already; one of another peer is stopped, with None any."""
        if self._waiting and self._waiting[0] == peer:
            return
        self.close()
        if peer:
            self._waiting = peer, self._begin(peer)

    def take(self, peer: str) -> Process:
        """The process of `peer`, begun now if none waits."""
        self.prepare(peer)
        assert self._waiting
        (_, process), self._waiting = self._waiting, None
        return process

    def close(self) -> None:
        if self._waiting:
            (_, process), self._waiting = self._waiting, None
            process.stop()
