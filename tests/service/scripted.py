"""A system's commands that answer as they are told to, and remember what they were asked."""

from __future__ import annotations

from collections.abc import Sequence

from potluck.service.job import Job
from potluck.service.state import Ran

NASTY = (
    'two words "quoted"',
    "100% %h %%",
    "$HOME ${HOME} $$",
    "back\\slash \\n\\",
    "semi;colon & pipe | <tag>",
    "é ')x",
)

JOB = Job(
    command=("/opt/a venv/bin/python", "-P", "-m", "potluck.cli", "up", *NASTY),
    environment={"POTLUCK_HOME": '/data/my models %h $HOME "x" \\'},
    keeps_trying=False,
    what="serves a model",
)


class Scripted:
    """`answers`: by the words of a command that they begin with; everything else goes well and says nothing."""

    def __init__(self, answers: dict[str, Ran] | None = None) -> None:
        self.asked: list[str] = []
        self._answers = answers or {}

    def __call__(self, command: Sequence[str]) -> Ran:
        words = " ".join(command)
        self.asked.append(words)
        for start, answer in self._answers.items():
            if words.startswith(start):
                return answer
        return Ran(code=0, output="")
