"""What Potluck writes, by place and name: nothing that these rules do not know is ever removed.

POTLUCK_HOME may be a folder that other things lie in as well, with names as common as "models" and "logs".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from potluck.store.manifest import MANIFEST_FILE

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Files in `folder`, a glob below the root, whose whole name fits `files`; and folders there that `is_own_folder`
    knows."""

    kind: str
    folder: str = "."
    files: str | None = None
    is_own_folder: Callable[[Path], bool] | None = None

    def matches(self, path: Path, *, is_folder: bool) -> bool:
        if is_folder:
            return self.is_own_folder is not None and self.is_own_folder(path)
        return self.files is not None and re.fullmatch(self.files, path.name) is not None


def _is_model(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file() or folder.name.startswith((".building-", ".removing-"))


def _is_download(folder: Path) -> bool:
    """Parts of a wheel; of a revision of the hub's; of what pip brings."""
    return all(
        path.name == "package.whl.partial" or _COMMIT.fullmatch(path.name) or path.name.startswith("tmp")
        for path in folder.iterdir()
    )


def _is_shared(folder: Path) -> bool:
    """What a model in pieces is opened from, whole or being made."""
    return re.fullmatch(r"[0-9a-f]{64}|\.[0-9a-f]{16}-[0-9a-f]{8}", folder.name) is not None


def _is_run(folder: Path) -> bool:
    return folder.name.startswith("run-")


MODELS, DOWNLOADS, PIECES, HUB_PARTS = "models", "downloads", "pieces", "hub-parts"
CONFIG, SERVICE, RUNTIME = "config", "service", "runtime"

TITLES = {
    MODELS: "models that were pulled",
    DOWNLOADS: "pulls that were cut off",
    HUB_PARTS: "pulls into the hub's cache that were cut off",
    PIECES: "pieces of models, from other hosts",
    "profiles": "measured times",
    "logs": "logs",
    "locks": "locks",
    "identity": "this host's keys",
    "pairing": "who is paired with whom",
    "api-key": "the endpoint's API key",
    CONFIG: "settings",
    SERVICE: "the service",
    RUNTIME: "sockets, and which head runs",
}

HOME_RULES = (
    Rule(kind=MODELS, folder="models", is_own_folder=_is_model),
    Rule(kind=DOWNLOADS, folder="downloads", is_own_folder=_is_download),
    Rule(kind=PIECES, folder="pieces/[0-9a-f][0-9a-f]", files=r"[0-9a-f]{64}\.(piece|part|lock)"),
    Rule(kind=PIECES, folder="pieces/leases", files=r"[^/]+\.(json|lock)"),
    Rule(kind=PIECES, folder="pieces", files=r"store\.lock|limit\.json.*"),
    Rule(kind=PIECES, folder="shared", is_own_folder=_is_shared),
    Rule(kind=PIECES, folder="shared/borrowed", files=r"[0-9a-f]{32}\.json.*"),
    Rule(kind=PIECES, folder="shared/offers", files=r"\.?[0-9a-f]{16,64}[^/]*"),
    Rule(kind="profiles", folder="profiles", files=r"(device|busy|link)-[0-9a-f]{24}\.json.*"),
    Rule(kind="profiles", files=r"probe\.json.*"),
    Rule(kind="logs", folder="logs", files=r"[^/]+\.log"),
    Rule(kind="locks", folder="locks", files=r"[^/]+\.lock"),
    Rule(kind="identity", folder="identity", files=r"keys\.(json|lock|\d+)"),
    Rule(kind="pairing", files=r"(roster|pools)\.(json|lock|\d+)"),
    Rule(kind="api-key", files=r"api-key(\.[0-9a-f]+)?"),
)

HUB_PARTS_GLOB = "models--*/blobs/*.potluck*.incomplete"
"""In the cache of the hub, which other programs use too: these have Potluck's name."""

RUNTIME_RULES = (
    Rule(kind=RUNTIME, files=r"head\.(json|lock|\d+)"),
    Rule(kind=RUNTIME, is_own_folder=_is_run),
)
