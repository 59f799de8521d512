"""What a wire-tapper gets of a ring of two hosts: no prompt, no answer, no weights."""

from __future__ import annotations

import os
import socket
from itertools import pairwise
from pathlib import Path

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer

from bench.ring.hostile import LoopbackHosts, listening
from tests.support.security.capture import Capture, Windows
from tests.support.security.targets import wait_until
from transport.codec import encode
from transport.messages.ring import Entry, Fence, SequenceId, Tokens

PROMPT = "The purple walrus hid eleven brass keys beneath the lighthouse of Quillhaven. Where are the keys?"
# A window of 32 bytes for so many of the weights: a packet in the clear would have several.
EVERY = 512
MIB = 2**20


def ask(hosts: LoopbackHosts) -> str:
    body = {"model": hosts.model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 24, "temperature": 0}
    response = httpx.post(f"{hosts.url}/v1/chat/completions", json=body, timeout=240, trust_env=False)
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


def prompt_ids(model: Path) -> tuple[int, ...]:
    """Those within the prompt, whatever stands before and after it."""
    return tuple(Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROMPT, add_special_tokens=False).ids[2:-2])


def secrets_of(prompt: tuple[int, ...], answer: str) -> dict[str, bytes]:
    packed = b"".join(msgspec.msgpack.encode(number) for number in prompt)
    texts = {f"answer at {at}": answer[at : at + 16].encode() for at in range(0, len(answer) - 15, 16)}
    assert texts, f"too short: {answer!r}"
    return {"prompt": PROMPT[10:40].encode(), "token ids": packed[: len(packed) // 2], **texts}


def found_in(streams: list[bytes], secrets: dict[str, bytes], weights: Windows) -> set[str]:
    found = {name for name, secret in secrets.items() if any(secret in stream for stream in streams)}
    return found | ({"weights"} if any(weights.num_in(stream) for stream in streams) else set())


def test_a_capture_has_no_prompt_no_answer_and_no_weights(
    hosts: LoopbackHosts, capture: Capture, smollm2_path: Path
) -> None:
    answer = ask(hosts)
    ids = prompt_ids(smollm2_path)
    secrets = secrets_of(ids, answer)
    [file] = smollm2_path.glob("*.gguf")
    weights_bytes = file.read_bytes()
    weights = Windows(weights_bytes, EVERY)
    http_port = int(hosts.url.rpartition(":")[2])
    ports = {port for process in hosts.processes() for _, port in listening(process)} - {http_port}
    streams = capture.of_ports(ports)
    assert sum(map(len, streams)) > 20 * MIB, "the other host's weights have crossed"
    # What a busy machine drops hides nothing: each message has very many of them.
    assert capture.share_dropped() < 0.01
    assert found_in(streams, secrets, weights) == set()

    # The same, unencrypted: this would have been seen.
    messages = [
        encode(Tokens(Fence("ring", 1, "plan"), 1, (), (Entry(SequenceId(1), 0, (1, *ids, 2), 1),))),
        PROMPT.encode(),
        answer.encode(),
        weights_bytes[5 * MIB + 13 : 6 * MIB],
    ]
    port = send_unencrypted(messages)
    num_bytes = sum(map(len, messages))
    wait_until(lambda: sum(map(len, capture.of_ports({port}))) >= num_bytes)
    assert found_in(capture.of_ports({port}), secrets, weights) == {*secrets, "weights"}


def send_unencrypted(messages: list[bytes]) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as sender, listener.accept()[0] as receiver:
            for message in messages:
                for at in range(0, len(message), 2**14):
                    part = message[at : at + 2**14]
                    sender.sendall(part)
                    assert receiver.recv(len(part), socket.MSG_WAITALL) == part
    return port


@pytest.mark.parametrize("every", [64, 512])
def test_windows_are_found_at_any_offset(every: int) -> None:
    data = os.urandom(4 * every + 32)
    windows = Windows(data, every)
    for shift, (first, last) in enumerate(pairwise([0, every, 2 * every, 3 * every])):
        assert windows.num_in(bytes(shift) + data[first : last + 31]) == 1
    assert windows.num_in(os.urandom(2**20)) == 0
