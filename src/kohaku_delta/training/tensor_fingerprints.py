"""Invariant: a fingerprint is an integer sum modulo 2^64, so neither the order of adding, nor the device, nor a
rounding moves it.

A tensor's bytes are read as words of 64 bits (the last one filled with zeros); f = Σ_i (2i + 1) · mix(word_i), mix(w) =
u xor (u >> 29), u = w · ODD. Tensors are folded as Σ key(name) · f. It finds faults and names tensors; it is no
cryptographic hash, and the chain of the journal, which is one, is made of it.
"""

import hashlib

import torch

ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, odd, as int64: multiplying by it loses nothing
MASK = (1 << 64) - 1
WORDS = 1 << 22  # at a time: 32 MiB


def tensor_fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """f of a tensor, int64 (one number), on the tensor's device. Nothing waits for the device."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, whole // 8, WORDS):
        total += _sum(flat[8 * start : min(8 * (start + WORDS), whole)].view(torch.int64), start)
    if whole < len(flat):
        last = torch.zeros(8, dtype=torch.uint8, device=flat.device)
        last[: len(flat) - whole] = flat[whole:]
        total += _sum(last.view(torch.int64), whole // 8)
    return total


def _sum(words: torch.Tensor, start: int) -> torch.Tensor:
    mixed = words * ODD
    mixed ^= mixed >> 29
    places = torch.arange(2 * start + 1, 2 * (start + len(words)), 2, dtype=torch.int64, device=words.device)
    return mixed.mul_(places).sum()


def fingerprints(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """f of each tensor, 0 … 2^64 − 1, in one transfer from the device."""
    if not tensors:
        return {}
    found = torch.stack([tensor_fingerprint(tensor) for tensor in tensors.values()]).tolist()
    return {name: number & MASK for name, number in zip(tensors, found, strict=True)}


def combine(numbers: dict[str, int]) -> int:
    """Σ key(name) · f modulo 2^64: one number for all tensors, whatever their order."""
    return sum(_key(name) * number for name, number in numbers.items()) & MASK


def short_fingerprints(numbers: dict[str, int]) -> bytes:
    """One byte a tensor, by ascending name: too short to prove anything, long enough to name what differs (one in 256
    is missed).
    """
    return bytes((numbers[name] * (ODD & MASK) & MASK) >> 56 for name in sorted(numbers))


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
