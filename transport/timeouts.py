"""How long Potluck waits for others, in seconds, with the reason for each. Nothing is imported here.

Who is silent: a ring's neighbour after 1.5 s, a piece server after 5, a control connection after 10. What only paces a
loop (ticks, retries, windows of an average) stands beside the loop.
"""

from __future__ import annotations

# A link of a ring (transport.links).
LINK_CONNECT_S = 30.0
"""The neighbour may still be starting: its socket is bound before its libraries are loaded."""
LINK_SEND_S = 30.0
"""For room in a neighbour's queue: it may compute a long chunk of a prompt, and one that hangs is found out."""
LINK_HEARTBEAT_S = 0.5
LINK_SILENT_S = 1.5
"""Every request of the ring waits for a host that has gone; three heartbeats."""
TCP_CONNECT_S = 3.0
"""For libzmq's connection and handshake; it tries again afterwards."""
LINK_PROBE_CONNECT_S = 10.0
"""Both ends listen already when one is told to connect."""
LINK_PROBE_REPLY_S = 20.0
"""A megabyte at 1 Mbit/s takes 8 s."""
LINK_PROBE_SILENT_S = 60.0
"""For both ends' reports: to connect and then to exchange messages may take as long as both of them."""

# Control between a head and its hosts (transport.control).
CONTROL_HEARTBEAT_S = 1.0
CONTROL_SILENT_S = 10.0
"""Patient: a worker that a busy host or network holds up for a moment has weights loaded that would be lost."""
CONTROL_CONNECT_S = 20.0
"""The head listens before it starts a worker; a node tries another address, or later."""
CONTROL_ACCEPT_S = 15.0
"""For the head's first message to a host that has introduced itself: the head may be loading."""

# Pieces of models (transport.pieces).
BULK_SILENT_S = 10.0
"""A heartbeat stands behind whole parts in a slow network's queue."""
PEER_SILENT_S = 5.0
"""A peer that is asked for one part has read it from its disk by then; others may have it too."""
PEER_STALLED_S = 30.0
"""A peer that takes nothing for so long holds a connection that others may need."""
FETCH_PATIENCE_S = 30.0
"""Nothing at all has come for so long: long enough for a head or a router to start anew."""
FETCH_UNAVAILABLE_S = 5.0
"""No peer has a piece: one that gets it just now would say so every half second."""
HINT_PATIENCE_S = 10.0
"""A hinted host that has got nothing new for so long, and gave nothing, is not waited for. At a third of 100 Mbit/s a
piece takes it 4 s."""
AWAY_PATIENCE_S = 3.0
"""The same for one that there is no connection to."""
SPEED_TEST_S = 20.0
"""8 MiB at 3.4 Mbit/s; what came until then counts."""
PORT_CLOSED_S = 0.5
"""libzmq closes a port in a thread of its own, and the next server is to find it free."""

# A ring's model on other hosts (potluck.head.models).
HOST_REPLY_S = 5.0
"""Which models a host has: it reads a few small files."""
FIND_FILE_S = 3.0
"""Whether a host has a file: its checksums are known, or it says no."""
POOL_HEAD_S = 8.0
"""For this host's own head to ask all hosts, and to answer."""
BLOCK_S = 10.0
"""Who takes longer for a megabyte is no better than the internet."""
FALLBACK_AFTER_S = 6.0
"""A paired host that runs comes by itself within a few seconds; after that another way is taken, if there is one."""
MODEL_WAIT_S = 3600.0
"""For a host to hash a model: 400 GB at 110 MB/s."""
MODEL_SILENT_S = 60.0
"""A host that hashes says so twice a second."""
MODEL_STALLED_S = 300.0
"""A host that says the same count for so long reads from a disk that hangs."""

# Pairing and finding a head (devices, potluck.host).
CODE_LIFETIME_S = 120.0
"""To walk to the other computer and type it; it is short, and can be guessed at."""
INVITE_LIFETIME_S = 3600.0
"""To be sent to someone, who reads it later; 128 bits can't be guessed."""
PAIRING_CONNECT_S = 5.0
"""A host of the same network answers in milliseconds, a sleeping one not at all."""
PAIRING_LINE_S = 20.0
"""The client's: longer than the server's, which has other connections and says PairingPending every 2 s."""
PAIRING_SERVER_LINE_S = 10.0
"""The server's: strangers hold one of 16 places so long."""
PAIRING_DECISION_S = 120.0
"""For the head's user to say yes."""
BROWSE_S = 4.0
"""Multicast DNS answers within one; a busy Wi-Fi drops the first question."""
POOL_INFO_S = 2.0
"""For each of the heads found, all asked at once."""

# This host.
FILE_LOCK_S = 10.0
"""Whoever has it writes one small file, on a disk that may be slow."""
HEAD_LOCK_S = 0.3
"""Whoever only looks holds the lock for a moment; a head holds it from start to end."""
LEASE_LOCK_S = 30.0
"""Whoever has it may be removing many pieces."""
THREAD_JOIN_S = 2.0
"""For a thread that is closed, at most: nobody waits longer to leave."""
ADVERTISER_CLOSE_S = 3.0
"""Zeroconf says goodbye three times within a second."""
CHILD_TERMINATE_S = 1.5
"""For a child to end when it is told to."""
CHILD_KILL_S = 1.0
"""For the system to end a child that is killed."""
CHILD_EXIT_S = 1.0
"""A child may close its output a moment before it ends, and its last words may be on their way."""
PROBE_READY_S = 60.0
"""For a probe to load its library and touch its memory: importing torch from a cold disk takes most of it."""
PROBE_RESULT_S = 15.0
"""For the measurement itself, about a second on any device that is worth its place."""
TOOL_S = 5.0
"""For networksetup, which answers at once or hangs."""
NVIDIA_SMI_S = 10.0
"""Without a daemon it loads the driver first."""
