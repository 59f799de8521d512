"""A model that lies on another host than the head: it is served all the same, and everybody gets only what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

from devices.identity import load_keys
from devices.known_pools import KnownPool, save_known_pool
from devices.roster import RosterFile
from potluck.borrowed_record import BorrowedRecord, write_borrowed
from potluck.paths import shared_dir
from shard.needed_pieces import engine_pieces, nameless_pieces, stage_pieces
from shard.open import open_checkpoint
from shard.shared_model import OfferedModel, offer_model, read_list
from tests.e2e.lan_hosts import LOADED_S, ONE_DEVICE, answer, join, new_home, stages, up
from tests.e2e.potluck_process import Home, Running, wait_until
from tests.shard.pieces.given import contents
from transport.endpoints import free_port
from transport.pieces.piece import Piece
from transport.pieces.store import PieceStore

HEAD, BETA, GAMMA = "127.0.0.1", "127.0.0.2", "127.0.0.3"
QUESTION = ("Name three fruits.", "--max-tokens", "12", "--temperature", "0")


class Pair:
    """A head without models, and beta, which it has paired with."""

    def __init__(self, models: Path | None) -> None:
        self.alpha, self.beta = new_home(), new_home(models)
        self.port = free_port(HEAD)
        self.roster = RosterFile(self.alpha.data / "roster.json", name="alpha")
        key = load_keys(self.alpha.data / "identity").public
        self.roster.add(load_keys(self.beta.data / "identity").public, "beta", "Linux x86-64")
        pool = self.roster.read().pool
        door = f"{HEAD}:{self.port}"
        known = KnownPool(pool=pool, key=key, name="alpha", my_name="beta", doors=(door,))
        save_known_pool(self.beta.data / "pools.json", known)

    def up(self, *extra: str) -> Running:
        """Offline: what the head lacks it can get from the pool alone."""
        return up(self.alpha, "alpha", HEAD, "--offline", *extra, port=self.port)

    def join(self) -> Running:
        return join(self.beta, "beta", BETA)

    @property
    def digest(self) -> str:
        (found,) = [path for path in (self.alpha.data / "shared").iterdir() if len(path.name) == 64]
        return found.name


@pytest.fixture
def pair(data_home: Path) -> Iterator[Pair]:
    made = Pair(data_home / "models")
    yield made
    clean(made)


@pytest.fixture
def pair_without_models() -> Iterator[Pair]:
    made = Pair(None)
    yield made
    clean(made)


def clean(pair: Pair) -> None:
    for home in (pair.alpha, pair.beta):
        for process in home.processes():
            process.kill()


def fetched(head: Running) -> dict[str, dict[str, int]]:
    """What came for each stage, by its host and the giver's."""
    report = httpx.get(f"{head.facts()['url']}/potluck/status", timeout=30).json()
    return {stage["host"]: stage["fetched"] for stage in report["stages"]}


def keep(made: OfferedModel, folder: Path, root: Path, wanted: Iterable[Piece]) -> None:
    """Those pieces of the model, in the store."""
    found, store = contents(folder, made.pieces), PieceStore(root)
    for piece in wanted:
        store.put(found[piece.digest], piece.digest)


