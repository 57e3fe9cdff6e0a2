"""Invariant: a caption's length is what the trainer's tokenizer makes of it, before anything is shuffled or dropped; no caption is tokenised for it.

CLIP's tokenizer never joins what a space divides. So a caption's tokens are those of its words, each with the comma behind it (which may
join the punctuation that it follows), and the last one without: every distinct word is tokenised once.
"""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from kohaku_delta.hermetic import watch
from kohaku_delta.refusal import Refusal

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer(vocab: Path, merges: Path) -> Tokenizer:
    """CLIP's tokenizer, without begin and end."""
    for path in (vocab, merges):
        watch.opening(path)
    try:
        model = models.BPE.from_file(str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    except Exception as error:  # the library raises bare Exceptions
        raise Refusal(f"{vocab} and {merges} are not a CLIP tokenizer that can be read ({error}). Run the download stage again.") from None
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def counts(made: Tokenizer, texts: list[str]) -> np.ndarray:
    """Tokens of each text (int32)."""
    return np.array([len(each) for each in made.encode_batch_fast(texts, add_special_tokens=False)], np.int32)
