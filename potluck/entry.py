"""Entry point of the console script. A Ctrl-C while libraries are still being imported ends it as one later does."""

import sys


def main() -> None:
    """Runs `potluck.cli.main`; 130 when interrupted."""
    try:
        from potluck.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
