"""A repository of a Hugging Face hub, downloaded by its own client into its own cache and used there.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count, as everywhere. The client resumes and locks by itself.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.progress import Progress, PullProgress
from potluck.store.sources import HubSource
from transport.errors import DownloadFailed, ModelNotFound, PotluckError, UnsupportedModel

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Copies of the weights in other forms, which some repositories keep beside the ones that are read.
_IGNORED = ["*/*", "consolidated*"]


def fetch_snapshot(source: HubSource, progress: Progress) -> Path:
    """The folder of the repository's files, or the path of its one .gguf. Raises PotluckError."""
    # Its import takes half a second, which `potluck list` should not pay.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # The base of all that its client raises.

    wanted: dict[str, Any] = {
        "repo_id": source.repository,
        "revision": source.revision,
        "allow_patterns": _PATTERNS if source.file is None else [source.file],
        "ignore_patterns": _IGNORED if source.file is None else None,
    }
    progress(PullProgress(stage="download", done=0, total=None))
    cache = Path(constants.HF_HUB_CACHE)
    try:
        if constants.HF_HUB_OFFLINE:
            total = None
        else:
            total = _space_checked(snapshot_download(**wanted, dry_run=True, tqdm_class=_bar(None)), cache, source)
        with translated_write_errors(cache, source.text):
            folder = Path(snapshot_download(**wanted, tqdm_class=_bar(_Counter(progress, total))))
    except (HTTPError, OSError) as error:
        raise _translated(source, error, cache) from error
    return _checked(source, folder)


def delete_snapshot(path: Path) -> None:
    """Free what `fetch_snapshot` downloaded to `path`, unless another revision uses the same files."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return
    revision = parts[parts.index("snapshots") + 1]
    try:
        scan_cache_dir().delete_revisions(revision).execute()
    except CacheNotFound:
        return


def _translated(source: HubSource, error: Exception, cache: Path) -> PotluckError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause = error.__cause__ or error  # The client wraps what the hub said in what it could not do about it.
    if isinstance(cause, GatedRepoError):
        return DownloadFailed(
            f"{source.repository} is gated", hint="accept its terms on the hub, and set HF_TOKEN or run hf auth login"
        )
    if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
        return ModelNotFound(
            f"the hub has no {source.text.removeprefix('hf:')}", hint="check the name; a private one needs HF_TOKEN"
        )
    return DownloadFailed(
        f"{source.text} can't be had from the hub, nor from its cache in {cache}: {cause}",
        hint="HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "check the network and HF_ENDPOINT",
    )


def _checked(source: HubSource, folder: Path) -> Path:
    if source.file is not None:
        path = folder / source.file
        if not path.is_file():
            raise ModelNotFound(f"{source.repository} has no file {source.file}", hint="look at its list of files")
        return path
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{source.repository} has no safetensors weights",
            hint=f"if it has a GGUF, name it: hf:{source.repository}/FILE.gguf",
        )
    return folder


def _space_checked(files: list[Any], cache: Path, source: HubSource) -> int:
    """Bytes that are yet to come."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    require_space(cache, missing, source.text)
    return missing


class _Counter:
    """Adds up the bytes that the client's threads report."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: float | None) -> None:
        with self._lock:
            self._done += int(count or 0)
            self._progress(PullProgress(stage="download", done=self._done, total=self._total))


def _bar(counter: _Counter | None) -> type[Any]:
    """A progress bar for the hub's client that draws nothing and tells `counter` the bytes written."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = counter is not None and "econstruct" in str(options.get("desc"))
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and counter is not None:
                counter.add(n)
            return None

    return Bar
