"""Fingerprints of tensors: integer sums modulo 2^64, so neither the order of adding, nor the device, nor rounding
changes them.

A tensor's bytes are read as 64-bit words w_i (the last one padded with zeros):

    f = Σ_i (2i + 1) · mix(w_i),   mix(w) = u xor (u >> 29),   u = w · ODD

Several tensors are combined as Σ key(name) · f. A fingerprint finds faults and names the tensors that differ. It is no
cryptographic hash; the journal's chain over the fingerprints is.
"""

import hashlib

import torch

ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio as int64; odd, so multiplying by it loses no information
MASK = (1 << 64) - 1
WORDS = 1 << 22  # words per part: 32 MiB


def tensor_fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """f of a tensor, one int64, on the tensor's device; without waiting for the device."""
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
    """Σ_i (2i + 1) · mix(w_i) of consecutive words, the first of which has the index `start`."""
    mixed = words * ODD
    mixed ^= mixed >> 29
    factors = torch.arange(2 * start + 1, 2 * (start + len(words)), 2, dtype=torch.int64, device=words.device)
    return mixed.mul_(factors).sum()


def fingerprints(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """f of each tensor, 0 … 2^64 − 1, in one transfer from the device."""
    if not tensors:
        return {}
    values = torch.stack([tensor_fingerprint(tensor) for tensor in tensors.values()]).tolist()
    return {name: value & MASK for name, value in zip(tensors, values, strict=True)}


def combine(values: dict[str, int]) -> int:
    """Σ key(name) · f modulo 2^64: one number for all tensors, whatever their order."""
    return sum(_key(name) * value for name, value in values.items()) & MASK


def short_fingerprints(values: dict[str, int]) -> bytes:
    """One byte per tensor, by ascending name: too short to prove anything, but names what differs (misses 1 in 256)."""
    return bytes((values[name] * (ODD & MASK) & MASK) >> 56 for name in sorted(values))


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
