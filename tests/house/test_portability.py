"""What would break on another system when it is imported, and calls that only some systems have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.simulated.sitecustomize import NOT_YET
from tests.support.simulated_system import SYSTEMS, environment_of

ROOT = Path(__file__).parents[2]
assert (ROOT / "pyproject.toml").exists(), "the packages are looked for in a wrong folder"
PACKAGES = ("transport", "devices", "planner", "shard", "potluck")

POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
"""Not on Windows: to be imported inside a function or a condition that knows."""

SOME_SYSTEMS_HAVE = {
    "os.fork",
    "os.getgid",
    "os.geteuid",
    "os.getuid",
    "os.killpg",
    "os.setsid",
    "os.preadv",
    "os.pread",
    "os.pwrite",
    "os.posix_fadvise",
    "os.posix_fallocate",
    "os.sched_getaffinity",
    "os.sched_param",
    "os.sched_setaffinity",
    "os.sched_setscheduler",
    "os.statvfs",
    "os.sysconf",
    "os.fchmod",
    "os.fchown",
    "os.eventfd",
    "os.memfd_create",
    "os.O_CLOEXEC",
    "os.O_NOFOLLOW",
    "os.O_DIRECTORY",
    "os.O_BINARY",
    "signal.SIGHUP",
    "signal.SIGKILL",
    "signal.SIGUSR1",
    "signal.SIGUSR2",
    "signal.SIGSTOP",
    "signal.SIGCONT",
    "signal.SIGBREAK",
    "signal.CTRL_BREAK_EVENT",
    "signal.pthread_sigmask",
    "signal.setitimer",
    "socket.AF_UNIX",
    "socket.SO_REUSEPORT",
    "socket.SO_EXCLUSIVEADDRUSE",
    "socket.TCP_KEEPIDLE",
    "socket.TCP_USER_TIMEOUT",
    "mmap.MAP_PRIVATE",
    "mmap.MAP_ANONYMOUS",
    "mmap.MADV_DONTNEED",
    "mmap.MADV_FREE",
    "mmap.MADV_NOHUGEPAGE",
}

ALLOWED = {
    "devices/hardware/selection.py": {"os.sched_getaffinity"},  # hasattr
    "devices/pairing/identity.py": {"os.getuid"},  # os.name
    "potluck/cli/doctor/probe.py": {"socket.SO_REUSEPORT"},  # hasattr
    "potluck/engine/template_process.py": {"signal.setitimer"},  # hasattr
    "potluck/system/paths.py": {"os.getuid"},  # sys.platform
    "potluck/cli/service/launchd.py": {"os.getuid"},  # used on macOS only
    "shard/worker/machine.py": {"os.sched_getaffinity"},  # hasattr
    "shard/formats/weight_folder.py": {"os.preadv"},  # sys.platform
    "shard/pieces/open.py": {"os.preadv"},  # sys.platform
    "transport/process/files.py": {"os.pread"},  # hasattr
    "transport/process/child.py": {"os.sched_setscheduler", "os.sched_param"},  # sys.platform
    # The table of systems that it knows.
    "shard/torch_backend/memory.py": {
        "mmap.MAP_PRIVATE",
        "mmap.MAP_ANONYMOUS",
        "mmap.MADV_DONTNEED",
        "mmap.MADV_FREE",
        "mmap.MADV_NOHUGEPAGE",
    },
    "potluck/head/endpoint.py": {"socket.SO_EXCLUSIVEADDRUSE"},
}
"""Where such a name is used behind a question whether the system has it."""

IN_THE_SYSTEMS_ENCODING = {
    "devices/hardware/interfaces.py": "what a tool of the system says",
    "potluck/store/pypi.py": "what pip says",
    "potluck/store/hub_repository.py": "a commit, which is digits",
}

_IMPORTS = """
import importlib, json, pkgutil
failed = {}
for package in PACKAGES:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith(("__main__", "pip_locate")):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                failed[module.name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported_when_loaded(node: ast.AST) -> Iterator[str]:
    """Modules that are imported whenever the module is; not those of a function, or of a condition at the top."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)):
                yield module
            case ast.ClassDef() | ast.With():
                yield from imported_when_loaded(child)


def names_used(tree: ast.Module) -> set[str]:
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def test_no_module_needs_a_posix_module_to_be_imported() -> None:
    found = {
        path: needed
        for path, tree in _sources()
        if (
            needed := POSIX_MODULES.intersection(imported_when_loaded(tree))
            - {NOT_YET.get(path.removesuffix(".py").replace("/", "."))}
        )
    }
    assert found == {}, "import it inside the function that asks for the system"


def test_what_only_some_systems_have_is_used_only_where_the_table_says() -> None:
    found = {
        path: extra
        for path, tree in _sources()
        if (extra := names_used(tree) & SOME_SYSTEMS_HAVE - ALLOWED.get(path, set()))
    }
    assert found == {}, "ask whether the system has it, and add it to ALLOWED"


def test_text_files_are_utf_8_whatever_the_system_is() -> None:
    """Windows takes a code page of its own if nothing is said."""
    found = [where for where in _text_without_encoding() if where.partition(":")[0] not in IN_THE_SYSTEMS_ENCODING]
    assert found == []


def _text_without_encoding() -> Iterator[str]:
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and _is_of_text(node):
                yield f"{path}:{node.lineno}"


def _is_of_text(call: ast.Call) -> bool:
    """A call that opens, reads or writes a text file by name and does not say how it is encoded. What the kernel shows
    as a file (/proc, /sys) is ASCII, and its readers are left alone."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id  # type: ignore[attr-defined]
    if "encoding" in keywords:
        return False
    if name == "write_text":
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    return name == "NamedTemporaryFile" and "mode" in keywords and "b" not in ast.unparse(keywords["mode"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_can_be_imported_as_if_on(system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"PACKAGES = {PACKAGES}\n{_IMPORTS}"],
        env=environment_of(system),
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
