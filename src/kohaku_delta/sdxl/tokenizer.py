"""CLIP's tokenizer as the release's trainer had it: the slow one of transformers 4.36, which cleaned every text with
ftfy 6.1.1.

text → pieces between literal special tokens → ftfy → whitespace → lower case → words → bytes → byte-pair encoding. ftfy
replaces full-width letters, curly quotes, ligatures and HTML entities, so they become other tokens; the fast tokenizers
do not. Printable ASCII without `&` stays as it is.
"""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
from tokenizers import models

from kohaku_delta.errors import UserError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.compile(f"({regex.escape(BEGIN)}|{regex.escape(END)})")
WORD = regex.compile(
    rf"{regex.escape(BEGIN)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
SPACE = regex.compile(r"\s+")


def byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes in GPT-2's and CLIP's vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


SYMBOLS = byte_symbols()


def is_plain(text: str) -> bool:
    """Whether ftfy leaves the text as it is in any context: printable ASCII without `&`."""
    return text.isascii() and text.isprintable() and "&" not in text


class ClipTokenizer:
    """A tokenizer from CLIP's vocab.json and merges.txt. `len()` is the number of its tokens."""

    def __init__(self, vocab: Path, merges: Path):
        for path in (vocab, merges):
            if not Path(path).is_file():
                raise UserError(
                    f"{path} does not exist; the tokenizer needs vocab.json and merges.txt. Run the download stage."
                )
            sys.audit("open", os.fspath(path), "r", os.O_RDONLY)  # the library opens it in Rust, unseen by the sandbox
        try:
            self.ids: dict[str, int] = json.loads(Path(vocab).read_text(encoding="utf-8"))
            self.bos_token_id, self.eos_token_id = self.ids[BEGIN], self.ids[END]
            self.model = models.BPE.from_file(
                str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise UserError(
                f"{vocab} and {merges} are not a CLIP tokenizer that can be read ({' '.join(str(error).split())}). Run "
                "the download stage again."
            ) from None
        self._cached_word = lru_cache(maxsize=1 << 16)(self.word)

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without the begin and end tokens."""
        found: list[int] = []
        for piece in SPECIAL.split(text):
            if piece in (BEGIN, END):
                found.append(self.ids[piece])
                continue
            cleaned = SPACE.sub(" ", piece if is_plain(piece) else ftfy.fix_text(piece)).strip().lower()
            for word in WORD.findall(cleaned):
                found += self._cached_word(word)
        return found

    def word(self, word: str) -> list[int]:
        """The token ids of one word without spaces."""
        if word in (BEGIN, END):
            return [self.ids[word]]
        return [token.id for token in self.model.tokenize("".join(SYMBOLS[byte] for byte in word.encode("utf-8")))]
