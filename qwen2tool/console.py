"""What a person sees: Rich on a terminal, plain text when piped, JSON when asked for, errors on stderr.

Rich is imported only where something is drawn, so that `--help` and `--json` stay cheap.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160
"""Columns when nobody's terminal sets them: wide enough that no table of ours folds."""


class Advance(Protocol):
    """Tells a progress bar that `amount` more of its total is done."""

    def __call__(self, amount: float = 1.0) -> None: ...


def console(stderr: bool = False) -> Console:
    """A Rich console on stdout (or stderr) that writes plain text when the stream is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPED_WIDTH, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the reader, markup off: paths and tensor names hold brackets."""
    console().print(text, markup=False)


def complain(text: str) -> None:
    """One line on stderr, red on a terminal."""
    console(stderr=True).print(f"error: {text}", style="red", markup=False)


def remark(text: str) -> None:
    """One line on stderr that is no error: progress in words, a warning, a hint."""
    console(stderr=True).print(text, style="dim", markup=False)


def print_json(value: Any) -> None:
    """`value` on stdout as indented JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric_from: int = 1, *, stderr: bool = False
) -> None:
    """A table; the columns from `numeric_from` on are set flush right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position >= numeric_from else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console(stderr).print(table, markup=False)


def _cell(value: object) -> str:
    from rich.markup import escape

    return escape(format_number(value) if isinstance(value, float) else str(value))


def format_number(value: float) -> str:
    """Four significant digits; scientific notation where a plain number would hide the size."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def format_ranges(numbers: Iterable[int], separator: str = ", ") -> str:
    """Ascending numbers in short: [0, 1, 2, 5] as 0-2, 5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def format_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def resident_peak() -> int:
    """Most bytes that this process has held in memory.

    Linux's VmHWM, which starts anew with the program; `ru_maxrss`, the answer elsewhere, is inherited from whatever
    started it, so that a child of a large process looks large.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """A progress bar with the time left on stderr; silent when stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(amount: float = 1.0) -> None:
            bar.advance(task, amount)

        yield advance
