"""`python -m tests.support.fuzz.run TARGET SECONDS [FOLDER]`: look for bytes that break a target, led by coverage.

Needs atheris. FOLDER keeps the inputs that reached something new, for the next run, and one that broke it (crash-…).
Exit code 0: nothing was found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["shard", "transport", "potluck"]):
    from tests.support.fuzz.targets import TARGETS

_MEMORY_MB = 1024


def main(name: str, seconds: str, folder: str | None = None) -> None:
    target = TARGETS[name]
    kept = Path(folder or tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (kept / f"seed-{number}").write_bytes(seed)
    options = (
        f"-max_total_time={seconds}",
        "-max_len=8192",
        "-keep_seed=1",  # Decoders in C tell no coverage: what is right must stay to be changed.
        "-timeout=10",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-artifact_prefix={kept}/",
        "-print_final_stats=1",
        "-verbosity=1",
    )
    atheris.Setup([sys.argv[0], *options, str(kept)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
