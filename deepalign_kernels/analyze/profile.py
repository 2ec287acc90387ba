"""Two models at every position of an answer: figures 1, 3a, 3c and 4 of arXiv 2406.05946."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepalign_kernels import check
from deepalign_kernels.analyze.pairs import Pair, pairs_of
from deepalign_kernels.analyze.states import HeadWeights, Model, States, collect
from deepalign_kernels.ops import TokenProfile, linear_token_logp, linear_token_profile
from deepalign_kernels.runs import curves

WORKSPACE = 128 << 20  # bytes of scores at a time, whatever the vocabulary and the data


@dataclass(frozen=True)
class Profile:
    """Arrays [N, K] fp32: example by position, NaN behind the end of an answer. In nats, except
    for ranks, agreement and norms. "model" is the first model, "base" the second."""

    kl_model_base: np.ndarray  # KL(model || base), the paper's
    kl_base_model: np.ndarray
    js: np.ndarray  # Jensen-Shannon, at most log 2
    nll: np.ndarray  # -log p(y_t) under the model
    base_nll: np.ndarray
    entropy: np.ndarray
    base_entropy: np.ndarray
    top1_agree: np.ndarray  # 1 where both have one most probable token
    log_ratio: np.ndarray  # log p_model(y_t) - log p_base(y_t)
    rank: np.ndarray  # of y_t under the model, 1 is the most probable
    base_rank: np.ndarray
    margin: np.ndarray  # log p of the model's most probable token - log p(y_t), >= 0
    base_margin: np.ndarray
    head_grad: np.ndarray  # ||d log p(y_t) / d head||_F of the model, exact
    base_head_grad: np.ndarray
    groups: tuple[str, ...]  # of each example
    where: tuple[str, ...]
    vocab: int  # tokens that both know; distributions are over them
    outside: float  # largest probability that either model gives to other tokens

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(f.name for f in fields(self) if f.type == "np.ndarray")

    def values(self, metric: str, group: str | None = None) -> np.ndarray:
        """[n, K]: `metric` of the examples of a group, or of all.

        Raises:
            ValueError: an unknown metric or group.
        """
        check.one_of("metric", metric, self.metrics)
        if group is not None and group not in self.groups:
            known = ", ".join(map(repr, dict.fromkeys(self.groups)))
            raise ValueError(f"group: expected one of {known} or None, got {group!r}")
        chosen = np.array([group is None or g == group for g in self.groups])
        return getattr(self, metric)[chosen]

    def curve(self, metric: str, group: str | None = None, **bootstrap: int) -> curves.Curve:
        """Means of `values(metric, group)` by position with bootstrap intervals."""
        return curves.curve(self.values(metric, group), **bootstrap)

    def save(self, path: str | Path) -> None:
        """All of it as one .npz."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            named: dict[str, Any] = dict(file)
        for name in ("groups", "where"):
            named[name] = tuple(named[name].tolist())
        return cls(**{**named, "vocab": int(named["vocab"]), "outside": float(named["outside"])})


def profile(
    model: Model,
    base: Model,
    tokenizer: Any,
    data: Any,
    *,
    positions: int = 20,
    max_tokens: int = 8192,
    max_workspace_bytes: int = WORKSPACE,
    js_beta: float = 0.5,
) -> Profile:
    """Compare two models token by token on given answers.

    Args:
        model: a Hugging Face causal LM, or a function that loads one; a loaded one is let go before
            the other is loaded, and only its head and the hidden states of the positions stay.
        base: what it is compared with, likewise. Its tokenizer must be the same: see
            `check_tokenizers`.
        tokenizer: a fast tokenizer with a chat template, for both.
        data: see `pairs_of`; for answers that a model gives itself, `sample_answers`.
        positions: of each answer, at most.
        max_tokens: with padding, in a batch of the forward.
        max_workspace_bytes: of scores at a time.
        js_beta: weight of the base in the mixture of the Jensen-Shannon divergence.

    Raises:
        ValueError: wrong data or arguments; heads with different softcaps.
    """
    pairs = pairs_of(tokenizer, data, positions)
    first, second = (_collected(m, pairs, max_tokens) for m in (model, base))
    return profile_of(
        first, second, pairs, max_workspace_bytes=max_workspace_bytes, js_beta=js_beta
    )


def _collected(model: Model, pairs: Sequence[Pair], max_tokens: int) -> States:
    loaded = model if isinstance(model, nn.Module) else model()
    return collect(loaded, pairs, max_tokens=max_tokens)


