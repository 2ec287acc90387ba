"""The untrained toy model with a head of its own, as peaked as a trained one: with the tied head it
repeats the last token for ever."""

import torch

from deepalign_kernels.toyworld import build_model


def peaked_model(tokenizer, seed=0):
    model = build_model(tokenizer, seed)
    noise = torch.randn(len(tokenizer), 96, generator=torch.Generator().manual_seed(seed))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(3 * noise / 96**0.5)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(25)
    return model.eval()
