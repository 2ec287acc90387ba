"""What test_gpu.py runs: (x, y, target, beta, temperature) -> a scalar whose gradient by x is
taken, or, where nothing goes through autograd, that and the gradient."""

import torch

import deepalign_kernels as dak
from deepalign_kernels import backends

DIRECTIONS = ("policy_ref", "ref_policy", "js")


def token_logp(x, y, target, beta, **options):
    return dak.token_logp(x, target, **options).sum()


def token_kl(x, y, target, beta, **options):
    kw = {"valid": target != -100, **options}
    return sum(dak.token_kl(x, y, direction=d, **kw).sum() for d in DIRECTIONS)


def constrained_loss(x, y, target, beta, **options):
    kw = {"beta": beta, "ref_logits": y, **options}
    each = dak.constrained_loss(x, target, reduction="none", **kw)
    return each.sum() + dak.constrained_loss(x, target, **kw)


def token_entropy(x, y, target, beta, **options):
    return dak.token_entropy(x, valid=target != -100, **options).sum()


def token_stats(x, y, target, beta, **options):
    stats = dak.token_stats(x, y, target, **options)
    return stats.entropy.sum() + stats.js.sum() + 0.0 * x[..., 0].float().sum()


def raw(op):
    """An op that no public function calls by itself: (sum of its results, its gradient)."""

    def run(x, y, target, beta, temperature=1.0):
        x, y, target = x.detach().flatten(0, 1)[None], y.flatten(0, 1)[None], target.flatten()
        grad, out = torch.linspace(0.1, 1, len(target), device=x.device), torch.zeros_like(x)
        call, valid, tail = (
            backends.choose(op, x.device.type, x.dtype),
            target != -100,
            (temperature, 0.0),
        )
        if op == "token_logp_fused":
            return call(grad, x, target, -100, *tail, out).sum(), out
        if op == "token_js_parts":
            logp = torch.ops.deepalign.token_logp_fwd
            norms = [logp(z, target, -100, *tail)[1] for z in (x, y)]
            return torch.stack(call(x, y, valid, *norms, 0.3, *tail)).abs().sum(), out
        total, kept = 0.0, torch.zeros_like(x)
        for direction in range(3):
            total = total + call(grad, x, y, valid, direction, 0.5, *tail, out).sum()
            kept += out
        return total, kept

    return run


# name -> (what to call, the internal ops it takes). A backend is asked for each of these alone, so
# that an op which it lacks keeps none of the others from being tested.
OPS = {
    "token_logp": (token_logp, ("token_logp_fwd", "token_logp_bwd")),
    "token_kl": (token_kl, ("token_kl_fwd", "token_kl_bwd")),
    "constrained_loss": (
        constrained_loss,
        ("constrained_loss_fwd", "constrained_loss_fused", "scale_grad"),
    ),
    "token_stats": (token_stats, ("token_stats_fwd",)),
    "token_entropy": (token_entropy, ("token_entropy_fwd", "token_entropy_bwd")),
    **{op: (raw(op), (op,)) for op in ("token_logp_fused", "token_kl_fused", "token_js_parts")},
}
