"""Text generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.layers.cache import LayerCache


class LanguageModel(Protocol):
    """What generation needs of a model: `Transformer`, or one whose layers several processes hold."""

    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        ...

    def new_cache(self, batch_size: int, capacity: int) -> list[LayerCache]:
        """An empty key/value cache."""
        ...

    def next_logits(self, tokens: Tensor, cache: list[LayerCache] | None) -> Tensor:
        """Logits [V] of what follows `tokens` [1, S]."""
        ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eod_id: int | None = None,
    use_cache: bool = True,
) -> list[int]:
    """Continue a prompt, token by token.

    Args:
        model: any device and dtype.
        prompt_ids: at least one token id; a new document starts with the end-of-document token.
        max_new_tokens: stop after this many.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among the k likeliest tokens only; 0 is all.
        top_p: sample among the likeliest tokens that together have this probability; 1 is all.
        seed: same seed, same text.
        eod_id: stop when the model ends the document.
        use_cache: False recomputes the whole text for each token (slow; to check the cache against).

    Returns:
        The new token ids, without the prompt and without the end-of-document token.

    Raises:
        UserError: an argument out of its range, or text longer than the model has positions for.
    """
    _check_prompt(model, prompt_ids, max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, len(prompt_ids) + max_new_tokens) if use_cache else None
    ids = list(prompt_ids)
    pending = ids
    for _ in range(max_new_tokens):
        tokens = torch.tensor([pending if use_cache else ids], device=device)
        token = sample_token(model.next_logits(tokens, cache), temperature, top_k, top_p, generator)
        if token == eod_id:
            break
        ids.append(token)
        pending = [token]
    return ids[len(prompt_ids) :]


def sample_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw one token id from logits [V].

    The draw is by inverse cumulative probability, in float64 on the host, so that it takes one uniform number
    per token and does not depend on the device.
    """
    scores = logits.double().cpu()
    if temperature == 0:
        return int(scores.argmax())
    # Ordered by score, then by id: which of two equal tokens survives a cut must not be left to the sort.
    scores, ids = (scores / temperature).sort(descending=True, stable=True)
    if top_k:
        scores = scores[:top_k]
    probabilities = scores.softmax(0)
    cumulative = probabilities.cumsum(0)
    kept = max(1, int((cumulative - probabilities < top_p).sum()))
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[kept - 1]
    index = int(torch.searchsorted(cumulative[:kept], draw, right=True))
    return int(ids[min(index, kept - 1)])


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for a sampling setting outside its range."""
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} must not be negative; 0 takes the likeliest token")
    if top_k < 0:
        raise UserError(f"top_k={top_k} must not be negative; 0 samples from all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be in (0, 1]; 1 samples from all tokens")


def _check_prompt(model: LanguageModel, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    if not prompt_ids:
        raise UserError("the prompt is empty: start a new document with the end-of-document token")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} must not be negative")
    vocab_size = model.config.vocab_size
    strange = [i for i in prompt_ids if not 0 <= i < vocab_size]
    if strange:
        raise UserError(
            f"token id {strange[0]} of the prompt is not in the model's vocabulary of {vocab_size}"
        )
    limit = model.config.max_position_embeddings
    if len(prompt_ids) + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} need more than the "
            f"{limit} positions the model has: shorten the prompt or ask for at most "
            f"{max(0, limit - len(prompt_ids))} tokens"
        )
