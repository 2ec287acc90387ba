"""What a suffix is worth: the negative log-likelihood (NLL) of a target behind prompt and suffix.

    before | suffix | after | target        before and after: the rendered prompt around the suffix

Keys and values of `before` are computed once and shared by all suffixes; each layer joins them to
its own for as long as it runs, and nothing is kept. The candidates of a search begin like the
suffix they were made from, and share its keys and values up to the first token they change. The
output head runs at the target's positions alone, inside the library's op, so logits are never whole
in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deepalign_kernels import hf, ops
from deepalign_kernels.generate import cache as caches
from deepalign_kernels.hf.head import Head
from deepalign_kernels.modes import evaluating

Ids = tuple[int, ...]
# Tokens in one forward that keep a device busy. Of candidates in the order of their first changed
# token, small pieces share more than large ones.
BUSY = {"cpu": 1024, "cuda": 4096}


class SharedLayer(DynamicLayer):
    """The first `length` keys and values of one prompt [1, heads, P, D], for any number of rows;
    with `own`, those of the rows themselves [b, heads, L, D] behind them. Never grows but through
    `keep`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self.own: Any = None
        self.keep, self.length = False, keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values that the new ones see, and these."""
        k, v = key_states, value_states
        if self.own is not None:
            k, v = torch.cat([self.own[0], k], 2), torch.cat([self.own[1], v], 2)
        if self.keep:
            self.own = (k, v)
        known: Any = self
        shape = (len(k), -1, -1, -1)
        return (
            torch.cat([known.keys[:, :, : self.length].expand(shape), k], 2),
            torch.cat([known.values[:, :, : self.length].expand(shape), v], 2),
        )

    def longer(self) -> SharedLayer:
        """A layer that shares what stands in `own`, of one row, as well."""
        return SharedLayer(*self.update(*(x[:, :, :0] for x in self.own)))

    def get_seq_length(self, *args: Any) -> int:
        """Of what is shared and of `own`."""
        return self.length + (0 if self.own is None else self.own[0].shape[2])


def shared(cache: Any) -> DynamicCache | None:
    """A cache of SharedLayers out of the cache of one prompt; None if a layer keeps more or less
    than plain keys and values (a window, a state)."""
    if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
        return None
    out: Any = DynamicCache()
    out.layers = [SharedLayer(layer.keys, layer.values) for layer in cache.layers]
    return out


class TargetLoss:
    """Losses and gradients for suffixes of one length, at one place of one prompt.

    Args:
        model: attached (`hf.attach`), in eval mode, its parameters without gradient.
        before: ids before the suffix.
        after: ids between suffix and target.
        target: ids, at least one.
        batch: suffixes at once; halved when memory runs out, and remembered.

    Attributes:
        tokens: how many tokens went through the model, forward and backward.
    """

    def __init__(self, model: Any, before: Ids, after: Ids, target: Ids, batch: int) -> None:
        if not target:
            raise ValueError("target: a target of zero tokens")
        self.model, self.batch, self.tokens = model, batch, [0, 0]
        device = model.device
        self._after, self._target = (torch.tensor(x, device=device).long() for x in (after, target))
        self._cache = None
        if before:
            with torch.no_grad():
                ids = torch.tensor([before], device=device)
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self._cache = shared(caches.of(out))
            self.tokens[0] += len(before)
        self._busy = BUSY.get(device.type, BUSY["cuda"])
        self._known = 0 if self._cache is None else len(before)
        rest = before if self._cache is None else ()
        self._before = torch.tensor(rest, device=device).long()

    @torch.no_grad()
    def losses(self, suffixes: Tensor, bound: float | None = None) -> Tensor:
        """Mean NLL [B] in nats, fp32, of the target behind each of the suffixes [B, S].

        With `bound`, a suffix whose first target tokens alone cost more than any suffix found so
        far, or `bound`, is given up and has loss inf. Log-probs are at most 0, so the smallest loss
        below the bound is always exact.
        """
        out = torch.zeros(len(suffixes), device=suffixes.device)
        plain = self._cache
        alike = self._alike(suffixes)
        order, done = alike.argsort(stable=True), 0
        length = suffixes.shape[1] + len(self._after) + len(self._target)
        try:
            while done < len(order):
                begin = int(alike[order[done]])
                size = self.batch
                if self._cache is not plain:
                    size = min(size, 1 + self._busy // (length - begin))
                rows = order[done : done + size]
                for layer in self._layers():
                    layer.length = self._known + begin
                try:
                    found = self._piece(suffixes[rows, begin:], bound)
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    self.batch = max(1, len(rows) // 2)
                    continue
                out[rows] = found
                done += len(rows)
                if bound is not None:
                    bound = min(bound, float(found.min()))
        finally:
            self._cache = plain
        return out

    def _alike(self, suffixes: Tensor) -> Tensor:
        """[B] on the CPU: how many first tokens of each suffix are in the cache from here on: those
        that it has in common with the most usual tokens."""
        S = suffixes.shape[1]
        if self._cache is not None and len(suffixes):
            usual = suffixes.mode(0).values
            alike = (suffixes == usual).long().cumprod(1).sum(1).clamp(max=S - 1).cpu()
            if int(alike.sum()) > 2 * S:  # else to compute them is as much as they save
                self._keep(True)
                try:
                    ids = usual[None, : int(alike.max())]
                    self.model(input_ids=ids, **self._past(), logits_to_keep=1)
                    longer: Any = DynamicCache()
                    longer.layers = [layer.longer() for layer in self._layers()]
                finally:
                    self._keep(False)
                self.tokens[0] += ids.numel()
                self._cache = longer
                return alike
        return torch.zeros(len(suffixes), dtype=torch.long)

    def _piece(self, suffixes: Tensor, bound: float | None) -> Tensor:
        T = len(self._target)
        first = max(1, T // 4)
        if bound is None or self._cache is None or T < 4 or bound == float("inf"):
            return self._nll(self._ids(suffixes, T - 1), self._target) / T
        try:
            self._keep(True)
            begun = self._nll(self._ids(suffixes, first), self._target[: first + 1])
            out = torch.full_like(begun, float("inf"))
            stay = (begun / T <= bound + 1e-4).nonzero()[:, 0]  # with room for rounding
            if len(stay):
                for layer in self._layers():
                    layer.own = tuple(x[stay] for x in layer.own)
                rest = self._target[first:-1].expand(len(stay), -1)
                out[stay] = (begun[stay] + self._nll(rest, self._target[first + 1 :])) / T
            return out
        finally:
            self._keep(False)

    def _ids(self, suffixes: Tensor, given: int) -> Tensor:
        """[b, L]: everything that is not in the cache, with `given` tokens of the target."""
        around = (self._before, suffixes, self._after, self._target[:given])
        return torch.cat([x if x.dim() == 2 else x.expand(len(suffixes), -1) for x in around], 1)

    def _nll(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """[b] summed NLL of `wanted` at the last positions of `ids` [b, L]."""
        self.tokens[0] += ids.numel()
        return -self._logp({"input_ids": ids}, wanted).sum(1)

    def _logp(self, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """[b, n] log-probs of `wanted` [n] at the last n positions, by the library's op."""
        rows, length = next(iter(inputs.values())).shape[:2]
        wanted = wanted.expand(rows, -1)
        labels = wanted.new_full((rows, length), -100)
        labels[:, length - wanted.shape[1] :] = wanted

        def loss(head: Head) -> hf.LossOutput:
            hidden = head.hidden[:, -wanted.shape[1] :]
            logp = ops.linear_token_logp(hidden, head.weight, wanted, **head.options)
            return hf.LossOutput(logp=logp)

        return self.model(**inputs, **self._past(), shift_labels=labels, dak_loss=loss).logp

    def gradient(self, suffix: Tensor) -> Tensor:
        """[S, V] fp32: derivative of the mean NLL by the one-hot rows of a suffix [S]."""
        embed = self.model.get_input_embeddings()
        T, start = len(self._target), len(self._before)
        ids = self._ids(suffix[None], T - 1)
        with torch.no_grad():
            rows = embed(ids)
        chosen = rows[:, start : start + len(suffix)].clone().requires_grad_()
        rows = torch.cat([rows[:, :start], chosen, rows[:, start + len(suffix) :]], 1)
        self.tokens[1] += ids.numel()
        with torch.enable_grad():
            loss = -self._logp({"inputs_embeds": rows}, self._target).sum() / T
            (grad,) = torch.autograd.grad(loss, chosen)
        scale = getattr(embed, "embed_scale", 1.0)  # some embeddings multiply what they look up
        return (grad[0].float() @ embed.weight.detach().float().T) * scale

    @torch.no_grad()
    def matched(self, suffix: Tensor) -> bool:
        """Whether greedy decoding gives the target, token by token."""
        T = len(self._target)
        ids = self._ids(suffix[None], T - 1)
        self.tokens[0] += ids.numel()
        out = self.model(input_ids=ids, **self._past())
        return bool((out.logits[0, -T:].argmax(-1) == self._target).all())

    def _past(self) -> dict[str, Any]:
        return caches.given(self.model, self._cache) | {"use_cache": self._cache is not None}

    def _layers(self) -> Any:
        return () if self._cache is None else self._cache.layers

    def _keep(self, on: bool) -> None:
        for layer in self._layers():
            layer.keep, layer.own = on, None


@torch.no_grad()
def plain_loss(model: Any, prompt: Ids, target: Ids) -> float:
    """Mean NLL of a target behind whole ids, from the model's own logits: what a search's result is
    held against."""
    with evaluating(model):
        logits = model(input_ids=torch.tensor([[*prompt, *target]], device=model.device)).logits
    rows = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    wanted = torch.tensor(target, device=rows.device)
    return -float(rows.gather(1, wanted[:, None]).mean())
