"""A checkpoint on the Hub: opened by the headers of its shards, or downloaded.

A safetensors header is the first few kB of a shard, so ranged requests tell of a 72B (145 GB, 37 shards) what its
local headers would, for a few hundred kB and one request a shard: the index says how many tensors a shard holds, which
is how long its header can be. Config, generation settings and templates are downloaded into the Hub's cache. The
tokenizer (11 MB) is not; `Checkpoint.unread` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import INDEX_NAME, SAFETENSORS, SINGLE_NAME, Checkpoint, join, shard_names
from qwen2tool.checkpoint.geometry import geometry, read_config, read_json
from qwen2tool.checkpoint.header import Header, header_length, parse_header
from qwen2tool.console import format_bytes
from qwen2tool.errors import UserError

SMALL_FILES = (
    "config.json",
    INDEX_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.tiktoken", "LICENSE*")
"""What a checkpoint or an adapter needs, in the Hub's patterns; never code."""
FETCHED_BINS = ("pytorch_model*.bin", "adapter_model.bin")
LARGE_FILES = ("tokenizer.json", "vocab.json")
MAX_SMALL = 20_000_000
"""Bytes of one of `SMALL_FILES`; the index of a 72B has 80 kB."""
ENTRY_BYTES = 110
"""What a tensor takes in a header beside its name, at most: dtype, two sizes, two offsets of 12 digits."""
FIRST_BYTES = 50_000
"""Asked for where no index says how many tensors there are: the header of a 0.5B."""
AT_ONCE = 8
TIMEOUT = 30.0
HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2")
TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
LOG_IN = "`hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class _Repo:
    """`files` maps the names at commit `commit` to their sizes, None where the hub does not say."""

    id: str
    commit: str
    files: Mapping[str, int | None]


def open_remote(repo: str, revision: str | None = None) -> Checkpoint:
    """Opens the safetensors checkpoint `repo` (owner/name) by its headers; none of its tensors can be read.

    Raises:
        UserError: no such repo or revision, no access, no network, no safetensors in it, or damage as in a folder.
    """
    with in_one_sentence(repo, revision):
        there = _list(repo, revision)
        _require_checkpoint(there)
        side = _download_small(there)
        path, config = Path(repo), read_config(side)
        index = read_json(side / INDEX_NAME) if INDEX_NAME in there.files else None
        if index is None:
            names: tuple[str, ...] = (SINGLE_NAME,)
        else:
            names = shard_names(path, SAFETENSORS, index, there.files, "Ask its author to upload it")
        read = _read_headers(there, names, index)
        headers = {name: header for name, (header, _) in read.items()}
        tensors = join(path / INDEX_NAME, index, headers) if index else dict(headers[SINGLE_NAME].tensors)
    others = {name for name in there.files if name.endswith(".safetensors") and "/" not in name} - set(names)
    return Checkpoint(
        path=path,
        config=config,
        geometry=geometry(config),
        tensors=tensors,
        shards=tuple(path / name for name in names),
        leftovers=tuple(path / name for name in sorted(others)),
        index=index,
        commit=there.commit,
        side=side,
        sizes={name: size for name, (_, size) in read.items()},
        unread=_unread(there, side),
    )


def is_remote_adapter(repo: str, revision: str | None = None) -> bool:
    """Whether `repo` holds a PEFT adapter and no whole checkpoint; one request.

    Raises:
        UserError: no such repo or revision, no access, or no network.
    """
    with in_one_sentence(repo, revision):
        return _is_adapter(_list(repo, revision))


def download(repo: str, revision: str | None) -> Path:
    """The folder in the Hub's cache with what a checkpoint or adapter needs, downloaded where it is not there yet.

    Of a repo without safetensors its .bin files are taken, of one without either its only GGUF.

    Raises:
        UserError: it holds no weights, or several GGUFs. The client's own errors: see `in_one_sentence`.
    """
    folder = _fetch(repo, revision, FETCHED)
    if any(folder.glob("*.safetensors")):
        return folder
    folder = _fetch(repo, folder.name, FETCHED_BINS)
    if any(folder.glob("*.bin")) or any(folder.glob("*.gguf")):
        return folder
    files = sorted(n for n in _list(repo, folder.name).files if n.endswith(".gguf") and "/" not in n)
    if len(files) > 1:
        raise UserError(
            f"{repo}: holds {len(files)} .gguf files ({', '.join(files[:3])} ...)",
            f"Download the one that you mean (`hf download {repo} {files[0]}`), and name the file",
        )
    if not files:
        raise UserError(f"{repo}: holds no weights (safetensors, .bin or .gguf)", "Name a repo that holds a model")
    return _fetch(repo, folder.name, files)


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
    return Path(found)


def _list(repo: str, revision: str | None) -> _Repo:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    return _Repo(id=repo, commit=str(info.sha), files=files)


def _is_adapter(repo: _Repo) -> bool:
    return "adapter_config.json" in repo.files and not {SINGLE_NAME, INDEX_NAME} & repo.files.keys()


