"""A model that this host's store lacks, and the search for a host of the pool that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.markup import escape

from potluck.pool_hosts import PoolHost, PoolHosts
from potluck.store import StoredModel
from potluck.store.progress import Progress as PullCallback
from potluck.store.sources import check_name, looks_like_path, parse_source
from transport.errors import ModelNotFound, PotluckError
from transport.pool_messages import AskModels, HostModel, HostModels

_ANSWER_WITHIN_S = 5.0
_MAX_MODELS = 1000
_MAX_NAME_CHARACTERS = 256
_MAX_MODEL_BYTES = 1 << 44
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedModel:
    """`text` is what the user typed, `name` what the model is called, `missing` why it is not here. `pull` gets it
    without the pool; None if nobody knows from where."""

    text: str
    name: str
    source: str
    missing: PotluckError
    pull: Callable[[PullCallback], StoredModel] | None = None

    def is_meant(self, model: HostModel) -> bool:
        return model.name in (self.text, self.name) or bool(self.source and model.source == self.source)


def wanted_model(
    text: str, missing: PotluckError, pull: Callable[[PullCallback], StoredModel] | None
) -> WantedModel | None:
    """None for what other hosts can't know by that name: a path, or no name at all. `pull` is kept if the text says
    where from."""
    if looks_like_path(text) or text.startswith("file:"):
        return None
    try:
        source = parse_source(text)
        name, said, known = source.name, source.text, True
    except PotluckError:
        name, said, known = text, "", False
    try:
        check_name(name)
    except ModelNotFound:
        return None
    return WantedModel(text=text, name=name, source=said, missing=missing, pull=pull if known else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lender:
    """A host that has the model, under the name that its own store has for it."""

    host: PoolHost
    model: HostModel


class ModelSearch:
    """Asks hosts as they come, each once; `say` tells the user what each of them has."""

    def __init__(self, wanted: WantedModel, hosts: PoolHosts, say: Callable[[str], object]) -> None:
        self._wanted = wanted
        self._hosts = hosts
        self._say = say
        self._asked: dict[bytes, str] = {}

    def look(self) -> list[Lender]:
        """Those that have it among the hosts that were not asked yet. Waits for their answers, some seconds at most."""
        hosts = [host for host in self._hosts.all() if host.arrive.pieces and host.peer.identity not in self._asked]
        if not hosts:
            return []
        answers = self._hosts.questions.ask([(host, AskModels()) for host in hosts], silence_s=_ANSWER_WITHIN_S)
        found: list[Lender] = []
        for host, answer in zip(hosts, answers, strict=True):
            self._asked[host.peer.identity] = host.name
            if not isinstance(answer, HostModels):
                why = answer.message if isinstance(answer, PotluckError) else "it answered something else"
                self._say(f"[yellow]{host.name} did not say what it has:[/yellow] {shown(why)}")
                continue
            models = checked_models(answer)
            meant = [model for model in models if self._wanted.is_meant(model)]
            if meant:
                found.append(Lender(host=host, model=meant[0]))
            else:
                self._say(f"{host.name} does not have {self._wanted.name} ({_listed(models)})")
        return found

    @property
    def asked(self) -> list[str]:
        return sorted(set(self._asked.values()))

    def absent(self) -> list[str]:
        """Hosts of the pool that are not there."""
        there = {host.name for host in self._hosts.all()}
        return [name for name in self._hosts.members() if name not in there]


def checked_models(answer: HostModels) -> list[HostModel]:
    """Those that a user could be shown, and could name."""
    return [
        model
        for model in answer.models[:_MAX_MODELS]
        if 0 < len(model.name) <= _MAX_NAME_CHARACTERS
        and len(model.source) <= _MAX_NAME_CHARACTERS
        and model.name.isprintable()
        and model.source.isprintable()
        and 0 <= model.num_bytes <= _MAX_MODEL_BYTES
    ]


def shown(text: str) -> str:
    """Words of another host, without what would command a terminal or be taken for markup."""
    return escape("".join(char for char in text if char.isprintable())[:_MAX_NAME_CHARACTERS])


def _listed(models: Sequence[HostModel]) -> str:
    if not models:
        return "it has none"
    names = [shown(model.name) for model in models[:_MAX_LISTED]]
    more = f" and {len(models) - _MAX_LISTED} more" if len(models) > _MAX_LISTED else ""
    return f"it has: {', '.join(names)}{more}"
