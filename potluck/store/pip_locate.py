"""Run as a script by the interpreter whose pip is asked: `pip_locate.py PACKAGE VERSION` → one line of JSON.

pip has no command that says where a file is without downloading it, so this asks the finder behind `pip download`, with
pip's own indexes, mirrors, credentials, proxies and certificates. These are pip's internals: a pip that has them no
more makes this fail, and the caller then lets pip download.
"""

from __future__ import annotations

import json
import sys


def main(package: str, version: str) -> None:
    """Print {"url", "sha256"}, or null if no index has that version."""
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--only-binary=:all:", "--no-input"])
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options=options, session=session)  # type: ignore[attr-defined]
        best = finder.find_best_candidate(package, SpecifierSet(f"=={version}")).best_candidate
    found = None
    if best is not None:
        sha256 = best.link.hash if best.link.hash_name == "sha256" else None
        found = {"url": best.link.url_without_fragment, "sha256": sha256}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
