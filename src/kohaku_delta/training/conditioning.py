"""Invariant: a caption reaches the U-Net as sd-scripts v0.8.3 lets it: chunks of 75 tokens, penultimate states, first
chunk's pooled output.

225 tokens: tokenised to 227, cut into [1:76], [76:151], [151:226], each between the begin and the end token; text
encoder 1 pads with the end token, text encoder 2 with id 0. The states are joined again to 227 positions.
"""

import torch
import torch.nn.functional as F

from kohaku_delta.sdxl.tokenizer import ClipTokenizer

CHUNK = 75


def token_chunks(tokens: ClipTokenizer, text: str, length: int, pad: int) -> torch.Tensor:
    """Token ids (length / 75, 77), int64. `length` is 75, 150 or 225; `pad` fills what the caption leaves empty.

    As in sd-scripts: where the pad is the end token every row is begin … end; where it differs, a row that is full ends
    with the end token, one that is not keeps its pads, and an empty one is begin, end, pad …
    """
    begin, end = tokens.bos_token_id, tokens.eos_token_id
    body = tokens.encode(text)[:length]
    whole = [begin, *body, end] + [pad] * (length - len(body))
    rows = []
    for start in range(1, length + 1, CHUNK):
        row = [begin, *whole[start : start + CHUNK], whole[-1]]
        if pad != end:
            if row[-2] not in (end, pad):
                row[-1] = end
            if row[1] == pad:
                row[1] = end
        rows.append(row)
    return torch.tensor(rows)


def join_chunks(states: torch.Tensor, count: int) -> torch.Tensor:
    """(B · chunks, 77, D) → (B, 75 · chunks + 2, D): the first begin, the inner tokens of every chunk, the last end."""
    batch = states.shape[0] // count
    states = states.reshape(batch, count, *states.shape[1:])
    inner = states[:, :, 1:-1].reshape(batch, -1, states.shape[-1])
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode(
    te1, te2, ids1: torch.Tensor, ids2: torch.Tensor, end_token: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids: (B, chunks, 77) each. Returns the context (B, 75 · chunks + 2, D1 + D2) and the pooled output (B, P).

    Context: hidden_states[-2] of both encoders without the final layer norm. Pooled: text encoder 2's last state after
    its final layer norm, at the first end token of the first chunk, projected: x · P, or x · Pᵀ if `transposed` (the
    release's trainer; P is square).
    """
    count = ids1.shape[1]
    first = te1(ids1.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    out = te2(ids2.flatten(0, 1), output_hidden_states=True)
    position = (ids2[:, 0] == end_token).int().argmax(dim=1)
    last = out.last_hidden_state[::count]
    weight = te2.text_projection.weight  # Pᵀ: transformers keeps a linear layer's weight (outputs, inputs)
    pooled = F.linear(last[torch.arange(len(last), device=last.device), position], weight.T if transposed else weight)
    return torch.cat([join_chunks(first, count), join_chunks(out.hidden_states[-2], count)], dim=-1), pooled
