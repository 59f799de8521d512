"""What a hub's safetensors model is, told by config.json and the files' headers before any weights come."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from shard.mlx_backend.families import FAMILIES
from shard.model_facts import check_supported, read_config
from shard.safetensors_checkpoint import SafetensorsCheckpoint
from shard.safetensors_files import weight_files
from shard.safetensors_header import LENGTH_BYTES, header_bytes
from shard.spec import ModelSpec
from shard.torch_backend.architectures import SUPPORTED
from transport.errors import BadCheckpoint, UnsupportedModel

# Most headers are smaller: one request a file.
FIRST_BYTES = 1 << 16
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

ReadStart = Callable[[int], bytes]


class RemoteModel:
    """A folder that holds config.json, the index of the weights and files' beginnings. It stays for a pull that goes on
    later, and goes with `downloads` once the model is here."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder = folder
        self._repository = repository
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: Path) -> None:
        """One of the small files that say what the model is."""
        shutil.copyfile(path, self.folder / path.name)

    def check_config(self) -> None:
        """Raises UnsupportedModel for a model that no backend runs, as far as config.json tells; BadCheckpoint."""
        with self._named():
            family = check_supported(read_config(self.folder))
        if family not in SUPPORTED and family not in FAMILIES:
            known = sorted({*SUPPORTED, *FAMILIES})
            raise UnsupportedModel(
                f"{self._repository} has the architecture {family}, which no backend here runs",
                hint=f"supported: {', '.join(known)}",
            )

    def choose(self, names: Sequence[str]) -> list[str]:
        """Of a repository's files, those that hold the model's weights. Raises BadCheckpoint or UnsupportedModel."""
        listed = {name for name in names if "/" not in name}
        kept = [path for path in self.folder.iterdir() if path.suffix == ".safetensors" and path.name not in listed]
        for path in kept:
            path.unlink()
        for name in listed:
            if name.endswith((".safetensors", ".bin", ".pth")):
                (self.folder / name).touch()
        with self._named():
            return [path.name for path in weight_files(self.folder)]

    def start(self, name: str) -> bytes:
        """What is here of a file's beginning."""
        return (self.folder / name).read_bytes()

    def forget(self, name: str) -> None:
        """What is here of a file's beginning is not to be trusted."""
        (self.folder / name).unlink()

    def read_header(self, name: str, num_bytes: int, read: ReadStart) -> bytes:
        """The beginning of a file of `num_bytes`, its header and maybe more; `read` gives its first so many bytes.
        Raises BadCheckpoint where the header can't be one, and what `read` raises."""
        path = self.folder / name
        start = path.read_bytes()
        if len(start) < min(FIRST_BYTES, num_bytes):
            start = read(min(FIRST_BYTES, num_bytes))
        with self._named():
            needed = header_bytes(path, start[:LENGTH_BYTES], num_bytes)
        if len(start) < needed:
            start = read(needed)
        new = path.with_suffix(".new")
        new.write_bytes(start)
        new.replace(path)
        return start

    def check(self, sizes: dict[str, int]) -> ModelSpec:
        """The whole model, by all headers: as it will be checked when it is here. Raises BadCheckpoint,
        UnsupportedModel."""
        with self._named():
            checkpoint = SafetensorsCheckpoint(self.folder, sizes)
            try:
                return checkpoint.spec
            finally:
                checkpoint.close()

    def _named(self) -> _Named:
        return _Named(self.folder, self._repository)


class _Named:
    """Errors name the repository instead of the folder here, and say that nothing was downloaded."""

    def __init__(self, folder: Path, repository: str) -> None:
        self._folder = folder
        self._repository = repository

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadCheckpoint):
            raise BadCheckpoint(
                self._renamed(error.message), hint=f"its weights were not downloaded; {self._advice(error.hint)}"
            ) from error
        if isinstance(error, UnsupportedModel):
            raise UnsupportedModel(self._renamed(error.message), hint=error.hint) from error

    def _renamed(self, message: str) -> str:
        renamed = message.replace(f"{self._folder}/", f"{self._repository}: ").replace(
            str(self._folder), self._repository
        )
        return renamed if self._repository in renamed else f"{self._repository}: {renamed}"

    @staticmethod
    def _advice(hint: str) -> str:
        """Pulling again would not help."""
        return "take another repository or revision of the model" if "again" in hint else hint
