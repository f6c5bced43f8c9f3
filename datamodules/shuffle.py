"""Permutations as pure functions of a key.

A resumed run must see the same order years and library versions later, which numpy's generators do not promise
(NEP 19). So the order is that of a hash: splitmix64 of (key, index), sorted.
"""

import hashlib

import numpy as np


def hash64(*parts: str | int) -> int:
    """Return a 64-bit hash of strings and integers, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def permutation(size: int, key: int) -> np.ndarray:
    """Return a pseudo-random permutation of `range(size)` as int64 [size].

    Args:
        size: number of elements.
        key: 64-bit key; another key gives another permutation.
    """
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")
