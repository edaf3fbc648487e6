"""How processes start: workers of a study on this machine, and the command for the deepspeed launcher."""
