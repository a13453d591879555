"""A Hugging Face Llama before and after `megalite_kernels.patch`: the same losses; tokens/s and peak memory of both.

    python examples/huggingface_llama.py                      # a small model on the CPU, under a minute
    python examples/huggingface_llama.py --dtype bfloat16 --hidden 512 --layers 8 --steps 20

Needs `transformers`. Random weights; real text: the source of Python's standard library. Your own script needs the
one line between the asterisks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import transformers
from before_and_after import VOCAB, compare, parse, read_batches
from torch import nn

import megalite_kernels


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the comparison; returns its figures."""
    options = parse(argv, __doc__)
    batches = read_batches(options)
    before = build(options)
    after = copy.deepcopy(before)

    # ****************************************
    report = megalite_kernels.patch(after)
    # ****************************************

    print(report)
    figures = compare(
        {"before": before, "after": after},
        lambda model, batch: model(input_ids=batch, labels=batch).loss,
        batches,
    )
    megalite_kernels.unpatch(after)
    after.load_state_dict(before.state_dict())
    prompt = batches[0][:1, :16]
    same = torch.equal(after.eval()(prompt).logits, before.eval()(prompt).logits)
    print(f"after unpatch, with the weights of the other: logits bitwise equal: {same}")
    return {**figures, "replaced": len(report.replaced), "restored": same}


def build(options: argparse.Namespace) -> nn.Module:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        max_position_embeddings=options.length,
    )
    return transformers.LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).train()


if __name__ == "__main__":
    main()
