"""A small transformer of random weights, whose keys and values the examples keep in the pool.

What it answers means nothing; its keys and values are as real as those of any model: what was computed once can stand
for the same tokens anywhere, and must give the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from kvpool import ModelSpec

VOCABULARY = 256
"""A token is a byte of text."""


class TinyModel(nn.Module):
    """A decoder of random weights.

    Its KV is a tensor of shape ``(layers, 2, tokens, heads, head_dim)``: keys and values of each layer.

    Parameters
    ----------
    seed
        Of the weights; the same seed gives the same model in every process.
    layers, heads, head_dim
        Its size.
    tokens_per_block
        How many tokens one block of the pool holds.
    """

    def __init__(
        self, seed: int = 0, *, layers: int = 2, heads: int = 4, head_dim: int = 32, tokens_per_block: int = 16
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.width = heads * head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, self.width)
            self.layers = nn.ModuleList(_Layer(heads, head_dim) for _ in range(layers))
            self.head = nn.Sequential(nn.RMSNorm(self.width), nn.Linear(self.width, VOCABULARY, bias=False))
        self.tokens_per_block = tokens_per_block
        # Two processes share KV exactly if their specs are equal, so the spec must name all that makes it differ.
        self.spec = ModelSpec(
            "tiny",
            revision=f"seed-{seed}",
            dtype=torch.float32,
            block_shape=self.kv_shape(tokens_per_block),
            tokens_per_block=tokens_per_block,
        )

    def kv_shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of the KV of so many tokens."""
        return (len(self.layers), 2, tokens, self.heads, self.head_dim)

    def kv_bytes(self, tokens: int) -> int:
        """Return the size of the KV of so many tokens."""
        return 4 * torch.Size(self.kv_shape(tokens)).numel()

    @torch.inference_mode()
    def embed(self, text: bytes) -> Tensor:
        """Return the embeddings of a text's tokens, ``(tokens, width)``."""
        embedded: Tensor = self.embedding(torch.tensor(list(text), dtype=torch.long))
        return embedded

    @torch.inference_mode()
    def forward(self, inputs: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Compute tokens that follow others.

        Parameters
        ----------
        inputs
            Embeddings, ``(tokens, width)``.
        past
            KV of all tokens before them, in order, in any number of pieces (blocks of the pool, for example).

        Returns
        -------
        tuple
            Logits, ``(tokens, VOCABULARY)``, and the KV of the tokens.
        """
        x = inputs + _positions(sum(kv.shape[2] for kv in past), *inputs.shape)
        computed = []
        for number, layer in enumerate(self.layers):
            x, kv = layer(x, [piece[number] for piece in past])
            computed.append(kv)
        return self.head(x), torch.stack(computed)


class _Layer(nn.Module):
    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        tokens = len(x)
        query, *key_value = self.query_key_value(self.norm(x)).view(tokens, 3, self.heads, self.head_dim).unbind(1)
        own = torch.stack(key_value)  # (2, tokens, heads, head_dim)
        key, value = torch.cat([*past, own], dim=1).transpose(1, 2)
        seen = torch.ones(tokens, key.shape[1], dtype=torch.bool).tril(key.shape[1] - tokens)
        attended = nn.functional.scaled_dot_product_attention(query.transpose(0, 1), key, value, attn_mask=seen)
        x = x + self.out(attended.transpose(0, 1).flatten(1))
        return x + self.mlp(x), own


def _positions(start: int, tokens: int, width: int) -> Tensor:
    """Return sinusoidal positions (Vaswani et al. 2017) of tokens ``start``, ``start + 1``, …"""
    rates = torch.exp(torch.arange(0, width, 2) * (-9.21034 / width))
    angles = torch.arange(start, start + tokens)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def block_hashes(text: bytes, tokens_per_block: int) -> list[bytes]:
    """Return the hashes of a text's full blocks; each covers its block and, through its parent's, all before it."""
    hashes: list[bytes] = []
    parent = b""
    for start in range(0, len(text) - tokens_per_block + 1, tokens_per_block):
        parent = blake2b(parent + text[start : start + tokens_per_block], digest_size=16).digest()
        hashes.append(parent)
    return hashes
