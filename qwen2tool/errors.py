"""What a user can get wrong, as one line that says what, where and what to do, with the exit code that goes with it."""

from __future__ import annotations

EXIT_FINDING = 1
"""The command worked and found that something is wrong (a checkpoint is damaged, two models differ)."""
EXIT_UNUSABLE = 2
"""The command could not do or tell what it was asked (bad input, missing file, too little text)."""


class UserError(Exception):
    """Something in the user's input or environment stands in the way; never a bug of ours.

    Args:
        what: what is wrong and where: the file, tensor, line or flag by name. No full stop at the end.
        fix: what to do about it, as an instruction. No full stop at the end.
        exit_code: what the process ends with: `EXIT_FINDING` where a fault was looked for and found.
    """

    def __init__(self, what: str, fix: str, exit_code: int = EXIT_UNUSABLE) -> None:
        super().__init__(what, fix)
        self.what = " ".join(what.split())
        self.fix = " ".join(fix.split())
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}."
