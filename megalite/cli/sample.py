"""``megalite sample CHECKPOINT``: text that a model writes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megalite.cli.config_file import parse
from megalite.errors import ExitCode, UserError

if TYPE_CHECKING:
    from megalite.data.tokenize import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a prompt, or write a new document."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run directory (its newest checkpoint), checkpoint directory or Hugging Face folder."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    max_new_tokens: int = 128
    """Tokens to write at most; the model may end the document earlier."""
    temperature: float = 0.8
    """Divides the logits: below 1 more predictable, above 1 more varied, 0 always the likeliest token."""
    top_k: int = 0
    """Draw among this many likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 is all."""
    seed: int = 0
    """Same seed, same text; further samples use the seeds after it."""
    num_samples: int = 1
    """Texts to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type to compute in."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse(Arguments, argv, prog="megalite sample")
    if arguments.num_samples < 1:
        raise UserError(f"--num-samples={arguments.num_samples} must be at least 1")
    import torch

    from megalite.interop.hf import DTYPES, find_folder, load_folder

    folder = find_folder(arguments.checkpoint)
    tokenizer, start_id = load_tokenizer(folder)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_folder(folder, dtype=DTYPES[arguments.dtype], device=device)
    prompt_ids = [start_id, *tokenizer.encode(arguments.prompt)]
    began = time.perf_counter()
    samples = [_sample(model, tokenizer, prompt_ids, arguments, i) for i in range(arguments.num_samples)]
    seconds = time.perf_counter() - began
    if arguments.json:
        new_tokens = sum(sample["new_tokens"] for sample in samples)
        result = {
            "checkpoint": str(folder),
            "prompt": arguments.prompt,
            "prompt_tokens": prompt_ids,
            "samples": samples,
            "seconds": seconds,
            "tokens_per_s": new_tokens / seconds,
        }
        print(json.dumps(result))
    return ExitCode.DONE


def _sample(
    model: Any, tokenizer: Tokenizer, prompt_ids: list[int], arguments: Arguments, number: int
) -> dict[str, Any]:
    """Write one text, print it, and return its record."""
    from megalite.train.generate import generate

    seed = arguments.seed + number
    ids = generate(
        model,
        prompt_ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=seed,
        eod_id=tokenizer.eod_id,
    )
    text = tokenizer.decode(ids)
    if arguments.num_samples > 1:
        print(f"--- sample {number + 1} of {arguments.num_samples} (seed {seed})")
    print(arguments.prompt + text)
    return {"text": text, "tokens": ids, "new_tokens": len(ids), "seed": seed}


def load_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The folder's tokenizer, and the id that starts a document.

    That is the beginning-of-text token where the model has one of its own, else the end-of-document token.

    Raises:
        UserError: there is no tokenizer, or nothing says which token ends a document.
    """
    from megalite.data.tokenize import EOD_TOKEN, Tokenizer

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokenizer = Tokenizer.load(folder, eod_token=_content(settings.get("eos_token")) or EOD_TOKEN)
    start = _content(settings.get("bos_token"))
    if start is None:
        return tokenizer, tokenizer.eod_id
    return tokenizer, Tokenizer.load(folder, eod_token=start).eod_id


def _content(token: Any) -> str | None:
    """A token's text; tokenizer_config.json has it as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token
