"""A head asks the hosts of its pool for a model that it lacks, and takes nobody's word for anything. Real sockets; the
hosts are this process, with keys of their own."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from potluck.head.models import source
from potluck.head.models.search import ModelRequest
from potluck.head.models.source import RemoteModel
from potluck.head.ring import RingStage
from potluck.host.piece_cache import read_remote_record
from potluck.system.paths import shared_dir
from shard.pieces.metadata import SharedFolders, share_model
from shard.pieces.piece_list import list_digest
from tests.support.doctor.small_head import SmallHead
from tests.support.head.pool_members import Answer, FakeHost
from tests.support.shard.tiny import save_tiny
from tests.support.transport.introductions import wait_until
from transport.errors import DeadlineExceeded, ErrorInfo, ModelNotFound
from transport.messages.control import ControlMessage
from transport.messages.pool import (
    HostFault,
    HostModel,
    HostModels,
    ListHostModels,
    ModelOffered,
    OfferModel,
    OfferProgress,
)
from transport.pieces import client
from transport.pieces.piece_source import Located
from transport.security.curve import new_key_pair

HEAD, BETA, GAMMA = "127.0.0.1", "127.0.0.2", "127.0.0.3"
MISSING = ModelNotFound("there is no model 'tiny'; none is here yet", hint="potluck pull smollm2")


class Pool:
    """A head whose user wants the model "tiny"; `said` is what it was told."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.stack = stack
        self.said: list[str] = []
        self.head = SmallHead(home, HEAD)
        stack.callback(self.head.close)
        run_dir = home / "run"
        run_dir.mkdir()
        wanted = ModelRequest(text="tiny", name="tiny", source="", missing=MISSING)
        self.model = RemoteModel(
            wanted, self.head.here, self.head.piece_server, self.head.pool, run_dir, say=self.said.append
        )


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "head"))
    monkeypatch.setattr(source, "FALLBACK_AFTER_S", 2.0)
    monkeypatch.setattr(source, "MODEL_SILENT_S", 3.0)
    monkeypatch.setattr(source, "MODEL_STALLED_S", 2.0)
    monkeypatch.setitem(client.fetch_small.__kwdefaults__, "patience_s", 3.0)
    (tmp_path / "head").mkdir()
    with ExitStack() as stack:
        yield Pool(tmp_path / "head", stack)


