"""One page about this machine: what is there, what is used in place of what is missing, what is broken, what to change.

Probes look at the machine and give facts (`facts.py`). What is said about them (`findings.py`, `kernels.py`, `page.py`) are pure
functions of the facts, so that it can be tested for machines that are not at hand.
"""
