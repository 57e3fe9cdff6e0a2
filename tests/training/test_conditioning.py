"""Chunks, states and pooled output against a literal reading of sd-scripts and transformers' own projection."""

import pytest
import torch
from transformers import CLIPTokenizer

import tiny_sdxl
from kohaku_delta import numerics
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import conditioning

VOCAB, MERGES = "data/tokenizer/vocab.json", "data/tokenizer/merges.txt"
TEXTS = ["", "1girl", "1girl, solo, " + "red body, circle, smile, " * 3, "circle, red body, big, " * 12, "star, " * 200]


def sd_scripts(tokenizer, text, length, pad):
    """get_input_ids of sd-scripts v0.8.3 for this max_token_length (75: none), with padding spelled out."""
    ids = tokenizer(text, truncation=True, max_length=length + 2)["input_ids"]
    ids = torch.tensor(ids + [pad] * (length + 2 - len(ids)))
    rows = []
    if length + 2 <= 77:
        return ids[None]
    for i in range(1, length + 2 - 77 + 2, 75):
        row = torch.cat([ids[:1], ids[i : i + 75], ids[-1:]])
        if pad != tokenizer.eos_token_id:
            if row[-2] != tokenizer.eos_token_id and row[-2] != pad:
                row[-1] = tokenizer.eos_token_id
            if row[1] == pad:
                row[1] = tokenizer.eos_token_id
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("second", [False, True])
def test_three_chunks_of_75_as_sd_scripts_cuts_them(text, second):
    ours = ClipTokenizer(VOCAB, MERGES)
    pad = 0 if second else ours.eos_token_id
    rows = conditioning.token_chunks(ours, text, 225, pad)
    assert rows.shape == (3, 77)
    assert torch.equal(rows, sd_scripts(CLIPTokenizer(vocab=VOCAB, merges=MERGES), text, 225, pad))


class Numbers:
    """A tokenizer whose texts are token ids, for both readings."""

    bos_token_id, eos_token_id = 998, 999

    def encode(self, text):
        return [int(word) for word in text.split()]

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [998, *self.encode(text)[: max_length - 2], 999]}


@pytest.mark.parametrize("length", [75, 150, 225])
@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226, 300])
def test_a_token_that_is_also_the_pad_is_treated_as_sd_scripts_treats_it_at_either_end_of_a_chunk(length, count):
    tokenizer = Numbers()
    for zeros in ((), (0,), (74,), (75,), (149,), (150,), (224,), range(300)):
        text = " ".join("0" if place in zeros else "7" for place in range(count))
        for pad in (0, 999):
            rows = conditioning.token_chunks(tokenizer, text, length, pad)
            assert torch.equal(rows, sd_scripts(tokenizer, text, length, pad)), (zeros, pad)


def test_states_of_three_chunks_join_to_227_positions():
    states = torch.arange(2 * 3 * 77.0).reshape(6, 77, 1)
    joined = conditioning.join_chunks(states, 3)
    assert joined.shape == (2, 227, 1)
    first = states[:3, :, 0]
    assert joined[0, :, 0].tolist() == [first[0, 0], *first[0, 1:76], *first[1, 1:76], *first[2, 1:76], first[2, 76]]


def test_context_is_penultimate_and_pooled_is_the_first_chunks_projection(tmp_path):
    numerics.enforce()
    tiny_sdxl.write(tmp_path / "toy.safetensors", 1)
    models = model_loading.load(tmp_path / "toy.safetensors", tiny_sdxl.MODEL, parts=("te1", "te2"))
    ids = torch.full((2, 3, 77), 999)
    ids[:, :, 0] = 998
    ids[:, :, 1:40] = torch.arange(1, 40)
    ids[1, 0, 1:40] += 100
    context, pooled = conditioning.encode(models["te1"], models["te2"], ids, ids, 999)
    assert context.shape == (2, 227, 112)
    second = models["te2"](ids[:, 0], output_hidden_states=True)
    by_hand = second.last_hidden_state[:, 40] @ models["te2"].text_projection.weight.T
    assert torch.allclose(pooled, by_hand, atol=1e-5)
    assert torch.allclose(context[:, :76, 48:], second.hidden_states[-2][:, :76], atol=1e-5)
    layers = models["te1"](ids[:, 0], output_hidden_states=True).hidden_states
    assert len(layers) == 4 and torch.allclose(context[:, :76, :48], layers[2][:, :76], atol=1e-5)
    assert torch.allclose(pooled, second.text_embeds, atol=1e-5), "transformers takes the first end token too"
    everything = models["te2"](ids.flatten(0, 1), output_hidden_states=True).hidden_states[-2].reshape(2, 3, 77, 64)
    for chunk in range(3):
        assert torch.allclose(context[:, 1 + 75 * chunk : 76 + 75 * chunk, 48:], everything[:, chunk, 1:76], atol=1e-5)
    assert torch.allclose(context[:, -1, 48:], everything[:, 2, 76], atol=1e-5)