def answer_alone(home: Home) -> str:
    done = home.run("run", "smollm2", *QUESTION, *ONE_DEVICE, "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    text: str = json.loads(done.stdout)["text"]
    return text


def test_the_head_serves_a_model_that_only_another_host_has(pair: Pair) -> None:
    head, beta = pair.up("--wait-for", "2"), pair.join()
    assert stages(head) == [("alpha", "cpu"), ("beta", "beta/cpu")]
    assert "smollm2 is not in this host's store" in head.said()
    assert "Giving smollm2 to the pool" in beta.said()
    text = answer(head)

    # Of all that came to the head: its own tensors, what opens the model, and the tokenizer.
    came = fetched(head)
    skeleton = pair.alpha.data / "shared" / pair.digest
    pieces = read_list(skeleton)
    spec = open_checkpoint(skeleton, pieces=PieceStore(pair.alpha.data / "pieces")).spec
    last = json.loads(head.lines[0])["stages"][0]["last"]
    own = {piece.digest: piece.num_bytes for piece in stage_pieces(pieces, spec, 0, last).values()}
    opening = {**nameless_pieces(pieces), **engine_pieces(pieces)}
    opened = {piece.digest: piece.num_bytes for piece in opening.values()}
    assert came["beta"] == {}
    assert set(came["alpha"]) == {"beta"}
    assert came["alpha"]["beta"] <= sum(own.values())
    kept = {path.stem: path.stat().st_size for path in (pair.alpha.data / "pieces").rglob("*.piece")}
    assert set(kept) == {*own, *opened, pair.digest}

    head.stop()
    head = pair.up("--wait-for", "2")
    wait_until(lambda: len(stages(head)) == 2, LOADED_S, head.said)
    assert fetched(head) == {"alpha": {}, "beta": {}}
    assert answer(head) == text
    for running in (head, beta):
        running.stop()
    for home in (pair.alpha, pair.beta):
        assert home.leftovers() == []
    assert answer_alone(pair.beta) == text


def test_a_head_goes_on_with_what_it_has_and_waits_only_for_what_lacks(
    pair: Pair, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a start with beta, which has layers 20 to 29."""
    monkeypatch.setenv("POTLUCK_HOME", str(pair.alpha.data))
    made = offer_model(smollm2_path, "smollm2", shared_dir())
    key = load_keys(pair.beta.data / "identity").public
    write_borrowed(BorrowedRecord(name="smollm2", digest=made.digest, lender="beta", key=key))
    spec = open_checkpoint(smollm2_path).spec
    keep(made, smollm2_path, pair.alpha.data / "pieces", stage_pieces(made.pieces, spec, 0, 20).values())
    shutil.rmtree(shared_dir() / "offers")

    head = pair.up()
    wait_until(lambda: "Waiting for beta" in head.said(), LOADED_S, head.said)
    beta = pair.join()
    wait_until(lambda: bool(stages(head)), LOADED_S, lambda: head.said() + beta.said())
    text = answer(head)
    assert beta.stop() == 130
    head.stop()

    keep(made, smollm2_path, pair.alpha.data / "pieces", stage_pieces(made.pieces, spec, 0, 30).values())
    head = pair.up()
    assert stages(head) == [("alpha", "cpu")]
    assert "Going on with what is here of smollm2, which came from beta" in head.said()
    assert fetched(head) == {"alpha": {}}
    assert answer(head) == text
    shown = pair.alpha.run("show", "smollm2")
    assert shown.returncode == 1 and "beta" in shown.stderr and "Traceback" not in shown.stderr
    assert "smollm2" in pair.alpha.run("cache").stdout
    head.stop()
    assert pair.alpha.leftovers() == []


def test_a_name_that_no_host_knows_is_said_at_once(pair_without_models: Pair) -> None:
    pair = pair_without_models
    head = pair.up()
    wait_until(lambda: "not there yet: beta" in head.said(), LOADED_S, head.said)
    beta = pair.join()
    assert head.process.wait(LOADED_S) == 1
    said = head.said()
    assert "nor has any of the paired hosts: beta" in said
    assert "hint: " in said and "Traceback" not in said
    beta.stop()

    head = pair.up()
    wait_until(lambda: "not there yet: beta" in head.said(), LOADED_S, head.said)
    assert head.stop() == 130
    assert "Traceback" not in head.said()
    assert pair.alpha.leftovers() == []


def test_a_lender_that_is_revoked_while_it_is_asked_is_waited_for_no_more(pair: Pair) -> None:
    head, beta = pair.up("--wait-for", "2"), pair.join()
    wait_until(lambda: "smollm2 is on beta" in head.said() or head.process.poll() is not None, LOADED_S, head.said)
    pair.roster.revoke("beta")
    assert beta.process.wait(30.0) == 1
    wait_until(lambda: "Waiting for" in head.said(), LOADED_S, head.said)
    assert head.stop() == 130
    assert "Traceback" not in head.said()
