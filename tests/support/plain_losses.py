"""The loss of a target behind suffixes, written down plainly."""

import torch


def plain_losses(model, before, suffixes, after, target):
    """From whole logits in fp64, one sequence at a time."""
    out = []
    for suffix in suffixes.tolist():
        ids = torch.tensor([[*before, *suffix, *after, *target]])
        with torch.no_grad():
            logp = model(ids).logits[0].double().log_softmax(-1)
        places = range(ids.shape[1] - len(target) - 1, ids.shape[1] - 1)
        out.append(-sum(logp[p, t] for p, t in zip(places, target, strict=True)) / len(target))
    return torch.stack(out)
