"""Text conditioning as in sd-scripts v0.8.3: chunks of 75 tokens, penultimate states, pooled output of the first chunk.

225 tokens: the caption is tokenized to 227 ids and cut into [1:76], [76:151], [151:226], each between begin and end
token. Text encoder 1 pads with the end token, text encoder 2 with id 0. The states are joined to 227 positions.
"""

import torch
import torch.nn.functional as F

from kohaku_delta.sdxl.tokenizer import ClipTokenizer

CHUNK = 75


def token_chunks(tokenizer: ClipTokenizer, text: str, length: int, pad: int) -> torch.Tensor:
    """Token ids (length / 75, 77), int64. `length` is 75, 150 or 225; `pad` fills what the caption leaves empty.

    As in sd-scripts: if `pad` is the end token, every row is begin … end. Otherwise a full row ends with the end token,
    a partly filled one keeps its pads, and an empty one is begin, end, pad … A single row is not changed.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    body = tokenizer.encode(text)[:length]
    ids = [begin, *body, end] + [pad] * (length - len(body))
    rows = []
    for start in range(1, length + 1, CHUNK):
        row = [begin, *ids[start : start + CHUNK], ids[-1]]
        if pad != end and length > CHUNK:
            if row[-2] not in (end, pad):
                row[-1] = end
            if row[1] == pad:
                row[1] = end
        rows.append(row)
    return torch.tensor(rows)


def token_ids(
    tokenizers: tuple[ClipTokenizer, ClipTokenizer], texts: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of B captions for text encoders 1 and 2: (B, length / 75, 77) int64 each."""
    first, second = tokenizers
    return (
        torch.stack([token_chunks(first, text, length, first.eos_token_id) for text in texts]),
        torch.stack([token_chunks(second, text, length, 0) for text in texts]),
    )


def join_chunks(states: torch.Tensor, chunks: int) -> torch.Tensor:
    """(B · chunks, 77, D) → (B, 75 · chunks + 2, D): the first begin, the inner tokens of every chunk, the last end."""
    batch = states.shape[0] // chunks
    states = states.reshape(batch, chunks, *states.shape[1:])
    inner = states[:, :, 1:-1].reshape(batch, -1, states.shape[-1])
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode(
    te1, te2, ids1: torch.Tensor, ids2: torch.Tensor, end_token: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (B, 75 · chunks + 2, D1 + D2) and pooled output (B, P) of token ids, (B, chunks, 77) each.

    Context: hidden_states[-2] of both encoders, without the final layer norm. Pooled: text encoder 2's last state after
    its final layer norm, at the first end token of the first chunk, projected: x · P, or x · Pᵀ if `transposed` (as in
    the release's trainer; P is square).
    """
    chunks = ids1.shape[1]
    states1 = te1(ids1.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    out2 = te2(ids2.flatten(0, 1), output_hidden_states=True)
    end_position = (ids2[:, 0] == end_token).int().argmax(dim=1)
    last = out2.last_hidden_state[::chunks]  # of each caption's first chunk
    weight = te2.text_projection.weight  # Pᵀ: a linear layer's weight is (outputs, inputs)
    x = last[torch.arange(len(last), device=last.device), end_position]
    pooled = F.linear(x, weight.T if transposed else weight)
    return torch.cat([join_chunks(states1, chunks), join_chunks(out2.hidden_states[-2], chunks)], dim=-1), pooled
