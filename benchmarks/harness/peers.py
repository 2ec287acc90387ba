"""Kernels of other libraries, each behind the one call shape of `cases.py`. All are optional.

An adapter does what the library's user would have to write around it (a log_softmax in front, the
constrained loss on [T] vectors behind), and that is timed with it. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import plain
from benchmarks.harness.plain import IGNORE, JS_BETA, Inputs, trained


@dataclass(frozen=True)
class Peer:
    """name: how tables call it. needs: "module:attribute" that must import. device: "cuda" if it
    runs nowhere else.

    scalar: it offers only the mean over tokens, so that is what is compared. consumes: see
    Provider.
    """

    name: str
    needs: str
    cases: dict[str, Callable[[Inputs], Tensor]]
    device: str | None = None
    scalar: bool = False
    consumes: bool = False
    note: str = ""

    def unavailable(self, device: str) -> str | None:
        if self.device and device != self.device:
            return f"runs on {self.device} only"
        return _probe(self.needs)


@functools.cache
def _probe(needs: str) -> str | None:
    module, _, attribute = needs.partition(":")
    try:
        found = _import(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a peer may fail to import in any way, and the others must run
        return f"{module} does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None if hasattr(found, attribute) else f"{module} has no {attribute}"


@functools.cache
def _get(needs: str) -> Any:
    module, _, attribute = needs.partition(":")
    return getattr(_import(module), attribute)


def _import(module: str) -> Any:
    if module.startswith("quack"):
        # 0.6.5 fingerprints all that its epilogues refer to, and does not import where a logger is
        # among it, as with nvidia-cutlass-dsl 4.7.0; this is the hook that its message asks for.
        logging.Logger.__quack_semantic_key__ = lambda self: self.name  # type: ignore[attr-defined]
    return importlib.import_module(module)


# TRL: torch on the CPU, its Triton kernel on a GPU.
TRL_LOGP = "trl.trainer.utils:selective_log_softmax"
TRL_LINEAR = "trl.kernels.chunked_logprob:ChunkedLogProbFunction"
TRL_DIVERGENCE = "trl.kernels.chunked_divergence:ChunkedDivergenceFunction"


def _trl_of(logits: Tensor, x: Inputs) -> Tensor:
    values = _get(TRL_LOGP)(logits, x["target"].clamp(min=0))
    return trained(x, values.float())


def _trl_logp(x: Inputs) -> Tensor:
    return _trl_of(x["policy"], x)


def _mean(tokens: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: tokens(x).sum() / (x["target"] != IGNORE).sum()


def _trl_constrained(x: Inputs) -> Tensor:
    with torch.no_grad():
        ref = x["ref_logp"] if "ref_logp" in x else _trl_of(x["ref"], x)
    return plain.constrained(x, _trl_logp(x), ref)


def _trl_linear_logp(x: Inputs) -> Tensor:
    args = (x["hidden"], x["weight"], None, x["target"].clamp(min=0), 1.0, 32768, None, 1.0, ())
    return trained(x, _get(TRL_LINEAR).apply(*args)[0])


def _trl_linear_constrained(x: Inputs) -> Tensor:
    return plain.constrained(x, _trl_linear_logp(x), x["ref_logp"])


def _trl_linear_kl(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        heads = (x["hidden"], x["weight"], None, x["ref_hidden"], x["ref_weight"], None)
        return trained(x, _get(TRL_DIVERGENCE).apply(*heads, beta)[0])

    return run


# Liger-Kernel: Triton. Its JSD wants log-probabilities and gives the mean; its cross-entropy
# overwrites the logits with their gradient. beta 0 is KL(target || input), 1 is KL(input ||
# target).
LIGER_JSD = "liger_kernel.ops:LigerJSDFunction"
LIGER_CE = "liger_kernel.transformers.functional:liger_cross_entropy"
LIGER_LINEAR_CE = "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy"
LIGER_SM90_CE = (
    "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    ":liger_fused_linear_cross_entropy_sm90"
)
LIGER_SCALED_CE = "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction"
LIGER_LINEAR_JSD = "liger_kernel.transformers.functional:liger_fused_linear_jsd"
LIGER_CHUNKED_JSD = "liger_kernel.chunked_loss:LigerFusedLinearJSDLoss"


def _liger_jsd(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        q, p = plain.log_probs(x)
        return _get(LIGER_JSD).apply(q, p, x["target"], beta, IGNORE)

    return run


def _liger_ce(x: Inputs) -> Tensor:
    return -_get(LIGER_CE)(x["policy"], x["target"], ignore_index=IGNORE, reduction="mean")


def _liger_linear_ce(x: Inputs) -> Tensor:
    return -_get(LIGER_LINEAR_CE)(x["hidden"], x["weight"], x["target"], ignore_index=IGNORE)


def _liger_chunked_ce(x: Inputs) -> Tensor:
    """Chunks 16 times its default, which gives GEMMs of 256 rows; scores of 2 GB instead of 0.1."""
    kw = {"ignore_index": IGNORE, "chunk_mem_const": 16}
    return -_get(LIGER_LINEAR_CE)(x["hidden"], x["weight"], x["target"], **kw)


def _liger_sm90_ce(x: Inputs) -> Tensor:
    return -_get(LIGER_SM90_CE)(x["hidden"], x["weight"], x["target"], ignore_index=IGNORE)


def _liger_scaled(x: Inputs) -> Tensor:
    nll = _get(LIGER_SCALED_CE).apply(x["hidden"], x["weight"], x["target"], 1.0, IGNORE)
    return trained(x, -nll)


def _liger_scaled_constrained(x: Inputs) -> Tensor:
    return plain.constrained(x, _liger_scaled(x), x["ref_logp"])


def _liger_linear_jsd(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        heads = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
        return _get(LIGER_LINEAR_JSD)(*heads, x["target"], beta, IGNORE)

    return run


@functools.cache
def _chunked_jsd(beta: float) -> Any:
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": beta, "compiled": False}
    return _get(LIGER_CHUNKED_JSD)(ignore_index=IGNORE, **options)


def _liger_chunked_jsd(beta: float) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        heads = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
        return _chunked_jsd(beta)(*heads, x["target"])

    return run


# QuACK (CuTe), flash-attention's Triton cross-entropy, cut-cross-entropy, torch's own chunked
# linear loss.
QUACK_LINEAR = "quack.linear_cross_entropy:chunked_linear_cross_entropy"
QUACK_CE = "quack.cross_entropy:cross_entropy"
FLASH_CE = "flash_attn.ops.triton.cross_entropy:cross_entropy_loss"
CCE = "cut_cross_entropy:linear_cross_entropy"
TORCH_OPTIONS = "torch.nn:LinearCrossEntropyOptions"


def _quack_logp(x: Inputs) -> Tensor:
    return -_get(QUACK_CE)(x["policy"], x["target"], reduction="none", ignore_index=IGNORE)


def _quack_linear(x: Inputs) -> Tensor:
    kw = {"ignore_index": IGNORE, "tuned": False}  # tuning takes minutes; on sm_90 it is not used
    return -_get(QUACK_LINEAR)(x["hidden"], x["weight"], x["target"], **kw)


def _flash_logp(x: Inputs) -> Tensor:
    return -_get(FLASH_CE)(x["policy"], x["target"], ignore_index=IGNORE)[0]


def _cce_logp(x: Inputs) -> Tensor:
    kw = {"ignore_index": IGNORE, "reduction": "none"}
    return -_get(CCE)(x["hidden"], x["weight"], x["target"], **kw).float()


def _torch_linear(x: Inputs) -> Tensor:
    loss = F.linear_cross_entropy  # type: ignore[attr-defined]  # torch >= 2.12
    kw = {"ignore_index": IGNORE, "options": _get(TORCH_OPTIONS)()}
    return -loss(x["hidden"], x["weight"], x["target"], **kw)


_JSD_NOTE = "log_softmax of both models in torch in front; gives the mean only"
ALL = (
    Peer(
        "trl",
        TRL_LOGP,
        {
            "token_logp": _trl_logp,
            "constrained_loss/ref_logits": _mean(_trl_constrained),
            "constrained_loss/ref_logp": _mean(_trl_constrained),
        },
        note="constrained: the [T] part in torch",
    ),
    Peer(
        "trl-chunked",
        TRL_LINEAR,
        {
            "linear_token_logp": _trl_linear_logp,
            "linear_token_logp/frozen_head": _trl_linear_logp,
            "linear_constrained_loss": _mean(_trl_linear_constrained),
            "linear_constrained_loss/frozen_head": _mean(_trl_linear_constrained),
        },
    ),
    Peer(
        "trl-divergence",
        TRL_DIVERGENCE,
        {
            "linear_token_kl/policy_ref": _trl_linear_kl(1.0),
            "linear_token_kl/js": _trl_linear_kl(JS_BETA),
        },
    ),
    Peer(
        "liger-jsd",
        LIGER_JSD,
        {
            "token_kl/policy_ref": _liger_jsd(1.0),
            "token_kl/ref_policy": _liger_jsd(0.0),
            "token_kl/js": _liger_jsd(JS_BETA),
        },
        device="cuda",
        scalar=True,
        note=_JSD_NOTE,
    ),
    Peer(
        "liger-ce",
        LIGER_CE,
        {"token_logp": _liger_ce},
        device="cuda",
        scalar=True,
        consumes=True,
        note="overwrites the logits with their gradient; gives the mean only",
    ),
    Peer(
        "liger-flce",
        LIGER_LINEAR_CE,
        {"linear_token_logp": _liger_linear_ce, "linear_token_logp/frozen_head": _liger_linear_ce},
        device="cuda",
        scalar=True,
    ),
    Peer(
        "liger-flce-16",
        LIGER_LINEAR_CE,
        {
            "linear_token_logp": _liger_chunked_ce,
            "linear_token_logp/frozen_head": _liger_chunked_ce,
        },
        device="cuda",
        scalar=True,
        note="chunk_mem_const=16",
    ),
    Peer(
        "liger-flce-sm90",
        LIGER_SM90_CE,
        {"linear_token_logp": _liger_sm90_ce},
        device="cuda",
        scalar=True,
    ),
    Peer(
        "liger-flsce",
        LIGER_SCALED_CE,
        {
            "linear_token_logp": _liger_scaled,
            "linear_constrained_loss": _mean(_liger_scaled_constrained),
        },
        device="cuda",
        note="per token; a kernel of its own on sm_90, chunks in torch elsewhere",
    ),
    Peer(
        "liger-fljsd",
        LIGER_LINEAR_JSD,
        {
            "linear_token_kl/policy_ref": _liger_linear_jsd(1.0),
            "linear_token_kl/js": _liger_linear_jsd(JS_BETA),
        },
        device="cuda",
        scalar=True,
    ),
    Peer(
        "liger-chunked",
        LIGER_CHUNKED_JSD,
        {
            "linear_token_kl/policy_ref": _liger_chunked_jsd(1.0),
            "linear_token_kl/js": _liger_chunked_jsd(JS_BETA),
        },
        scalar=True,
    ),
    Peer("quack", QUACK_CE, {"token_logp": _quack_logp}, device="cuda"),
    Peer(
        "quack-linear",
        QUACK_LINEAR,
        {"linear_token_logp": _quack_linear, "linear_token_logp/frozen_head": _quack_linear},
        device="cuda",
        scalar=True,
    ),
    Peer("flash-attn", FLASH_CE, {"token_logp": _flash_logp}, device="cuda"),
    Peer(
        "cce",
        CCE,
        {"linear_token_logp": _cce_logp, "linear_token_logp/frozen_head": _cce_logp},
        device="cuda",
    ),
    Peer(
        "torch-chunked",
        TORCH_OPTIONS,
        {"linear_token_logp": _torch_linear, "linear_token_logp/frozen_head": _torch_linear},
        scalar=True,
    ),
)
