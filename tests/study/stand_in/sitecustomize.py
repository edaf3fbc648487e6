"""Python imports this at its start where this folder is on PYTHONPATH: runs of studies then do what `runs.py` beside it says.

Only in processes that carry out one run; the rest of the machinery is the real one.
"""

import sys

if "megatron_plasticity.study.cell" in sys.orig_argv:
    from megatron_plasticity.study import jobs

    jobs._JOBS = dict.fromkeys(jobs._JOBS, ("runs", "run"))
