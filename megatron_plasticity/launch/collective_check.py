"""A tiny all-reduce over all ranks of a launch: `python -m megatron_plasticity.launch.collective_check`, under a launcher.

Who joined is in each rank's output, so that one can see which machine did not. A rank that hangs ends itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from datetime import timedelta

from megatron_plasticity.launch.rank import launched_rank
from megatron_plasticity.tracking.process import host_name

MET = "reached rank 0 as rank"
JOINED = "joined as rank"
# Who came is known before anybody waits for those who do not: the ranks meet at rank 0's store one by one.
_SHARE_FOR_MEETING = 0.6


def check(backend: str, seconds: float) -> None:
    """Join the ranks, add up their numbers, and compare. Raises RuntimeError if the sum is wrong."""
    import torch
    from torch import distributed

    from megatron_plasticity.parallel.grid import resolve_device

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = resolve_device("cuda")
        torch.cuda.set_device(device)
    store = distributed.TCPStore(  # type: ignore[attr-defined]  # it is there in every build with distributed
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=_SHARE_FOR_MEETING * seconds),
    )
    store.set(f"met-{rank}", host_name())
    print(f"{host_name()} {MET} {rank} of {size}", flush=True)
    store.wait([f"met-{other}" for other in range(size)])
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=(1 - _SHARE_FOR_MEETING) * seconds)
    )
    try:
        numbers = torch.full((1024,), float(rank + 1), device=device)
        distributed.all_reduce(numbers)
        print(f"{host_name()} {JOINED} {rank} of {size}", flush=True)
        expected = size * (size + 1) / 2
        if not bool((numbers == expected).all()):
            raise RuntimeError(f"the all-reduce over {size} ranks gave {numbers[0].item():g} instead of {expected:g}")
    finally:
        distributed.destroy_process_group()
    print("summed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="a rank that takes longer ends itself")
    arguments, _ = parser.parse_known_args()  # the deepspeed launcher adds --local_rank
    with launched_rank(os.environ):
        # A thread of C, which no collective can hold up.
        faulthandler.dump_traceback_later(arguments.seconds, exit=True, file=sys.stderr)
        check(arguments.backend, 0.9 * arguments.seconds)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
