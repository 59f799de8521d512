"""One end of a link in a host of a lab: `receive` or `send ADDRESS`. Every step is 4 MB of hidden states."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import zmq

from transport.codec import EdgeLimits
from transport.errors import NeighbourGone
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.ring import Entry, Fence, Hidden, SequenceId
from transport.security.curve import KeyPair

PORT = 7100
# Both ends have the keys of one host: which they are does not matter here.
KEYS = KeyPair(public="Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", secret="D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs")
NUM_TOKENS, HIDDEN_SIZE = 1024, 2048
FENCE = Fence("ring", 1, "plan")
LIMITS = EdgeLimits(
    fence=FENCE,
    hidden_size=HIDDEN_SIZE,
    dtype="bfloat16",
    vocab_size=100,
    context_tokens=NUM_TOKENS,
    max_step_tokens=NUM_TOKENS,
)


def receive(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    endpoint = f"tcp://{address}:{PORT}"
    edges = SecureEndpoints(context, Path(), keys=KEYS, address=None)
    receiver = ZmqReceiver(context, endpoint, LIMITS, guard=edges.guard(endpoint, ""))
    print("listening", flush=True)
    try:
        while True:
            received = receiver.receive(1.0)
            if received is not None:
                step = received.message
                assert isinstance(step, Hidden)
                assert len(received.buffers[0]) == NUM_TOKENS * HIDDEN_SIZE * 2
                print(f"step {step.step}", flush=True)
    except NeighbourGone:
        print("gone", flush=True)


def send(context: zmq.Context[zmq.Socket[bytes]], address: str, num_steps: int) -> None:
    endpoint = f"tcp://{address}:{PORT}"
    prepare = SecureEndpoints(context, Path(), keys=KEYS, address=None).client_auth(endpoint, "")
    sender = ZmqSender(context, endpoint, LIMITS, name="stage 0", prepare=prepare)
    buffer = memoryview(bytes(NUM_TOKENS * HIDDEN_SIZE * 2))
    entries = (Entry(SequenceId(1), 0, (1,) * NUM_TOKENS, 1),)
    for number in range(num_steps):
        sender.send(Hidden(FENCE, number, (), entries, "bfloat16", NUM_TOKENS, HIDDEN_SIZE), (buffer,))
    while True:  # until it is killed
        time.sleep(1.0)


def main() -> None:
    with zmq.Context() as context:
        if sys.argv[1] == "receive":
            receive(context, sys.argv[2])
        else:
            send(context, sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    main()
