"""`python -m megatron_plasticity`, which is also what a launcher starts on every rank."""

import os

from megatron_plasticity.cli import main
from megatron_plasticity.launch.rank import launched_rank

if __name__ == "__main__":
    with launched_rank(os.environ):
        main()
