"""What can go wrong between here and the Hub, each in one sentence with its remedy, and never with the token in it.

huggingface_hub answers with several lines, and raises the errors of its HTTP client as they are: httpx up to 1.x,
httpx2 from 2.x. Those are told by their module's name, so that neither has to be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwen2tool.errors import UserError

HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2")
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"
MAX_MESSAGE = 160


@contextmanager
def in_one_sentence(repo_id: str, endpoint: str, token: str) -> Iterator[None]:
    """Turns errors of the Hub, its client and the network into a `UserError`; anything else passes as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = _translate(error, repo_id, endpoint)
        if known is None:
            raise
        raise UserError(known.what.replace(token, "***"), known.fix) from None


def _translate(error: Exception, repo_id: str, endpoint: str) -> UserError | None:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    text = str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE is set, so nothing can be sent", "Unset HF_HUB_OFFLINE and push again")
    if "xet-write-token" in text or "xet-read-token" in text:
        return UserError(
            f"{endpoint} has no Xet storage, which huggingface_hub uses for large files",
            "Set HF_HUB_DISABLE_XET=1 and push again",
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{repo_id}: has no such revision", "Name a branch; a new one is made from main")
    if isinstance(error, HfHubHTTPError):
        return _by_status(error.response.status_code, text, repo_id, endpoint)
    if type(error).__module__.partition(".")[0] in HTTP_CLIENTS or isinstance(error, ConnectionError | TimeoutError):
        # Its text is left out: an error about a header quotes the header, and that holds the token.
        return UserError(
            f"{endpoint} cannot be reached ({type(error).__name__})",
            "Check the network and HF_ENDPOINT, then push again: what was sent is kept",
        )
    if isinstance(error, SafetensorsParsingError):
        return UserError(f"{repo_id}: the Hub's copy cannot be read back ({_first_line(text)})", "Push again")
    if isinstance(error, ValueError) and "README.md" in text:
        return UserError(f"README.md: the Hub refuses its front matter ({_one_line(text)})", "Repair the card")
    return None


def _by_status(status: int, text: str, repo_id: str, endpoint: str) -> UserError:
    if status == 401:
        return UserError(f"{endpoint} does not accept the Hub token (401)", LOG_IN)
    if status == 403:
        return UserError(
            f"{repo_id}: the Hub token may not write there (403)",
            "Use a token with write access to that owner, or push to a repo of your own",
        )
    if status == 404:
        return UserError(
            f"{repo_id}: no model repo of that name can be seen (404); a data set or Space of that name does not count",
            "Check the name and what the token may see",
        )
    if status in (409, 412):
        return UserError(f"{repo_id}: somebody else changed the repo at the same time ({status})", "Push again")
    if status in (402, 413, 429) or status >= 500:
        return UserError(
            f"{endpoint} refuses for now ({status}: {_first_line(text)})",
            "Wait and push again, or look at the quota of your account",
        )
    return UserError(f"{repo_id}: {endpoint} refuses the push ({status}: {_one_line(text)})", "Correct what it names")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:MAX_MESSAGE]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE]
