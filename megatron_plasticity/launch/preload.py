"""What the fork server imports: the libraries that make a start slow. Importing them must not start threads or touch a device."""

import deepspeed  # noqa: F401
import torch  # noqa: F401
