"""Sizes and times as people write them."""


def format_size(count: float) -> str:
    """Bytes in decimal units with three digits: 1.71 TB, 1,000 GB, 512 bytes."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:.0f} bytes"


def format_duration(seconds: float) -> str:
    """Two units at most: 17 d 4 h, 2 min 5 s, 0.8 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= unit or parts:
            parts.append(f"{left // unit} {name}")
            left %= unit
    return " ".join(parts[:2])
