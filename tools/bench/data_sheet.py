"""The data sheet of the GPU that a driver names. Without torch."""

from __future__ import annotations

from megatron_plasticity.launch.hardware import A100, H100, H200, Device

_DEVICES: dict[str, Device] = {"H200": H200, "H100": H100, "A100": A100}
_SLOWER = ("PCIE", "NVL", "MIG")
"""In the names of variants that are slower, and of slices of a GPU."""


def device_of(name: str) -> Device | None:
    """By the name that torch or the driver gives it; None for one whose figures are not known, such as a slower variant."""
    upper = name.upper()
    if any(sign in upper for sign in _SLOWER):
        return None
    words = upper.replace("-", " ").split()
    return next((device for sign, device in _DEVICES.items() if sign in words), None)


def peak_flops(name: str, precision: str) -> float | None:
    """Dense FLOP/s in "bf16" or "fp32"; None for a device that is not known."""
    device = device_of(name)
    return None if device is None else getattr(device, precision)
