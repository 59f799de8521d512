"""What a user installs is whole: the wheel, the command, and what `make demo` installs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("potluck", "shard", "transport", "planner", "devices", "bench")
_METADATA = ("pyproject.toml", "README.md", "LICENSE")


def _run(*command: str | Path, cwd: Path, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Without a network: what is not here can't be had."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "POTLUCK_HOME": str(cwd / "home")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, which leaves nothing in the repository, with the tools that are here."""
    if importlib.util.find_spec("setuptools") is None or int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("there is no setuptools here that can build it")
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _METADATA:
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    _run(sys.executable, *build, cwd=out)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_has_every_module_and_the_page_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.parent == ROOT / "potluck" / "api" / "page"
    }
    assert {name for name in wanted - names if "__pycache__" not in name} == set()
    assert not any(name.startswith("tests/") for name in names)
    without_init = {
        folder
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not ((folder := path.parent) / "__init__.py").exists()
    }
    assert without_init == set(), "setuptools leaves out folders without an __init__.py"


def test_the_command_runs_from_the_wheel_anywhere(wheel: Path, tmp_path: Path) -> None:
    """With the libraries of this environment, but not its Potluck: a path file does not run those in it."""
    fresh = tmp_path / "fresh"
    _run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    (site,) = fresh.glob("lib/python*/site-packages")
    install = ("-m", "pip", "--python", fresh / "bin" / "python", "install", "--quiet", "--no-deps", wheel)
    _run(sys.executable, *install, cwd=tmp_path)
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    (tmp_path / "devices").mkdir()  # A folder of the user's, named like one of ours.
    facts = json.loads(_run(fresh / "bin" / "potluck", "version", "--json", cwd=tmp_path).stdout)
    assert facts["potluck"]
    where = "import potluck.cli.app, devices, json; print(json.dumps([potluck.__file__, devices.__file__]))"
    for file in json.loads(_run(fresh / "bin" / "python", "-P", "-c", where, cwd=tmp_path).stdout):
        assert Path(file).is_relative_to(fresh)
    assert _run(fresh / "bin" / "potluck", "list", "--json", cwd=tmp_path).stdout == "[]\n"
    page = "import importlib.resources as r; print((r.files('potluck.api') / 'page' / 'index.html').read_text()[:15])"
    assert "html" in _run(fresh / "bin" / "python", "-P", "-c", page, cwd=tmp_path).stdout.lower()


def test_every_package_that_make_installs_is_pinned() -> None:
    """What `make demo` gets is what was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["mlx"], *extras["dev"]]
    pinned = {
        _name(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    # pip is the environment's own.
    assert {_name(requirement) for requirement in wanted} - pinned - {"pip"} == set()


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_demo_installs_this_folder_with_the_pins(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    said = _run("make", "--dry-run", "demo", cwd=tmp_path).stdout
    assert "-m venv .venv" in said
    assert "pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlx,dev]'" in said
    assert ".venv/bin/potluck demo" in said