@pytest.fixture
def tiny(tmp_path: Path) -> SharedFolders:
    folder = save_tiny("llama", 0, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return share_model(folder, "tiny", tmp_path / "lent")


def has(model: SharedFolders) -> Answer:
    def answer(question: Any) -> list[ControlMessage]:
        if isinstance(question, ListHostModels):
            return [HostModels(question.token, (HostModel("other", "", 5), HostModel("tiny", "", 1000)))]
        return [OfferProgress(question.token, 1, 2), ModelOffered(question.token, model.digest, 1000)]

    return answer


def lacks(question: Any) -> list[ControlMessage]:
    hostile = (HostModel("\x1b[2J", "", 5), HostModel("tiny", "", 1 << 50), HostModel("tiny", "x" * 257, 5))
    return [HostModels(question.token, (HostModel("other[red]", "", 5), *hostile))]


def written(home: Path) -> set[str]:
    """Which folders something was put into."""
    return {path.name for path in home.iterdir()}


def test_the_first_host_that_has_it_lends_it(pool: Pool, tiny: SharedFolders, tmp_path: Path) -> None:
    beta = FakeHost(pool.head, pool.stack, "beta", BETA, lacks)
    gamma = FakeHost(pool.head, pool.stack, "gamma", GAMMA, has(tiny))
    gamma.piece_server.share_model(tiny)
    assert pool.model.find()
    model = pool.model.prepare(pool.said.append, for_others=False)
    assert (model.name, model.spec.num_layers, model.path) == ("tiny", 4, shared_dir() / tiny.digest)
    assert (model.path / "tokenizer.json").read_text() == '{"version": "1.0"}'
    worker: Any = None
    shared = pool.model.share_for_worker(worker)
    assert shared is not None and shared.digest == tiny.digest
    assert [peer.name for peer in shared.peers] == ["beta", "alpha", "gamma"]
    assert not any("\x1b" in line for line in pool.said)
    wanted = r"beta does not have tiny (it has: other\[red])"
    assert wanted in pool.said, pool.said
    # Nothing but what opens it came: no tensor did.
    tensors = {piece.digest for file in tiny.pieces.files for piece in file.pieces if piece.tensor}
    kept = {path.stem for path in (tmp_path / "head" / "pieces").rglob("*.piece")}
    assert kept and not kept & tensors
    assert written(tmp_path / "head") == {"identity", "run", "roster.json", "roster.lock", "pieces", "shared"}

    record = read_remote_record("tiny")
    assert record is not None and (record.digest, record.peer, record.key) == (
        tiny.digest,
        "gamma",
        gamma.keys.public,
    )
    assert beta.requests and not any(isinstance(question, OfferModel) for question in beta.requests)


def test_stages_on_every_host_get_it_each_what_it_lacks(pool: Pool, tiny: SharedFolders) -> None:
    gamma = FakeHost(pool.head, pool.stack, "gamma", GAMMA, has(tiny))
    gamma.piece_server.share_model(tiny)
    assert pool.model.find()

    def stage(index: int, first: int, last: int, key: str) -> RingStage:
        worker: Any = type("Worker", (), {"peer": type("Peer", (), {"key": key})()})()
        return RingStage(index=index, first=first, last=last, worker=worker)

    other = new_key_pair().public
    stages = [stage(0, 0, 2, ""), stage(1, 2, 3, gamma.keys.public), stage(2, 3, 4, other)]
    shared = pool.model.share_for_stages(stages)
    assert set(shared) == {0, 1, 2}
    assert all(each.digest == tiny.digest for each in shared.values())
    assert shared[1].hints == ()  # It has the file.
    # The tied embedding, where there is one, leaves gamma once; what each needs alone is not hinted at.
    givers = {hint.peer for each in shared.values() for hint in each.hints}
    assert givers <= {pool.head.key, other}


def test_what_is_known_does_while_the_host_is_away_and_what_it_has_now_counts(
    pool: Pool, tiny: SharedFolders, tmp_path: Path
) -> None:
    gamma = FakeHost(pool.head, pool.stack, "gamma", GAMMA, has(tiny))
    gamma.piece_server.share_model(tiny)
    assert pool.model.find()
    gamma.close()
    wait_until(lambda: not pool.head.pool.hosts.connected())
    assert pool.model.find()
    assert any("Going on with what is here of tiny, which came from gamma" in line for line in pool.said)
    assert not pool.model.has_peer
    assert pool.model.prepare(pool.said.append, for_others=False).path.name == tiny.digest

    pool.head.roster.revoke("gamma")
    changed = share_model(save_tiny("llama", 1, tmp_path / "changed"), "tiny", tmp_path / "lent")
    again = FakeHost(pool.head, pool.stack, "delta", GAMMA, has(changed))
    again.piece_server.share_model(changed)
    assert pool.model.prepare(pool.said.append, for_others=False).path.name == changed.digest
    assert pool.model.has_peer


def test_nobody_has_it(pool: Pool) -> None:
    FakeHost(pool.head, pool.stack, "beta", BETA, lacks)
    FakeHost(
        pool.head,
        pool.stack,
        "gamma",
        GAMMA,
        lambda question: [HostFault(question.token, ErrorInfo("no_space", "\x1bfull[/red]"))],
    )
    with pytest.raises(ModelNotFound, match="nor has any of the paired hosts: beta, gamma") as raised:
        pool.model.find()
    assert "potluck pull smollm2" in raised.value.hint
    assert not any("\x1b" in line for line in pool.said)


def test_who_is_away_is_named_until_the_time_is_over(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MODEL_WAIT_S", 1.0)
    pool.head.roster.add(new_key_pair().public, "attic", "macOS")
    with pytest.raises(DeadlineExceeded, match="attic"):
        pool.model.find()
    assert any("not there yet: attic" in line for line in pool.said)


class Given:
    """One answer to whoever asks for it."""

    def __init__(self, digest: str, path: Path) -> None:
        self._digest = digest
        self._path = path

    def locate(self, digest: str) -> Located | None:
        return Located(self._path, 0, self._path.stat().st_size) if digest == self._digest else None

    def have_bitmap(self, model: str) -> bytes:
        return b"\xff"


def hostile_list(model: SharedFolders) -> bytes:
    data = json.loads(model.list_file.read_bytes())
    data["files"][0]["name"] = "../../escaped.json"
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "lie",
    [
        "no digest",
        "no such list",
        "wrong list",
        "hostile list",
        "silence",
        "wrong message",
        "it leaves",
        "fault",
        "it stands still",
    ],
)
def test_a_host_that_lies_is_left_for_another(pool: Pool, tiny: SharedFolders, tmp_path: Path, lie: str) -> None:
    digest = {"no digest": "../../../etc", "no such list": "ab" * 32}.get(lie, tiny.digest)
    if lie == "hostile list":
        digest = list_digest(hostile_list(tiny))
    (tmp_path / "list").write_bytes(hostile_list(tiny))

    def answer(question: Any) -> list[ControlMessage]:
        if isinstance(question, ListHostModels):
            return has(tiny)(question)
        match lie:
            case "silence":
                return []
            case "it stands still":
                threading.Thread(target=stand_still, args=(question.token,), daemon=True).start()
                return []
            case "it leaves":
                beta.control.close()
                return []
            case "wrong message":
                return [HostModels(question.token, ())]
            case "fault":
                return [HostFault(question.token, ErrorInfo("no_space", "the disk is full"))]
        return [ModelOffered(question.token, digest, 1 << 62)]

    def stand_still(token: int) -> None:
        for _ in range(400):
            beta.control.send(OfferProgress(token, 5, 9))
            time.sleep(0.05)

    beta = FakeHost(pool.head, pool.stack, "beta", BETA, answer)
    beta.piece_server._server.sources = (Given(digest, tmp_path / "list"),)
    gamma = FakeHost(pool.head, pool.stack, "gamma", GAMMA, has(tiny))
    gamma.piece_server.share_model(tiny)
    assert pool.model.find()
    assert pool.model.prepare(lambda line: None, for_others=False).path.name == tiny.digest
    assert not list(tmp_path.rglob("escaped.json"))
    assert {path.name for path in (tmp_path / "head").iterdir()} <= {
        "identity", "run", "roster.json", "roster.lock", "pieces", "shared"
    }  # fmt: skip
    if lie != "wrong list":
        assert any("beta could not serve tiny" in line for line in pool.said), pool.said


def test_only_who_was_asked_answers(pool: Pool, tiny: SharedFolders) -> None:
    """Tokens are easy to guess: another host's answer is not taken for it."""
    gamma = FakeHost(pool.head, pool.stack, "gamma", GAMMA, has(tiny))
    gamma.piece_server.share_model(tiny)
    lie = hashlib.sha256(b"lie").hexdigest()
    beta = FakeHost(pool.head, pool.stack, "beta", BETA, lacks)

    def slow(question: Any) -> list[ControlMessage]:
        if isinstance(question, OfferModel):
            for token in range(20):
                beta.control.send(ModelOffered(token, lie, 5))
            wait_until(lambda: beta.control._outbox == type(beta.control._outbox)())
        return has(tiny)(question)

    gamma.answer = slow
    assert pool.model.find()
    assert pool.model.prepare(lambda line: None, for_others=False).path.name == tiny.digest
