"""Entry point of the console script. A Ctrl-C while libraries are still being imported ends it as one later does."""

import signal
import sys


def main() -> None:
    """Runs `potluck.cli.app.main`; 130 when interrupted."""
    try:
        from potluck.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # It has said how it ended: what the interpreter still puts away is not interrupted.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
