"""A system's commands answer as they are told to, and remember what they were asked."""

from __future__ import annotations

from collections.abc import Sequence

from potluck.cli.service.manager import CommandResult, ServiceJob

NASTY = (
    'two words "quoted"',
    "100% %h %%",
    "$HOME ${HOME} $$",
    "back\\slash \\n\\",
    "semi;colon & pipe | <tag>",
    "é ')x",
)

JOB = ServiceJob(
    command=("/opt/a venv/bin/python", "-P", "-m", "potluck", "up", *NASTY),
    environment={"POTLUCK_HOME": '/data/my models %h $HOME "x" \\'},
    retries_forever=False,
    description="serves a model",
)


class Scripted:
    """`answers`: by the words of a command that they begin with; everything else goes well and says nothing."""

    def __init__(self, answers: dict[str, CommandResult] | None = None) -> None:
        self.asked: list[str] = []
        self._answers = answers or {}

    def __call__(self, command: Sequence[str]) -> CommandResult:
        words = " ".join(command)
        self.asked.append(words)
        for start, answer in self._answers.items():
            if words.startswith(start):
                return answer
        return CommandResult(exit_code=0, output="")
