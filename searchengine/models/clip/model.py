"""CLIP: two transformers that put images and texts into one space. Inference only.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
https://arxiv.org/abs/2103.00020. The image side is the ViT of Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929)
with one more layer norm before the first block; the text side is the decoder of GPT-2.

Both are written over *rows*: the tokens of a whole batch, one below the other, whatever sequence each belongs to. All
but attention acts on a token by itself, so that sequences of unequal length need no padding. Texts that begin alike
share the rows of their beginning: attention is causal there, hence a token's row depends on what stands before it and
on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchengine.models.clip.architecture import QUICK_GELU_SLOPE, Activation, ClipConfig
from searchengine.models.layers import FloatArray


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of Hendrycks and Gimpel 2016 (https://arxiv.org/abs/1606.08415) that OpenAI trained with."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

# From the queries, keys and values of all rows, each (rows, width), to what attention gives the rows that go on.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(n, t, w) -> (n, heads, t, w / heads)"""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class Linear(nn.Linear):
    """Filled from a checkpoint, never at random, which takes time and half of torch's modules."""

    def reset_parameters(self) -> None:
        pass


class Block(nn.Module):
    """A residual attention block, normalised before each half."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.widen = Linear(width, 4 * width)
        self.narrow = Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """x: (r, w). The result holds all rows, or those with the numbers `rows`, which `attend` must give too."""
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)  # (r, w) each
        x = (x if rows is None else x[rows]) + self.out(attend(q, k, v))  # (r', w)
        return cast(Tensor, x + self.narrow(self.activation(self.widen(self.norm_2(x)))))  # (r', w)


class ImageTransformer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.image.width
        self.patch_size, self.heads = config.patch_size, config.image.heads
        self.patches: nn.Module = Linear(config.patch_size**2 * 3, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + config.patches, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.activation) for _ in range(config.image.layers))
        self.norm_post = nn.LayerNorm(width)
        self.projection = Linear(width, config.dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (n, s, s, 3), RGB, normalised (see `preprocess`). Returns (n, dim), not normalised."""
        n, side, p = len(pixels), pixels.shape[1] // self.patch_size, self.patch_size
        x = pixels.view(n, side, p, side, p, 3).transpose(2, 3).reshape(n, side * side, p * p * 3)
        x = self.patches(x)  # (n, patches, w)
        x = torch.cat([self.class_token.expand(n, 1, -1), x], 1) + self.positions  # (n, t, w)
        x = self.norm_pre(x).view(-1, x.shape[-1])  # (n t, w)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, self._attend(n))
        # Of the last block only the class token is read, so it alone asks and goes on.
        first = torch.arange(0, len(x), len(x) // n, device=x.device)
        x = last(x, self._attend(n, only_first=True), first)  # (n, w)
        return cast(Tensor, self.projection(self.norm_post(x)))

    def _attend(self, n: int, *, only_first: bool = False) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (split_heads(x.view(n, -1, x.shape[-1]), self.heads) for x in (q, k, v))
            q = q[:, :, :1] if only_first else q  # (n, heads, t, w / heads)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)

        return attend


@dataclass(frozen=True)
class Prompts:
    """Token sequences laid out in rows, each beginning that several share only once.

    tokens, places: int64 (r,), the token of each row and its place in its text. paths: int64 (n, longest), the rows of
    each text from its first token to its last, which is repeated. lengths: int64 (n,). sources: int64 (r,), where each
    row first comes in the flattened paths.
    """

    tokens: Tensor
    places: Tensor
    paths: Tensor
    lengths: Tensor
    sources: Tensor

    @classmethod
    def pack(cls, texts: Sequence[Sequence[int]]) -> Prompts:
        longest = max(map(len, texts))
        rows: dict[tuple[int, int], int] = {}  # (row of the token before, token) -> row
        places: list[int] = []
        sources: list[int] = []
        paths: list[list[int]] = []
        for number, text in enumerate(texts):
            path: list[int] = []
            row = -1
            for place, token in enumerate(text):
                row = rows.setdefault((row, token), len(rows))
                if row == len(places):
                    places.append(place)
                    sources.append(number * longest + place)
                path.append(row)
            paths.append(path)
        return cls(
            tokens=torch.tensor([token for _, token in rows]),
            places=torch.tensor(places),
            paths=torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths]),
            lengths=torch.tensor([len(path) for path in paths]),
            sources=torch.tensor(sources),
        )

    def spread(self, x: Tensor) -> Tensor:
        """(r, w) -> (n, longest, w): each text with its own copy of the rows that it shares."""
        return x[None] if len(self.paths) == 1 else x[self.paths]

    def to(self, device: torch.device) -> Prompts:
        tensors = (self.tokens, self.places, self.paths, self.lengths, self.sources)
        return Prompts(*(x.to(device) for x in tensors))


class TextTransformer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.text.width
        self.heads = config.text.heads
        self.tokens = nn.Parameter(torch.zeros(config.vocabulary, width))
        self.positions = nn.Parameter(torch.zeros(config.context, width))
        self.blocks = nn.ModuleList(Block(width, config.activation) for _ in range(config.text.layers))
        self.norm_post = nn.LayerNorm(width)
        self.projection = Linear(width, config.dim, bias=False)

    def forward(self, prompts: Prompts) -> Tensor:
        """Returns (n, dim), not normalised: what the last token of each text, its end-of-text, has gathered."""
        x = self.tokens[prompts.tokens] + self.positions[prompts.places]  # (r, w)
        *blocks, last = self.blocks
        attend = self._attend_causally(prompts)
        for block in blocks:
            x = block(x, attend)
        ends = prompts.paths[:, -1]  # (n,)
        x = last(x, self._attend_from_the_end(prompts), ends)  # (n, w)
        return cast(Tensor, self.projection(self.norm_post(x)))

    def _attend_causally(self, prompts: Prompts) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (split_heads(prompts.spread(x), self.heads) for x in (q, k, v))  # (n, heads, longest, w / heads)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if len(prompts.paths) == 1:
                return y[0].transpose(0, 1).flatten(1)  # (r, w)
            # A row that several texts share comes out the same for each of them; the first one's is taken.
            return y.transpose(1, 2).flatten(2).flatten(0, 1)[prompts.sources]  # (r, w)

        return attend

    def _attend_from_the_end(self, prompts: Prompts) -> Attend:
        longest = prompts.paths.shape[1]
        # What a path repeats at its end is not part of its text.
        inside = torch.arange(longest, device=prompts.lengths.device) < prompts.lengths[:, None]  # (n, longest)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = split_heads(q[prompts.paths[:, -1:]], self.heads)  # (n, heads, 1, w / heads)
            k, v = (split_heads(prompts.spread(x), self.heads) for x in (k, v))  # (n, heads, longest, w / heads)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None])
            return y.transpose(1, 2).flatten(1)  # (n, w)

        return attend


Tower = TypeVar("Tower", ImageTransformer, TextTransformer)


def filled(tower: type[Tower], config: ClipConfig, tensors: Mapping[str, FloatArray]) -> Tower:
    """A tower on the CPU, in float32, with the weights of a checkpoint, by the names of `config`'s shapes."""
    with torch.device("meta"):
        network = tower(config)
    # What is mapped from a file cannot be written to, so it is copied; anything else is taken as it lies.
    state = {name: torch.from_numpy(np.require(tensor, requirements=["C", "W"])) for name, tensor in tensors.items()}
    network.load_state_dict(state, assign=True)
    return cast(Tower, cast(nn.Module, network).eval().requires_grad_(False))
