"""`python -m megatron_plasticity`, which is also what a launcher starts on every rank."""

import os
import sys

from megatron_plasticity.cli import LAUNCHED, main
from megatron_plasticity.launch.rank import launched_rank

if __name__ == "__main__":
    with launched_rank(os.environ, trains=sys.argv[1:2] != [] and sys.argv[1] in LAUNCHED):
        main()
