"""What a lab leaves on the machine while it is up: a folder with its facts, by which others find it and clean up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from bench.lab.groups import labs_with_groups
from bench.lab.network import NAMESPACES, labs_with_network
from bench.lab.spec import LabError

PREFIX = "plab"
STATE_DIR = Path("/run/potluck-lab")
_FILE = "lab.json"
_SAME_START_S = 2.0
# The shell's own process becomes the command: its id is in the groups first, then it enters the namespace. Not by
# `ip netns exec`, which hides /sys/fs/cgroup and with it the host's limits.
_LAUNCH = 'for group in $LAB_GROUPS; do echo $$ > "$group/cgroup.procs" || exit 125; done; unset LAB_GROUPS; exec "$@"'


class LabHostFacts(Struct, frozen=True, kw_only=True):
    """One host: processes in `groups` have its limits, those in `free_groups` only its network; `has_models`: those of
    the lab's store."""

    address: str
    namespace: str
    groups: list[str]
    free_groups: list[str]
    has_models: bool = True


class LabFacts(Struct, frozen=True, kw_only=True):
    """`pid` and `start_s` are of the process that the lab belongs to; `store` is the POTLUCK_HOME with the models."""

    id: str
    pid: int
    start_s: float
    store: str
    hosts: dict[str, LabHostFacts]

    @property
    def folder(self) -> Path:
        return STATE_DIR / self.id

    @property
    def file(self) -> Path:
        return self.folder / _FILE


def save_facts(facts: LabFacts) -> None:
    """The folder appears with its file in it."""
    draft = STATE_DIR / f".{facts.id}"
    draft.mkdir(mode=0o700, parents=True, exist_ok=True)
    (draft / _FILE).write_bytes(msgspec.json.encode(facts))
    if facts.folder.exists():
        (draft / _FILE).replace(facts.file)
        draft.rmdir()
    else:
        draft.rename(facts.folder)
    for name in facts.hosts:
        _make_home(facts, name)


def remove_facts(lab: str) -> None:
    for folder in (STATE_DIR / lab, STATE_DIR / f".{lab}"):
        shutil.rmtree(folder, ignore_errors=True)


def read_facts(file: Path) -> LabFacts:
    """Raises LabError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=LabFacts)
    except (OSError, msgspec.DecodeError) as error:
        raise LabError(f"no lab is up at {file}: {error}", hint="start one: python -m bench.lab up FILE") from error


def running_lab() -> LabFacts:
    """That of POTLUCK_LAB, or the only one. Raises LabError."""
    if named := os.environ.get("POTLUCK_LAB"):
        return read_facts(Path(named))
    found = [facts for facts in _all() if is_alive(facts)]
    if len(found) != 1:
        raise LabError(
            f"{len(found)} labs are up",
            hint="start one: python -m bench.lab up FILE" if not found else "say which: POTLUCK_LAB=…/lab.json",
        )
    return found[0]


def leftovers() -> list[str]:
    """Ids of labs whose process is gone, however little there is left of them."""
    alive = {facts.id for facts in _all() if is_alive(facts)}
    folders = {folder.name.removeprefix(".") for folder in STATE_DIR.glob(f"*{PREFIX}*")}
    return sorted((folders | labs_with_groups(PREFIX) | labs_with_network(PREFIX)) - alive)


def is_alive(facts: LabFacts) -> bool:
    # A step of the wall clock moves both times by different fractions.
    return abs(owner_start_s(facts.pid) - facts.start_s) < _SAME_START_S


def owner_start_s(pid: int) -> float:
    """When a process started; 0 if there is none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def launch_command(
    facts: LabFacts,
    host: str,
    command: Sequence[str],
    *,
    limited: bool = True,
    groups: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """What starts `command` in a host, and its environment. `groups` are others than the host's own."""
    found = facts.hosts.get(host)
    if found is None:
        raise LabError(f"the lab has no host {host!r}", hint=f"its hosts are: {', '.join(facts.hosts)}")
    chosen = groups if groups is not None else found.groups if limited else found.free_groups
    home = facts.folder / host
    enter = ["nsenter", f"--net={NAMESPACES / found.namespace}", "--", *command]
    environment = {
        **os.environ,
        "LAB_GROUPS": " ".join(chosen),
        "POTLUCK_LAB": str(facts.file),
        "POTLUCK_LAB_HOST": host,
        "POTLUCK_HOME": str(home / "home"),
        "POTLUCK_RUNTIME": str(home / "run"),
        "POTLUCK_CONFIG": str(home / "config.toml"),
    }
    return ["sh", "-c", _LAUNCH, "sh", *enter], environment


def _all() -> list[LabFacts]:
    found = []
    for file in STATE_DIR.glob(f"{PREFIX}*/{_FILE}"):
        try:
            found.append(read_facts(file))
        except LabError:
            continue  # being removed, or broken: then it is a leftover
    return found


def _make_home(facts: LabFacts, host: str) -> None:
    home = facts.folder / host / "home"
    home.mkdir(parents=True, exist_ok=True)
    models = home / "models"
    if not facts.hosts[host].has_models:
        models.mkdir(exist_ok=True)
    elif not models.is_symlink():
        (Path(facts.store) / "models").mkdir(parents=True, exist_ok=True)
        models.symlink_to(Path(facts.store) / "models")
