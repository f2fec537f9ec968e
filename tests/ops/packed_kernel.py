"""What cuDNN's packed attention computes, in jax.numpy, from the operands that XLA hands it.

After the graph that XLA builds (xla/stream_executor/cuda/cuda_dnn.cc): document r has `q_lengths[r]` queries from element
`q_offsets[r]` of q on, a token being H N elements; keys likewise, a token being K N elements. Masks go by the place in the
document, from its first query and key. Statistics are [R, H, L], padded. What no document covers is not written: NaN here.
"""

import jax
import jax.numpy as jnp


class _Side:
    """Where each token of a flat [T] lies among the documents: slot (-1 outside) and place."""

    def __init__(self, x_BLHN, lengths, offsets):
        batch, self.length, heads, width = x_BLHN.shape
        self.count = lengths.size
        assert lengths.shape == (batch, self.count // batch)
        assert offsets.shape == (batch, self.count // batch + 1)
        assert lengths.dtype == offsets.dtype == jnp.int32
        token = heads * width
        lengths, offsets = lengths.reshape(-1), offsets.reshape(-1)[: self.count + 1]
        self.broken = jnp.any(offsets % token != 0) | jnp.any(lengths < 0) | jnp.any(lengths > self.length)
        self.broken |= jnp.any(offsets[1:] < offsets[:-1] + lengths * token) | (offsets[-1] != x_BLHN.size)
        self.starts, self.lengths = offsets[:-1] // token, lengths
        index = jnp.arange(batch * self.length)
        within_RT = (index >= self.starts[:, None]) & (index < (self.starts + lengths)[:, None])
        self.slot = jnp.where(within_RT.any(0), within_RT.argmax(0), -1)
        self.place = index - self.starts[self.slot]

    def written(self, x_THN):
        good = (self.slot >= 0) & ~self.broken
        return jnp.where(good[:, None, None], x_THN, jnp.nan)


def _probabilities(q, k, queries, keys, settings, logsumexp_HT=None):
    """Scores and softmax weights [H, T, S], and the logsumexp [H, T]."""
    group = q.shape[-2] // k.shape[-2]
    flat_q, flat_k = q.reshape(-1, *q.shape[2:]), jnp.repeat(k.reshape(-1, *k.shape[2:]), group, axis=1)
    scores = settings["scale"] * jnp.einsum("THN,SHN->HTS", flat_q, flat_k)
    seen = (queries.slot[:, None] == keys.slot) & (queries.slot[:, None] >= 0)
    distance = queries.place[:, None] - keys.place
    if settings["mask_type"].name == "CAUSAL":
        seen &= distance >= 0
    if settings["sliding_window_length"]:
        seen &= distance < settings["sliding_window_length"]
    scores = jnp.where(seen, scores, -jnp.inf)
    if logsumexp_HT is None:
        logsumexp_HT = jax.nn.logsumexp(scores, axis=-1)
    return jnp.where(seen, jnp.exp(scores - jnp.where(seen.any(-1), logsumexp_HT, 0)[..., None]), 0), logsumexp_HT


def forward(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *pages, **settings):
    """(o, statistics)"""
    assert bias.size == 0
    assert [page.size for page in pages] == [0, 0]
    queries, keys = _Side(q, q_lengths, q_offsets), _Side(k, k_lengths, k_offsets)
    weights, logsumexp_HT = _probabilities(q, k, queries, keys, settings)
    values = jnp.repeat(v.reshape(-1, *v.shape[2:]), q.shape[2] // v.shape[2], axis=1)
    o = queries.written(jnp.einsum("HTS,SHN->THN", weights, values))
    places = jnp.arange(queries.length)
    tokens_RL = jnp.minimum(queries.starts[:, None] + places, len(o) - 1)
    used_RL = places < queries.lengths[:, None]
    statistics = jnp.where(used_RL[:, None], logsumexp_HT[:, tokens_RL].transpose(1, 0, 2), jnp.nan)
    return o.reshape(q.shape).astype(q.dtype), statistics.astype(jnp.float32)


def backward(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *rest, **settings):
    """(dq, dk, dv)"""
    *_, statistics, o, do = rest
    queries, keys = _Side(q, q_lengths, q_offsets), _Side(k, k_lengths, k_offsets)
    assert statistics.shape == (queries.count, q.shape[2], q.shape[1])
    logsumexp_HT = statistics[queries.slot, :, jnp.clip(queries.place, 0, queries.length - 1)].T
    weights, _ = _probabilities(q, k, queries, keys, settings, logsumexp_HT)
    group = q.shape[2] // k.shape[2]
    flat_q, flat_o, flat_do = (jnp.nan_to_num(x.reshape(-1, *x.shape[2:])) for x in (q, o, do))
    flat_k, flat_v = (jnp.repeat(x.reshape(-1, *x.shape[2:]), group, axis=1) for x in (k, v))
    d_weights = jnp.einsum("THN,SHN->HTS", flat_do, flat_v)
    d_scores = weights * (d_weights - (flat_do * flat_o).sum(-1).T[..., None]) * settings["scale"]

    def per_kv_head(x_SHN):
        return keys.written(x_SHN.reshape(len(x_SHN), -1, group, x_SHN.shape[-1]).sum(2))

    dq = queries.written(jnp.einsum("HTS,SHN->THN", d_scores, flat_k))
    dk = per_kv_head(jnp.einsum("HTS,THN->SHN", d_scores, flat_q))
    dv = per_kv_head(jnp.einsum("HTS,THN->SHN", weights, flat_do))
    return [g.reshape(x.shape).astype(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v))]


def instead_of_cudnn(monkeypatch):
    """Let attention by cuDNN within documents run anywhere; return the list of calls: (name, settings, length of rows)."""
    from jaxtrain.jax_private import fused_attention
    from jaxtrain.ops import attention_packed

    calls = []

    def told(name, function):
        def call(*operands, **settings):
            calls.append((name, settings, operands[0].shape[1]))
            return tuple(function(*operands, **settings))

        return call

    monkeypatch.setattr(fused_attention(), "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention_packed, "forward_kernel", told("forward", forward))
    monkeypatch.setattr(attention_packed, "backward_kernel", told("backward", backward))
    return calls
