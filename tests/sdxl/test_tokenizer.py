"""Token ids are those of the release's trainer: transformers' slow CLIP tokenizer with ftfy.

clip_token_ids.json was made once by hand, in an environment of its own with transformers 4.36.2, ftfy 6.1.1 and no
torch: `CLIPTokenizer(vocab, merges)` of CLIP's real files (merges.txt with sha256 9fd691f7…, 49,408 tokens) gave the
ids of each text, `add_special_tokens=False`. Of the files the table keeps the bytes' symbols and the merges that these
texts use, with their real ids and in their real order. In the same environment the ids of 16,000 random ASCII texts and
6,000 with other characters were compared with ours, for CLIP's files and the miniature's: all equal.
"""

import json
from pathlib import Path

import ftfy
import pytest
from hypothesis import given, strategies
from transformers import CLIPTokenizer

from kohaku_delta.errors import UserError
from kohaku_delta.sdxl.tokenizer import ClipTokenizer, is_plain

TABLE = json.loads((Path(__file__).parent / "clip_token_ids.json").read_text())
MINIATURE = "data/tokenizer/vocab.json", "data/tokenizer/merges.txt"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(TABLE["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *TABLE["merges"]]) + "\n")
    return ClipTokenizer(folder / "vocab.json", folder / "merges.txt")


@pytest.mark.parametrize(
    "text, ids", TABLE["texts"], ids=lambda value: ascii(value)[:40] if isinstance(value, str) else ""
)
def test_ids_are_those_of_the_slow_tokenizer_with_ftfy(clip, text, ids):
    assert clip.encode(text) == ids


def test_an_exclamation_mark_is_no_padding(clip):
    assert clip.encode("love live!")[-1] == TABLE["vocab"]["!</w>"] == 256


@given(strategies.text(strategies.characters(min_codepoint=32, max_codepoint=126), max_size=80))
def test_printable_ascii_is_tokenised_as_by_the_fast_tokenizer(text):
    ours, theirs = ClipTokenizer(*MINIATURE), CLIPTokenizer(vocab=MINIATURE[0], merges=MINIATURE[1])
    if "<|" not in text and "&" not in text:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@given(
    strategies.text(max_size=60),
    strategies.text(strategies.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&"), max_size=60),
)
def test_what_is_called_plain_is_left_alone_by_ftfy(any_text, ascii_text):
    assert is_plain(ascii_text)
    for text in (any_text, ascii_text):
        assert not is_plain(text) or ftfy.fix_text(text) == text


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="are not a CLIP tokenizer"):
        ClipTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(UserError, match="does not exist"):
        ClipTokenizer(tmp_path / "none.json", tmp_path / "merges.txt")
