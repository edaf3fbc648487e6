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

JOINED = "joined as rank"


def check(backend: str, seconds: float) -> None:
    """Join the ranks, add up their numbers, and compare. Raises RuntimeError if the sum is wrong."""
    import torch
    import torch.distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
    try:
        print(f"{host_name()} {JOINED} {rank} of {size}", flush=True)
        numbers = torch.full((1024,), float(rank + 1), device=device)
        torch.distributed.all_reduce(numbers)
        expected = size * (size + 1) / 2
        if not bool((numbers == expected).all()):
            raise RuntimeError(f"the all-reduce over {size} ranks gave {numbers[0].item():g} instead of {expected:g}")
    finally:
        torch.distributed.destroy_process_group()
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
