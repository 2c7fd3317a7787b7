"""Counter-based random numbers: a pure function of integer keys (seed, epoch, sample, crop, ...).

Unlike a stateful generator it has nothing to save or replay on resume, and a crop is the same on
whichever rank, worker or micro-batch it is made. Each key is folded in
with the finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), which passes BigCrush as a generator; it needs only integer arithmetic,
so numpy draws a whole batch at once and the values never change with a library's version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64: a bijection of the 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*keys: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each combination of integer keys; the keys broadcast like numpy arrays."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        state = np.zeros((1,), np.uint64)
        for key in keys:
            state = mix((state ^ np.asarray(key).astype(np.uint64)) + GOLDEN)
    return state


def random_uniforms(*keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each combination of integer keys."""
    return np.ldexp((random_bits(*keys) >> np.uint64(11)).astype(np.float64), -53)


def random_permutation(n: int, *keys: int) -> NDArray[np.int64]:
    """A random permutation of ``range(n)``; O(n) memory."""
    return np.argsort(random_bits(*keys, np.arange(n, dtype=np.uint64)), kind="stable")


def text_key(text: str) -> int:
    """A text (a checksum, a purpose) as a 64-bit integer key."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