@torch.no_grad()
def profile_of(
    model: States,
    base: States,
    pairs: Sequence[Pair],
    *,
    max_workspace_bytes: int = WORKSPACE,
    js_beta: float = 0.5,
    step: Callable[[int], None] = lambda rows: None,
) -> Profile:
    """`profile` from the hidden states of both models; see `collect`.

    Raises:
        ValueError: heads with different softcaps; a target that only one of the models knows.
    """
    heads = [model.head, base.head]
    vocab = min(len(head.weight) for head in heads)
    lengths = np.array([len(pair.answer) for pair in pairs])
    target = torch.tensor([token for pair in pairs for token in pair.answer])
    if (unknown := target >= vocab).any():
        at = int(np.searchsorted(lengths.cumsum(), int(unknown.nonzero()[0, 0]), side="right"))
        raise ValueError(
            f"data: {pairs[at].where or f'example {at}'}: its answer has token"
            f" {int(target[unknown][0])}, which only one of the models knows ({vocab} are common)"
        )
    first, second = _same_form(heads[0].first(vocab), heads[1].first(vocab))
    device = first.weight.device
    columns, outside = [], 0.0
    for a in range(0, len(target), 4096):
        part = slice(a, a + 4096)
        mine, theirs = model.hidden[part].to(device), base.hidden[part].to(device)
        own, other = _one_dtype(mine, first.weight, theirs, second.weight)
        out = linear_token_profile(
            *own,
            *other,
            target[part].to(device),
            ref_bias=second.bias,
            js_beta=js_beta,
            **first.options,
            max_workspace_bytes=max_workspace_bytes,
        )
        columns.append(_columns(out, mine, theirs, first, second))
        for states, hidden in ((model, mine), (base, theirs)):
            if len(states.head.weight) > vocab:
                mass = _mass_outside(states.head, hidden, target[part], vocab, max_workspace_bytes)
                outside = max(outside, mass)
        step(len(mine))
    flat = {name: torch.cat([c[name] for c in columns]).float().numpy() for name in columns[0]}
    inside = np.arange(lengths.max()) < lengths[:, None]
    arrays = {}
    for name, values in flat.items():
        arrays[name] = np.full(inside.shape, np.nan, np.float32)
        arrays[name][inside] = values
    return Profile(
        **arrays,
        groups=tuple(pair.group for pair in pairs),
        where=tuple(pair.where for pair in pairs),
        vocab=vocab,
        outside=outside,
    )


def _same_form(first: HeadWeights, second: HeadWeights) -> tuple[HeadWeights, HeadWeights]:
    """Both with the softcap and the scale of the first: a scale goes into the weights."""
    if first.softcap != second.softcap:
        raise ValueError(
            f"base: its softcap is {second.softcap}, that of the model {first.softcap}; one pass"
            " over both heads needs one"
        )
    device, ratio = first.weight.device, second.logit_scale / first.logit_scale
    weight = second.weight.to(device)
    bias = None if second.bias is None else second.bias.to(device)
    if ratio != 1.0:
        weight, bias = weight * ratio, None if bias is None else bias * ratio
    return first, HeadWeights(weight, bias, first.softcap, first.logit_scale)


def _one_dtype(*tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(hidden, weight) of both, hidden in its head's dtype; in fp64 if one head is."""
    hidden, weight, ref_hidden, ref_weight = tensors
    wide = torch.float64 in (weight.dtype, ref_weight.dtype)
    weights = [w.double() if wide else w for w in (weight, ref_weight)]
    return [(h.to(w.dtype), w) for h, w in zip((hidden, ref_hidden), weights, strict=True)]


def _columns(
    out: TokenProfile, mine: Tensor, theirs: Tensor, first: HeadWeights, second: HeadWeights
) -> dict[str, Tensor]:
    """By the names of `Profile`, on the CPU."""
    s = out.stats
    assert s.logp is not None and s.ref_logp is not None and s.js is not None
    named = {
        "kl_model_base": s.kl_policy_ref,
        "kl_base_model": s.kl_ref_policy,
        "js": s.js,
        "nll": -s.logp,
        "base_nll": -s.ref_logp,
        "entropy": s.entropy,
        "base_entropy": s.ref_entropy,
        "top1_agree": s.top1_agree,
        "log_ratio": s.logp - s.ref_logp,
        "rank": out.rank,
        "base_rank": out.ref_rank,
        "margin": out.top_logp - s.logp,
        "base_margin": out.ref_top_logp - s.ref_logp,
        "head_grad": out.slope * _input_norm(mine, first),
        "base_head_grad": out.ref_slope * _input_norm(theirs, second),
    }
    return {name: values.cpu() for name, values in named.items()}


def _input_norm(hidden: Tensor, head: HeadWeights) -> Tensor:
    """Norm of what the head multiplies, the 1 of a bias included."""
    square = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).square().sum(-1)
    return (square if head.bias is None else square + 1).sqrt()


def _mass_outside(
    head: HeadWeights, hidden: Tensor, target: Tensor, vocab: int, budget: int
) -> float:
    """The largest probability of tokens from `vocab` on: 1 - (p_y among all) / (p_y among the
    first)."""
    whole, cut = (
        linear_token_logp(
            hidden.to(h.weight.device, h.weight.dtype),
            h.weight,
            target.to(h.weight.device),
            **h.options,
            max_workspace_bytes=budget,
        )
        for h in (head, head.first(vocab))
    )
    return float((1 - (whole - cut).double().exp()).max().clamp(min=0))
