"""Random streams by key: a draw depends on its key alone, and the global generator is left alone."""

import hashlib

import torch


def stream(*key: str | int) -> torch.Generator:
    """A generator on the CPU of its own for every key, such as ("head", 3); the same key gives the same draws."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") - 2**63)
