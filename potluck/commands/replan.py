"""`potluck replan`: load the ring by the better plan that `potluck status` speaks of."""

from __future__ import annotations

import json

import msgspec
import typer

from potluck.ask import call
from potluck.commands.status import better_line
from potluck.head_file import running_head
from potluck.options import JsonOption
from potluck.status import BetterPlanReport
from potluck.terminal import data, tell


class ReplanAnswer(msgspec.Struct, frozen=True):
    better_plan: BetterPlanReport | None


def register(app: typer.Typer) -> None:
    app.command("replan")(replan)


def replan(json_output: JsonOption = False) -> None:
    """Apply the better plan, if there is one, as soon as nobody waits for an answer."""
    head = running_head()
    answer = call(head, "POST", "/potluck/replan", ReplanAnswer)
    if json_output:
        data.file.write(json.dumps(msgspec.to_builtins(answer)) + "\n")
    elif answer.better_plan is None:
        data.print("The ring runs by the best plan known.")
    else:
        tell(data, better_line(answer.better_plan))
        tell(data, "It is loaded as soon as nobody waits for an answer; see: potluck status")
