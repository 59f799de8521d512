"""The invitation shows a user how other hosts join: invite, QR code and short code."""

from __future__ import annotations

import os
import stat

import segno
from rich.console import Console
from rich.markup import escape

from devices.pairing.credentials import Code, Invite
from transport.timeouts import CODE_LIFETIME_S, INVITE_LIFETIME_S

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


def show_invitation(
    console: Console,
    invite: Invite | str,
    code: Code | str,
    *,
    code_expires_s: float = CODE_LIFETIME_S,
    invite_expires_s: float = INVITE_LIFETIME_S,
) -> None:
    """The invite, its QR code if the console is a terminal wide enough for it, and the code."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if console.is_terminal:
        lines = qr_lines(str(invite))
        if len(lines[0]) <= console.width:
            for row in lines:
                # Light on dark, whatever the terminal's own colours are.
                console.print(f"[white on black]{row}[/white on black]", highlight=False, no_wrap=True)
    line("To add a device, type on it:")
    line(f"  [bold]potluck join {escape(str(code))}[/bold]  [dim](once, within {_duration(code_expires_s)})[/dim]")
    line(f"If it does not find this host, paste there instead, within {_duration(invite_expires_s)}:")
    line(f"  [bold]potluck join '{escape(str(invite))}'[/bold]")


def show_first_invitation(console: Console, invite: Invite, code: Code) -> None:
    """As a head that starts shows it; but not into a log, as a service's is, where it would lie for others to read."""
    if _is_logged(console):
        console.print("To add a device: potluck invite", highlight=False, soft_wrap=True)
    else:
        show_invitation(console, invite, code)


def _is_logged(console: Console) -> bool:
    """Whether it writes to a file, or to the system's journal, which is a socket."""
    try:
        mode = os.fstat(console.file.fileno()).st_mode
    except (OSError, ValueError):  # None of the system's.
        return False
    return stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        hours = round(seconds / 3600)
        return f"{hours} hour{'s' if hours != 1 else ''}"
    return f"{round(seconds / 60)} minutes" if seconds >= 120 else f"{round(seconds)} s"
