"""`python -m megatron_plasticity`, which is also what the deepspeed launcher starts on every rank."""

from megatron_plasticity.cli import main

if __name__ == "__main__":
    main()
