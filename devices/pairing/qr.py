"""QR codes for terminals."""

from __future__ import annotations

import segno

_QUIET_MODULES = 2
_HALVES = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): " "}


def qr_lines(text: str) -> list[str]:
    """The text as a QR code (ISO/IEC 18004, error correction L), two modules a character, with a margin.

    Light modules are full blocks, for a terminal of light on dark; cameras read the inverse too.
    """
    code = segno.make(text, error="l", micro=False, boost_error=False)
    rows = [[not dark for dark in row] for row in code.matrix_iter(border=_QUIET_MODULES)]
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))
    return ["".join(_HALVES[pair] for pair in zip(*rows[at : at + 2], strict=True)) for at in range(0, len(rows), 2)]
