"""Rings over a lab's hosts, measured from the host of the engine: `bench.ring.lab_scheduling` starts this there.

Says where it listens, waits for the hosts' workers, and says so again when its rings are ready; then it obeys commands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from bench.ring.driven_ring import driven_ring
from bench.ring.engine_ring import engine_ring, pool_of_hosts
from bench.ring.sections import PREFILL_TOKENS, Prompts, drive, prefill, run_steadily, sum_of_hops_s
from bench.targets import filled_ring
from devices.pairing.identity import load_keys
from potluck.engine.tokenizer import Tokenizer
from potluck.host.local_host import ThisHost
from potluck.measure.child_process import reply_pipe, serve_commands
from potluck.store.store import Store
from potluck.system.paths import home_dir, identity_dir
from potluck.system.settings import Settings

# KV for about 60 chats of them.
_STEADY_S, _STEADY_TOKENS = 8.0, 400
_CONTEXT_TOKENS, _CONCURRENCY = 4096, 8


def main() -> int:
    replies = reply_pipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="this host's")
    parser.add_argument("--address", required=True, help="this host's")
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument(
        "--ports", type=int, nargs=2, required=True, help="of the doors of the engine's pool and of the driven one's"
    )
    parser.add_argument("--layers", default=None, help="as `potluck up` takes it; default: the planner's")
    options = parser.parse_args()
    here = ThisHost(name=options.name, address=options.address, keys=load_keys(identity_dir()))
    model = Store(home_dir()).resolve(options.model)
    prompts = Prompts(Tokenizer(model.path), model.spec.vocab_size)
    wanted = Settings(
        context_tokens=_CONTEXT_TOKENS,
        concurrency=_CONCURRENCY,
        use_all_devices=True,
        objective="throughput",
        layers=options.layers,
    )
    with ExitStack() as stack:
        pool, apart = (stack.enter_context(pool_of_hosts(here, port)) for port in options.ports)
        os.write(replies, (json.dumps({"listening": options.ports}) + "\n").encode())
        for each in (pool, apart):
            each.wait_for(options.stages)
        # Hosts that share a machine are measured in turn.
        plan = pool.plan(model, wanted, in_turn=True)
        ring = stack.enter_context(engine_ring("ring", pool, model, plan, prompts.eos_ids))
        driven = stack.enter_context(driven_ring(apart, model, plan, max_step_tokens=PREFILL_TOKENS))

        def alone() -> dict[str, Any]:
            """One row that goes round alone: what stages take, what hops do, and so how many groups fill the ring."""
            found = drive(driven, prompts, 1, 1)
            hops_s = sum_of_hops_s(found)
            return {"stage_s": found.stage_s, "hops_s": hops_s, "groups": filled_ring(found.stage_s, hops_s)}

        def filled(count: int) -> dict[str, Any]:
            rate, steps = run_steadily(ring, prompts, count, seconds=_STEADY_S, most_tokens=_STEADY_TOKENS)
            return {"tokens_per_s": rate, "rows": steps[0].rows, "stage_s": [step.seconds for step in steps]}

        def prefilled(number: int) -> dict[str, Any]:
            return dict(prefill(ring, driven, prompts, number))

        serve_commands(
            {"alone": alone, "filled": filled, "prefill": prefilled},
            {"stages": [[stage.device, stage.num_layers] for stage in plan.stages]},
            replies,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
