"""Trains the tokenizers; the same words give the same merges: the most frequent pair first, ties in sorted order.

CLIP's byte-level BPE: 256 byte symbols, the same with </w>, one symbol per merge, and the two special tokens at the
end. Trained on the captions' words.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex

from make_miniature.posts import Post
from make_miniature.words import META

SYMBOLS = 1000
CUT = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
SAID_ABOUT = {
    "masterpiece": 180,
    "best quality": 300,
    "great quality": 360,
    "good quality": 700,
    "normal quality": 700,
    "low quality": 400,
    "worst quality": 300,
    "newest": 1200,
    "recent": 700,
    "mid": 300,
    "early": 400,
    "old": 300,
    "safe": 1350,
    "sensitive": 1000,
    "nsfw": 600,
    "explicit": 240,
}


def bytes_to_symbols() -> dict[int, str]:
    """The printable character for every byte, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def words_of(posts: list[Post]) -> Counter:
    """The number of times that each piece of text (a tuple of symbols) occurs."""
    counts = Counter(SAID_ABOUT)
    for post in posts:
        for name, kind in post.tags:
            counts[name.replace("_", " ") if len(name) > 3 else name] += 1 if kind != META else 0
            counts[","] += 1
    symbols = bytes_to_symbols()
    pieces = Counter()
    for text, count in counts.items():
        for word in CUT.findall(text.lower()):
            spelt = [symbols[byte] for byte in word.encode()]
            pieces[(*spelt[:-1], spelt[-1] + "</w>")] += count
    return pieces


def learn(pieces: Counter, merges: int) -> list[tuple[str, str]]:
    found, words = [], dict(pieces)
    while len(found) < merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        words = {joined(word, best): count for word, count in words.items()}
    return found


def joined(word: tuple, pair: tuple) -> tuple:
    out, place = [], 0
    while place < len(word):
        if word[place : place + 2] == pair:
            out.append(pair[0] + pair[1])
            place += 2
        else:
            out.append(word[place])
            place += 1
    return tuple(out)


def write(posts: list[Post], folders: list[Path]) -> None:
    """vocab.json and merges.txt into each folder (SDXL's two tokenizers have the same)."""
    singles = list(bytes_to_symbols().values())
    vocabulary = singles + [symbol + "</w>" for symbol in singles]
    merges = learn(words_of(posts), SYMBOLS - len(vocabulary) - 2)
    vocabulary += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(
            json.dumps(
                {symbol: place for place, symbol in enumerate(vocabulary)}, ensure_ascii=False, separators=(",", ":")
            ),
            "utf-8",
            newline="\n",
        )
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), "utf-8", newline="\n"
        )
