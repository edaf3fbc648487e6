"""What the fork server imports: the libraries that make a start slow. Importing them must not start threads or touch a device."""

import deepspeed

# DeepSpeed imports these two when an engine starts; together they take as long as all the rest.
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
