"""Norms of d log p(y_t) / d parameters by position: figure 3b of arXiv 2406.05946, three ways.

    closed form   of the head alone: `Profile.head_grad`, for nothing
    exact         of every block, from one backward over activations for each position: here
    probes        of all parameters together, an estimate with a stated error: here

The paper's published script, and so probably its figure, has "last 3 layers and head".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deepalign_kernels import check, hf
from deepalign_kernels.analyze.pairs import IGNORE, Pair, batches, device_of
from deepalign_kernels.analyze.states import HeadWeights, call
from deepalign_kernels.modes import evaluating

CHUNK_BYTES = 256 << 20  # of gradients of activations at a time


@dataclass(frozen=True)
class GradientNorms:
    """Arrays [N, K] fp32, NaN behind the end of an answer; `layers` [N, K, L]. Exact up to
    rounding."""

    layers: np.ndarray  # of each decoder layer; NaN for those that were not asked for
    head: np.ndarray  # of the output head's own use, also where its weight is the embeddings'
    embedding: np.ndarray  # of the embeddings' own use; NaN unless all layers were asked for
    last: np.ndarray  # the layers asked for and the head, together: the paper's with 3 layers
    whole: np.ndarray  # all parameters; NaN unless all layers were asked for
    left_out: tuple[str, ...]  # parameters that are in none of these


def exact_norms(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    last_layers: int | None = None,
    step: Callable[[int], None] = lambda pairs: None,
) -> GradientNorms:
    """Gradient norms at each position of each answer, by block.

    One forward of a sequence, then one backward for each of its positions, all of them batched, and
    only to the layers' activations: the norm of a linear layer's gradient sum_s d_s a_s^T is
    sum_{s,s'} (d_s . d_s') (a_s . a_s'), so no gradient of a weight is ever made.

    Args:
        model: a Hugging Face causal LM on one device.
        pairs: see `pairs_of`.
        last_layers: only so many layers and the head; None: all of the model.
        step: called with 1 after each pair.

    Raises:
        ValueError: no stack of decoder layers is found; too many last layers.
    """
    stack = _decoder_layers(model)
    count = len(stack) if last_layers is None else last_layers
    check.count("last_layers", count, 1, len(stack))
    first = len(stack) - count
    out = _Norms(len(pairs), max(len(p.answer) for p in pairs), len(stack))
    kept = [(p, p.requires_grad) for p in model.parameters()]
    left: tuple[str, ...] = ()
    with hf.attached(model), evaluating(model), ExitStack() as undo:
        undo.callback(lambda: [p.requires_grad_(before) for p, before in kept])
        model.requires_grad_(False)
        blocks = _Blocks(model, stack, first, whole=last_layers is None)
        undo.callback(blocks.remove)
        for i, pair in enumerate(pairs):
            out.add(i, _one(model, pair, blocks))
            step(1)
        left = blocks.left_out
    return out.result(whole=last_layers is None, left_out=left)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    alike = [m for m in stacks if len({type(layer) for layer in m}) == 1]
    if not alike:
        raise ValueError("model: found no list of decoder layers of one kind")
    return max(alike, key=lambda m: sum(p.numel() for p in m.parameters()))


class _Blocks:
    """Hooks that note what goes in and out of every module with parameters, by block."""

    def __init__(self, model: nn.Module, stack: nn.ModuleList, first: int, *, whole: bool) -> None:
        self.linear: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.plain: dict[str, list[Tensor]] = defaultdict(list)
        self.biased: dict[str, bool] = {}
        self.embedded: list[tuple[Tensor, Tensor, float]] = []  # ids, output, scale
        self.block: dict[str, int | str] = {}
        self._hooks: list[Any] = []
        left: list[str] = []
        layer_of = {id(m): i for i, layer in enumerate(stack) for m in layer.modules()}
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        for name, module in model.named_modules():
            if module is head or (id(module) in layer_of and layer_of[id(module)] < first):
                continue
            block: int | str = layer_of.get(id(module), "rest")
            own = list(module.named_parameters(recurse=False))
            if not own or (block == "rest" and not whole):
                continue
            self.block[name] = block
            if module is table and isinstance(module, nn.Embedding):
                self._hooks.append(module.register_forward_hook(self._on_embedding))
            elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                self.biased[name] = module.bias is not None
                self._hooks.append(module.register_forward_hook(self._on_linear(name)))
            elif any(p.numel() > 1 << 20 for _, p in own):
                left += [f"{name}.{n}" for n, _ in own]
            else:
                self.plain[name] = [p.requires_grad_() for _, p in own if p.is_floating_point()]
        self.left_out = tuple(left)
        if not whole or self.left_out:  # somewhere the graph must begin
            start = stack[first]
            self._hooks.append(start.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, _module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].requires_grad_() if args[0].is_leaf else args[0], *args[1:]), kwargs
        x = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": x.requires_grad_() if x.is_leaf else x}

    def _on_embedding(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        rows = module.weight.detach()[args[0]]
        scale = ((output * rows).sum() / rows.square().sum()).item()  # Gemma's has one
        if not torch.allclose(output, scale * rows, rtol=1e-2):
            raise ValueError("model: its embeddings are more than scaled rows of a table")
        output = output.detach().requires_grad_()
        self.embedded.append((args[0], output, scale))
        return output

    def _on_linear(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                self.linear[name].append((args[0].detach(), output))

        return hook

    def forget(self) -> None:
        self.linear.clear()
        self.embedded.clear()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _one(model: nn.Module, pair: Pair, blocks: _Blocks) -> dict[Any, Tensor]:
    """Squared norms [K] by block of one answer."""
    blocks.forget()
    keep = _Graph()
    rows = next(batches([pair], 1))
    with torch.enable_grad():
        call(model, rows, keep)
    assert keep.hidden is not None and keep.head is not None
    hidden, head = keep.hidden, keep.head
    target = torch.tensor(pair.answer, device=hidden.device)
    x, d = _slopes(head, hidden.detach(), target)
    upstream = (d @ head.weight.to(d.dtype)).to(hidden.dtype)  # d log p / d hidden
    wide = torch.promote_types(hidden.dtype, torch.float32)
    inputs = hidden.detach().to(wide)
    square = d.square().sum(1) * (inputs.square().sum(1) + (head.bias is not None))
    sums: dict[Any, Tensor] = defaultdict(lambda: torch.zeros_like(square))
    sums["head"] = square
    calls = [(name, a, z) for name, seen in blocks.linear.items() for a, z in seen]
    plain = [(name, p) for name, ps in blocks.plain.items() for p in ps]
    wanted = [z for _, _, z in calls] + [p for _, p in plain] + [e for _, e, _ in blocks.embedded]
    if not wanted:
        return sums
    size = sum(w.numel() * w.element_size() for w in wanted)
    each = max(1, CHUNK_BYTES // size)
    for a in range(0, len(target), each):
        b = min(a + each, len(target))
        one_hot = hidden.new_zeros(b - a, *hidden.shape)
        one_hot[range(b - a), range(a, b)] = upstream[a:b]
        grads = torch.autograd.grad(
            hidden, wanted, one_hot, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        _add_linear(sums, blocks, calls, grads, slice(a, b))
        for (name, _), g in zip(plain, grads[len(calls) :], strict=False):
            if g is not None:
                flat = g.to(wide).flatten(1)
                sums[blocks.block[name]][a:b] += flat.square().sum(1)
        rest = grads[len(calls) + len(plain) :]
        for (ids, _, scale), g in zip(blocks.embedded, rest, strict=True):
            assert g is not None
            delta = scale * g.to(wide).flatten(1, -2)  # [k, T, H]
            same = (ids.flatten()[:, None] == ids.flatten()).to(wide)
            gram = torch.einsum("ksh,kth,st->k", delta, delta, same)
            sums["embedding"][a:b] += gram
            if keep.tied:  # one weight, used twice
                across = torch.einsum("ksh,kh,ks->k", delta, inputs[a:b], d[a:b][:, ids.flatten()])
                sums["cross"][a:b] += 2 * across
    return sums


def _add_linear(
    sums: dict[Any, Tensor],
    blocks: _Blocks,
    calls: list[tuple[str, Tensor, Tensor]],
    grads: Iterable[Tensor | None],
    part: slice,
) -> None:
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (name, a, _), g in zip(calls, grads, strict=False):
        if g is not None:
            wide = torch.promote_types(g.dtype, torch.float32)
            by_module[name].append((a.to(wide).flatten(0, -2), g.to(wide).flatten(1, -2)))
    for name, seen in by_module.items():
        a = torch.cat([x for x, _ in seen])  # [S, in]
        delta = torch.cat([g for _, g in seen], 1)  # [k, S, out]
        gram = a @ a.T + float(blocks.biased[name])
        square = torch.einsum("kso,kto,st->k", delta, delta, gram)
        sums[blocks.block[name]][part] += square


class _Graph:
    """A loss that hands out the hidden states with their graph."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.head: HeadWeights | None = None
        self.tied = False

    def __call__(self, head: hf.Head) -> hf.LossOutput:
        self.hidden = head.hidden[head.target != IGNORE]
        weight, bias = head.merged_weight().detach(), head.bias
        self.head = HeadWeights(weight, bias, head.softcap, head.logit_scale)
        model: Any = getattr(head.source, "model", None)
        table = model.get_input_embeddings().weight
        self.tied = table.data_ptr() == head.weight.data_ptr()
        return hf.LossOutput()


def _slopes(head: HeadWeights, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(x, d log p(target) / d x), [K, V], of x = hidden @ weight.T + bias."""
    kind = torch.promote_types(head.weight.dtype, torch.float32)
    plain = HeadWeights(head.weight, head.bias, None, 1.0)
    with torch.enable_grad():
        x = plain.scores(hidden).to(kind).requires_grad_()
        logp = head.shaped(x).log_softmax(-1).gather(1, target[:, None])
        return x, torch.autograd.grad(logp.sum(), x)[0]


class _Norms:
    def __init__(self, examples: int, positions: int, layers: int) -> None:
        self.layers = np.full((examples, positions, layers), np.nan, np.float32)
        self.named = {
            name: np.full((examples, positions), np.nan, np.float32)
            for name in ("head", "embedding", "last", "whole")
        }

    def add(self, i: int, sums: dict[Any, Tensor]) -> None:
        n = len(sums["head"])
        blocks = {name: square.double().cpu().numpy() for name, square in sums.items()}
        for name, square in blocks.items():
            if isinstance(name, int):
                self.layers[i, :n, name] = np.sqrt(square)
            elif name in self.named:
                self.named[name][i, :n] = np.sqrt(square)
        own = [x for name, x in blocks.items() if isinstance(name, int) or name == "head"]
        self.named["last"][i, :n] = np.sqrt(sum(own))
        self.named["whole"][i, :n] = np.sqrt(np.maximum(sum(blocks.values()), 0.0))

    def result(self, *, whole: bool, left_out: tuple[str, ...]) -> GradientNorms:
        if not whole or left_out:
            self.named["whole"][:] = np.nan
        return GradientNorms(self.layers, **self.named, left_out=left_out)


@dataclass(frozen=True)
class ProbedNorms:
    """Estimates [N, K] of the norm over all parameters, NaN behind the end of an answer."""

    whole: np.ndarray
    relative_error: float  # standard deviation of each, over its true value
    probes: int


def probed_norms(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    probes: int = 32,
    seed: int = 0,
    max_tokens: int = 4096,
    step: Callable[[int], None] = lambda pairs: None,
) -> ProbedNorms:
    """Gradient norms of all parameters together, of all positions at once.

    For random directions v with independent standard normal entries, (g . v)^2 has mean |g|^2, and
    one forward in forward-mode differentiation along v has g . v of every position. The root mean
    square over m probes has a relative standard deviation of 1 / sqrt(2 m), by position; the
    probes are the same for all positions, so means over examples may be off by as much.

    Args:
        model: a Hugging Face causal LM with fp32 or fp64 parameters on one device.
        pairs: see `pairs_of`.
        probes: m.
        seed: of the directions.
        max_tokens: with padding, in a batch.
        step: called with the number of pairs that each forward had.

    Raises:
        ValueError: 16-bit parameters, whose rounding would be taken for a gradient.
        NotImplementedError: an operation without forward-mode differentiation.
    """
    check.count("probes", probes, 1)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point()}
    narrow = next((n for n, p in weights.items() if p.element_size() < 4), None)
    if narrow is not None:
        raise ValueError(f"model: {narrow} is {weights[narrow].dtype}; expected fp32 or fp64")
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    squares = np.zeros((len(pairs), max(len(p.answer) for p in pairs)))
    groups = list(batches(pairs, max_tokens))
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), hf.attached(model), evaluating(model), math_only:
        for _ in range(probes):
            v = {
                n: torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype)
                for n, p in weights.items()
            }
            for rows in groups:
                slopes = _slope_along(model, weights, v, rows, device).double().cpu().square()
                at = (rows.targets != IGNORE).sum(1).tolist()
                for i, each in zip(rows.index, slopes.split(at), strict=True):
                    squares[i, : len(each)] += each.numpy()
                step(len(rows.index))
    lengths = np.array([len(p.answer) for p in pairs])
    norms = np.sqrt(squares / probes).astype(np.float32)
    norms[np.arange(squares.shape[1]) >= lengths[:, None]] = np.nan
    return ProbedNorms(norms, (2 * probes) ** -0.5, probes)


def _slope_along(
    model: nn.Module,
    weights: dict[str, Tensor],
    v: dict[str, Tensor],
    rows: Any,
    device: torch.device,
) -> Tensor:
    """d log p(target) / d epsilon [n] at weights + epsilon v, for the targets of a batch."""
    found: list[Tensor] = []

    def loss(head: hf.Head) -> hf.LossOutput:
        chosen = head.target != IGNORE
        hidden, target = head.hidden[chosen], head.target[chosen, None]
        form = HeadWeights(head.merged_weight(), head.bias, head.softcap, head.logit_scale)
        size = max(1, CHUNK_BYTES // (32 * len(form.weight)))  # rows of scores at a time
        for a in range(0, len(target), size):
            logp = form.scores(hidden[a : a + size]).log_softmax(-1)
            picked = forward_ad.unpack_dual(logp.gather(1, target[a : a + size])[:, 0])
            assert picked.tangent is not None
            found.append(picked.tangent)
        return hf.LossOutput()

    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, v[n]) for n, p in weights.items()}
        arguments = {
            "input_ids": rows.input_ids.to(device),
            "attention_mask": rows.attention_mask.to(device),
            "shift_labels": rows.targets.to(device),
            "dak_loss": loss,
        }
        torch.func.functional_call(model, duals, (), arguments)
    return torch.cat(found)
