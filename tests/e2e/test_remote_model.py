"""A model that lies on another host than the head: it is served all the same, and everybody gets only what it lacks.

Offline: what the head lacks it can get from the pool alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

from devices.pairing.identity import load_keys
from potluck.host.piece_cache import RemoteModelRecord, write_remote_record
from potluck.system.paths import shared_dir
from shard.pieces.metadata import SharedFolders, read_list, share_model
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import engine_pieces, metadata_pieces, stage_pieces
from tests.support.e2e.lan_hosts import LOADED_S, ONE_DEVICE, answer, new_home, stages
from tests.support.e2e.paired_hosts import Pair
from tests.support.e2e.potluck_process import ASK_S, Home, Running, wait_until
from tests.support.shard.model_pieces import contents
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore

QUESTION = ("Name three fruits.", "--max-tokens", "12", "--temperature", "0")


@pytest.fixture
def pair(data_home: Path) -> Iterator[Pair]:
    made = Pair(new_home(), new_home(data_home / "models"))
    yield made
    made.clean()


@pytest.fixture
def pair_without_models() -> Iterator[Pair]:
    made = Pair(new_home(), new_home())
    yield made
    made.clean()


def borrowed(pair: Pair) -> str:
    """The digest of the one model that alpha has got."""
    (found,) = [path for path in (pair.alpha.data / "shared").iterdir() if len(path.name) == 64]
    return found.name


def fetched(head: Running) -> dict[str, dict[str, int]]:
    """What came for each stage, by its host and the giver's."""
    report = httpx.get(f"{head.facts()['url']}/potluck/status", timeout=ASK_S).json()
    return {stage["host"]: stage["fetched"] for stage in report["stages"]}


def keep(made: SharedFolders, folder: Path, root: Path, wanted: Iterable[Piece]) -> None:
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
    head, beta = pair.up("--offline", "--wait-for", "2"), pair.join()
    assert stages(head) == [("alpha", "cpu"), ("beta", "beta/cpu")]
    assert "smollm2 is not in this host's store" in head.said()
    assert "Sharing smollm2 with the pool" in beta.said()
    text = answer(head)

    # Of all that came to the head: its own tensors, what opens the model, and the tokenizer.
    came = fetched(head)
    skeleton = pair.alpha.data / "shared" / borrowed(pair)
    pieces = read_list(skeleton)
    spec = open_checkpoint(skeleton, pieces=PieceStore(pair.alpha.data / "pieces")).spec
    last = json.loads(head.lines[0])["stages"][0]["last"]
    own = {piece.digest: piece.num_bytes for piece in stage_pieces(pieces, spec, 0, last).values()}
    opening = {**metadata_pieces(pieces), **engine_pieces(pieces)}
    opened = {piece.digest: piece.num_bytes for piece in opening.values()}
    assert came["beta"] == {}
    assert set(came["alpha"]) == {"beta"}
    assert came["alpha"]["beta"] <= sum(own.values())
    kept = {path.stem: path.stat().st_size for path in (pair.alpha.data / "pieces").rglob("*.piece")}
    assert set(kept) == {*own, *opened, borrowed(pair)}

    head.stop()
    head = pair.up("--offline", "--wait-for", "2")
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
    made = share_model(smollm2_path, "smollm2", shared_dir())
    key = load_keys(pair.beta.data / "identity").public
    write_remote_record(RemoteModelRecord(name="smollm2", digest=made.digest, peer="beta", key=key))
    spec = open_checkpoint(smollm2_path).spec
    keep(made, smollm2_path, pair.alpha.data / "pieces", stage_pieces(made.pieces, spec, 0, 20).values())
    shutil.rmtree(shared_dir() / "offers")

    head = pair.up("--offline")
    wait_until(lambda: "Waiting for beta" in head.said(), LOADED_S, head.said)
    beta = pair.join()
    wait_until(lambda: bool(stages(head)), LOADED_S, lambda: head.said() + beta.said())
    text = answer(head)
    assert beta.stop() == 130
    head.stop()

    keep(made, smollm2_path, pair.alpha.data / "pieces", stage_pieces(made.pieces, spec, 0, 30).values())
    head = pair.up("--offline")
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
    head = pair.up("--offline")
    wait_until(lambda: "not there yet: beta" in head.said(), LOADED_S, head.said)
    beta = pair.join()
    assert head.process.wait(LOADED_S) == 1
    said = head.said()
    assert "nor has any of the paired hosts: beta" in said
    assert "hint: " in said and "Traceback" not in said
    beta.stop()

    head = pair.up("--offline")
    wait_until(lambda: "not there yet: beta" in head.said(), LOADED_S, head.said)
    assert head.stop() == 130
    assert "Traceback" not in head.said()
    assert pair.alpha.leftovers() == []


def test_a_lender_that_is_revoked_while_it_is_asked_is_waited_for_no_more(pair: Pair) -> None:
    head, beta = pair.up("--offline", "--wait-for", "2"), pair.join()
    wait_until(lambda: "smollm2 is on beta" in head.said() or head.process.poll() is not None, LOADED_S, head.said)
    pair.roster.revoke("beta")
    assert beta.process.wait(30.0) == 1
    wait_until(lambda: "Waiting for" in head.said(), LOADED_S, head.said)
    assert head.stop() == 130
    assert "Traceback" not in head.said()
