"""Chunked Kimi delta attention in torch, differentiable: the training-time form of the KDA recurrence.

Per head, with state S [Dk, Dv] and log-gate g (any value <= 0, unbounded below):

    S <- diag(exp g) S;   d = beta (v - S'k);   S <- S + k d';   o = S'q

Source: the Kimi Linear technical report (chunkwise form with the WY representation). Inside a block of
`BLOCK` tokens the decay is computed for each pair; between blocks it is split at the later block's start. Every
exponent is therefore a sum of log-gates, never the negative of one, and no factor exceeds 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 64
BLOCK = 8
IN_CACHE = 16  # blocks whose pairwise decay is computed at once


class _BlockPairs(torch.autograd.Function):
    """a[m, i, j] = sum_d x[m, i, d] k[j, d] exp(G[i, d] - G[j, d]) for i >= j, 0 above the diagonal.

    Batched over leading n: x [n, 2, B, D], k [n, B, D], G [n, B, D] -> [n, 2, B, B]. The backward pass is
    written out because the [B, B, D] decay is by far the largest tensor of the model: with
    X = dL/da summed over m, dG[i] = sum_m x dx (as a row) - k dk (as a column).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, k, gate)
        out = x.new_empty(*x.shape[:3], k.shape[-2])
        for part in _slices(len(k)):
            pairs = _pair_decay(gate[part]).mul_(k[part, None])
            out[part] = torch.matmul(pairs, x[part].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, gate = ctx.saved_tensors
        dx, dk, dgate = torch.empty_like(x), torch.empty_like(k), torch.empty_like(gate)
        for part in _slices(len(k)):
            decay = _pair_decay(gate[part])  # recomputed: cheaper than keeping it
            da = grads[0][part].permute(0, 2, 1, 3)  # [n, i, m, j]
            rows = x[part].permute(0, 2, 1, 3)
            d_rows = torch.matmul(da, decay * k[part, None])  # [n, i, m, d]
            dk[part] = torch.matmul(da.transpose(-1, -2), rows).mul_(decay).sum(1)
            dx[part] = d_rows.permute(0, 2, 1, 3)
            dgate[part] = (rows * d_rows).sum(2) - k[part] * dk[part]
        return dx, dk, dgate


def _slices(count: int) -> list[slice]:
    """Slices that are small enough for the pairwise decay of one to stay in the cache."""
    return [slice(start, start + IN_CACHE) for start in range(0, count, IN_CACHE)]


def _pair_decay(gate: Tensor) -> Tensor:
    """[n, B, D] -> exp(G[i] - G[j]) as [n, B, B, D], zero for j > i."""
    above = torch.ones(gate.shape[1], gate.shape[1], dtype=torch.bool).triu(1)[..., None]
    return (gate[:, :, None] - gate[:, None]).masked_fill_(above, -torch.inf).exp_()


def kda_chunked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the final state of the recurrence above, from a zero state.

    q, k: [B, H, T, Dk], already normalised and q scaled; v: [B, H, T, Dv]; gate: [B, H, T, Dk] log-gates;
    beta: [B, H, T]; any T >= 1, one floating dtype. Returns o [B, H, T, Dv] and S [B, H, Dk, Dv].
    """
    batch, heads, length, key_dim = k.shape
    value_dim = v.shape[-1]
    chunk = min(CHUNK, -(-length // BLOCK) * BLOCK)
    pad = -length % chunk
    if pad:  # tokens with k = 0, beta = 0 and no decay do not change the state
        q, k, v, gate = (torch.nn.functional.pad(t, (0, 0, 0, pad)) for t in (q, k, v, gate))
        beta = torch.nn.functional.pad(beta, (0, pad))
    chunks = (length + pad) // chunk
    shape = (batch * heads * chunks, chunk)
    q, k, gate = (t.reshape(*shape, key_dim) for t in (q, k, gate))
    v, beta = v.reshape(*shape, value_dim), beta.reshape(*shape, 1)

    total = gate.cumsum(1)  # inclusive
    pairs = _decayed_products(torch.stack((k, q), 1), k, gate, total)
    delta = beta * pairs[:, 0].tril(-1) + torch.eye(chunk, dtype=k.dtype)
    decayed = total.exp()
    solved = torch.linalg.solve_triangular(
        delta, torch.cat((beta * v, beta * k * decayed), -1), upper=False, unitriangular=True
    )
    value, erase = solved.split((value_dim, key_dim), -1)
    last = total[:, -1:]
    per_chunk = (value, erase, q * decayed, pairs[:, 1], k * (last - total).exp(), last.exp().transpose(1, 2))
    state = k.new_zeros(batch * heads, key_dim, value_dim)
    outputs = []
    steps = zip(*(t.view(batch * heads, chunks, *t.shape[1:]).unbind(1) for t in per_chunk), strict=True)
    for c_value, c_erase, c_query, c_pairs, c_key, c_decay in steps:
        d = c_value - c_erase @ state
        outputs.append(c_query @ state + c_pairs @ d)
        state = c_decay * state + c_key.transpose(1, 2) @ d
    o = torch.cat(outputs, 1).view(batch, heads, chunks * chunk, value_dim)
    return o[:, :, :length], state.view(batch, heads, key_dim, value_dim)


def _decayed_products(x: Tensor, k: Tensor, gate: Tensor, total: Tensor) -> Tensor:
    """sum_d x[i, d] k[j, d] exp(G[i, d] - G[j, d]) for all i >= j of a chunk; zero above the diagonal.

    x: [n, 2, C, D]; k, gate, total (G, the inclusive sum of gate): [n, C, D]. Returns [n, 2, C, C].
    """
    n, _, chunk, dim = x.shape
    blocks = chunk // BLOCK
    inner = _BlockPairs.apply(  # type: ignore[no-untyped-call]
        x.view(n, 2, blocks, BLOCK, dim).transpose(1, 2).reshape(n * blocks, 2, BLOCK, dim),
        k.reshape(n * blocks, BLOCK, dim),
        total.reshape(n * blocks, BLOCK, dim),
    ).view(n, blocks, 2, BLOCK, BLOCK)
    rows = []
    for b in range(blocks):
        start, end = b * BLOCK, (b + 1) * BLOCK
        parts = [inner[:, b]]
        if b:
            offset = (total[:, start] - gate[:, start])[:, None]  # G just before this block
            left = x[:, :, start:end] * (total[:, start:end] - offset).exp()[:, None]
            right = k[:, :start] * (offset - total[:, :start]).exp()
            parts.insert(0, left @ right.transpose(1, 2)[:, None])
        if end < chunk:
            parts.append(x.new_zeros(n, 2, BLOCK, chunk - end))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, 2)
