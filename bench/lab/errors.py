"""What can go wrong with a lab."""

from __future__ import annotations

from transport.errors import PotluckError


class LabError(PotluckError):
    """A lab that can't be as it was described, or a machine that can't have one."""

    code = "lab"
