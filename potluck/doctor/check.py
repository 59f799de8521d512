"""What was looked at, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from transport.errors import PotluckError

State = Literal["ok", "warning", "problem"]
_BY_WEIGHT: tuple[State, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`what` was found out about `name`; `hint` says what to do next, if there is something to do."""

    name: str
    state: State
    what: str
    hint: str = ""


def worst(checks: Iterable[Check]) -> State:
    return max((check.state for check in checks), key=_BY_WEIGHT.index, default="ok")


def failed(name: str, error: PotluckError, *, state: State = "problem") -> Check:
    return Check(name=name, state=state, what=error.message, hint=error.hint)
