"""What test_gpu.py runs: (x, y, target, beta, temperature) -> a scalar whose gradient by x is
taken, or that and a gradient of its own."""

import functools
import importlib
import pkgutil

import torch

import deepalign_kernels as dak
from deepalign_kernels import backends

DIRECTIONS = ("policy_ref", "ref_policy", "js")
H = 64  # size of the hidden states: the first columns of what the ops on logits get


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


@functools.cache  # copied from the host once: a copy waits, and no graph can capture it
def head(V, dtype, device):
    g = torch.Generator().manual_seed(7)
    return (torch.randn(V, H, generator=g) / H**0.5).to(device, dtype).requires_grad_()


def linear(op):
    """A linear op with fixed shapes: (value, its gradients by hidden states and head)."""

    def run(x, y, target, beta, **options):
        hidden, weight = x[..., :H], head(x.shape[-1], x.dtype, x.device)
        ref = {"ref_hidden": y[..., :H], "ref_weight": weight.detach()}
        kw = {"compact": False, **options}
        if op == "linear_token_logp":
            value = dak.linear_token_logp(hidden, weight, target, **kw).sum()
        elif op == "linear_token_kl":
            kw |= {"valid": target != -100, **ref}
            kl = dak.linear_token_kl
            value = sum(kl(hidden, weight, direction=d, **kw).sum() for d in DIRECTIONS)
        else:
            kw |= {"beta": beta, **ref}
            loss = dak.linear_constrained_loss
            value = loss(hidden, weight, target, **kw)
            value = value + loss(hidden, weight, target, kl_coef=0.3, reduction="none", **kw).sum()
            given = {"ref_logp": -y[..., 0].float().abs()}
            kw = {k: v for k, v in kw.items() if k not in ref}
            value = value + loss(hidden, weight, target, **given, **kw)
        grads = torch.autograd.grad(value, (hidden, weight))
        return value.detach(), torch.cat([grad.flatten() for grad in grads])

    return run


def kernels():
    """Every Triton kernel of the package, in whatever module it stands, and the functions that
    they call, which are never launched."""
    from deepalign_kernels import triton_kernels

    found = {}
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            for it in vars(importlib.import_module(module.name)).values():
                if hasattr(it, "device_caches"):
                    found[id(it)] = it
    return list(found.values())


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
    "linear_token_logp": (linear("linear_token_logp"), ("token_logp_fwd", "token_logp_fused")),
    "linear_token_kl": (linear("linear_token_kl"), ("token_kl_fwd", "token_kl_fused")),
    "linear_constrained_loss": (
        linear("linear_constrained_loss"),
        (
            *("constrained_loss_fwd", "constrained_loss_fused", "token_logp_fwd"),
            *("token_logp_bwd", "token_kl_fwd", "token_kl_fused"),
        ),
    ),
}
