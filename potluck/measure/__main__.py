"""`potluck bench`: which of the benches of a head it is.

potluck bench …           prompt × output × chats at once, beside what the plan predicted (potluck.measure.grid)
potluck bench --serve …   load as a service sees it, also on other endpoints (potluck.measure.load)
potluck bench --hops …    what a hop costs in software (potluck.measure.hops)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What stands behind "--" is for the head.
    own = given[: given.index("--")] if "--" in given else given
    for option in ("--serve", "--hops"):
        if option in own:
            given.remove(option)
            return _load_bench(given) if option == "--serve" else _hops_bench(given)
    # Each imports what the others don't need.
    from potluck.measure import grid

    return grid.main(given)


def _load_bench(arguments: list[str]) -> int:
    from potluck.measure import load

    return load.main(arguments)


def _hops_bench(arguments: list[str]) -> int:
    from potluck.measure import hops

    return hops.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