def _require_checkpoint(repo: _Repo) -> None:
    if _is_adapter(repo):
        raise UserError(f"{repo.id}: a PEFT adapter, not a whole checkpoint", "Name its base model")
    if not {SINGLE_NAME, INDEX_NAME} & repo.files.keys():
        others = sorted({Path(name).suffix for name in repo.files} & {".bin", ".gguf", ".pth", ".safetensors"})
        held = f"it has other {', '.join(others)} files" if others else "nor other weights"
        raise UserError(
            f"{repo.id}: no {SINGLE_NAME} and no index on the Hub, whose headers could be read ({held})",
            f"Download it (`hf download {repo.id}`), and name the folder or file",
        )
    if "config.json" not in repo.files:
        raise UserError(f"{repo.id}: not a checkpoint (no config.json)", "Name a repo that holds a whole model")


def _download_small(repo: _Repo) -> Path:
    """The folder of the Hub's cache that now holds the `SMALL_FILES` of `repo`."""
    from huggingface_hub import hf_hub_download

    names = [name for name in SMALL_FILES if name in repo.files]
    for name in names:
        if (repo.files[name] or 0) > MAX_SMALL:
            raise UserError(
                f"{repo.id}: its {name} has {format_bytes(repo.files[name] or 0)}", "Name a repo that holds a model"
            )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = list(pool.map(lambda name: hf_hub_download(repo.id, name, revision=repo.commit), names))
    return Path(files[names.index("config.json")]).parent


def _unread(repo: _Repo, side: Path) -> dict[str, str]:
    there = [name for name in LARGE_FILES if name in repo.files and not (side / name).is_file()]
    sizes = {name: repo.files[name] for name in there}
    return {
        name: f"to inspect a model on the Hub, its {format_bytes(size) if size else 'contents'} are not downloaded"
        for name, size in sizes.items()
    }


def _read_headers(repo: _Repo, names: Sequence[str], index: Mapping[str, Any] | None) -> dict[str, tuple[Header, int]]:
    """Shard -> its header and its size in bytes."""
    guesses = dict.fromkeys(names, 8 + 500)
    for tensor, name in (index or {"weight_map": {}})["weight_map"].items():
        guesses[name] += len(tensor.encode()) + ENTRY_BYTES
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: _read_header(repo, name, guesses[name] if index else FIRST_BYTES), names)
        return dict(zip(names, found, strict=True))


def _read_header(repo: _Repo, name: str, guess: int) -> tuple[Header, int]:
    """One request where the header is no longer than `guess`, else two."""
    from huggingface_hub import hf_hub_url

    url, file = hf_hub_url(repo.id, name, revision=repo.commit), Path(repo.id) / name
    data, size = _ranged(file, url, 0, guess)
    end = 8 + header_length(file, data[:8], size)
    if end > len(data):
        data += _ranged(file, url, len(data), end)[0]
    return parse_header(file, data[8:end], end, size), size


def _ranged(file: Path, url: str, start: int, end: int) -> tuple[bytes, int]:
    """(bytes from `start` to `end` or the file's end, size of the whole file); stops a server that sends more."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        total = TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or total is None:
            raise UserError(f"{file}: the server sends whole files only", "Download the model, and name its folder")
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= end - start:
                break
    return bytes(data[: end - start]), int(total[1])


@contextmanager
def in_one_sentence(repo: str, revision: str | None) -> Iterator[None]:
    """Turns errors of the Hub, its client and the network into a `UserError`; anything else passes as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = _translate(error, repo, revision)
        if known is None:
            raise
        raise known from None


def _translate(error: Exception, repo: str, revision: str | None) -> UserError | None:
    """The text of the client's errors is left out: it holds signed URLs, and of some the token."""
    from huggingface_hub import constants, errors

    nowhere = f"{repo}: no such folder here, and the Hub"
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{nowhere} has no model of such a name", "Check the path, or name a Hub model as owner/name")
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repo}: is gated, and you have no access", f"Ask for it on the model's page, then {LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{nowhere} shows no such model", f"Check the spelling; for a private model, {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repo}: has no revision {revision!r}", "Name a branch, a tag or a whole commit of it")
    absent = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.OfflineModeIsEnabled) or (absent and constants.HF_HUB_OFFLINE):
        return UserError(
            f"{repo}: HF_HUB_OFFLINE is set, and it is not in the Hub's cache",
            "Unset HF_HUB_OFFLINE, or name a local folder",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        remedy = f"Log in again: {LOG_IN}" if status in (401, 403) else "Try again later, or name a local folder"
        return UserError(f"{repo}: the Hub refuses ({status})", remedy)
    unreachable = type(error).__module__.partition(".")[0] in HTTP_CLIENTS or isinstance(error, ConnectionError)
    if unreachable or absent or isinstance(error, TimeoutError):
        return UserError(
            f"{nowhere} cannot be reached ({type(error).__name__})", "Check the path, the network and HF_ENDPOINT"
        )
    if isinstance(error, OSError):
        return UserError(f"{repo}: cannot be kept in the Hub's cache ({error.strerror})", "Free space, or set HF_HOME")
    return None
