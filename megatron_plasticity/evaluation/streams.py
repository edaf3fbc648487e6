"""Random numbers that belong to a (question, sample), not to a batch.

A question is known by its key, a 64-bit number. Every (seed, key, sample) starts its own SplitMix64 generator (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose n-th output is a function of its starting state and n
alone:

    state(seed, key, sample) = mix(mix(mix(seed + γ) + γ·(key + 1)) + γ·(sample + 1))
    output(n)                = mix(state + γ·(n + 1))

with arithmetic modulo 2⁶⁴, γ = 0x9E3779B97F4A7C15 and `mix` the published finaliser. γ is odd and `mix` a bijection, so two
samples of one question never share a state. The numbers of a whole batch are one array expression.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def question_key(identifier: str) -> int:
    """The key of the question with this id: 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "little")


def stream_states(seed: int, keys: ArrayLike, samples: ArrayLike) -> NDArray[np.uint64]:
    """Starting states of the generators of (key, sample) pairs, elementwise over two equally long arrays of integers < 2⁶⁴."""
    state = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GAMMA)
    for part in (keys, samples):
        state = _mix(state + _GAMMA * (np.asarray(part, dtype=np.uint64) + np.uint64(1)))
    return state


def uniforms(states: NDArray[np.uint64], positions: ArrayLike) -> NDArray[np.float64]:
    """The numbers at `positions` (0, 1, …; one for all, or one for each) of the generators: uniform in [0, 1), multiples of
    2⁻⁵²."""
    return (outputs(states, positions) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def outputs(states: NDArray[np.uint64], positions: ArrayLike) -> NDArray[np.uint64]:
    """The 64-bit outputs at `positions` (one for all, or one for each) of the generators."""
    return _mix(states + _GAMMA * (np.atleast_1d(np.asarray(positions, dtype=np.uint64)) + np.uint64(1)))


def derived_seed(seed: int, name: str) -> int:
    """A 64-bit seed for the part `name` of an experiment, so that parts with equal question numbers draw independent numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
