"""A causal LM of transformers as an engine: continuations of one prompt share its keys and values.

In mode "exact" every distinct prompt and every reply runs in a batch of one, so a result depends on
its request alone. In mode "fast" requests share batches; a prompt that is the beginning of another
in its batch (prefills of k = 5, 10, 20 tokens of one answer) costs nothing, and rounding differs
with the company. `self_check` counts the replies that differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepalign_kernels import check, progress
from deepalign_kernels.generate import cache as caches
from deepalign_kernels.generate.engine import Reply, Request
from deepalign_kernels.generate.sampling import Picker
from deepalign_kernels.modes import evaluating

Ids = tuple[int, ...]
T = TypeVar("T")


class LocalEngine:
    """An engine over `model`, which stays as it was: mode of its modules, random state, settings.

    Args:
        model: a causal LM of transformers, on one device.
        tokenizer: its tokenizer.
        mode: "exact" or "fast", as above.
        batch_size: rows of a batch in mode "fast", at most. A batch that does not fit into memory
            is halved, and the number remembered.
        name: of the model, for results.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        mode: str = "fast",
        batch_size: int = 64,
        name: str = "",
    ) -> None:
        check.one_of("mode", mode, ("exact", "fast"))
        check.count("batch_size", batch_size, 1)
        self.model: Any = model
        self.tokenizer, self.mode, self.batch_size = tokenizer, mode, batch_size
        config: Any = getattr(model, "config", None)
        self.name = name or getattr(config, "name_or_path", "") or type(model).__name__
        self.context = getattr(config, "max_position_embeddings", None) or float("inf")
        self.end_ids = _end_ids(self.model, tokenizer)
        self._kept: Any = None  # the last prompt of mode "exact", and its keys and values
        self._takes = caches.takes(model)

    def about(self) -> dict[str, Any]:
        """Model and mode, plain values."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {"engine": "local", "model": self.name, "mode": self.mode, "dtype": dtype}

    def over(self, model: nn.Module, name: str = "") -> LocalEngine:
        """An engine of the same kind over another model with the same tokenizer."""
        size = self.batch_size
        return LocalEngine(model, self.tokenizer, mode=self.mode, batch_size=size, name=name)

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """As `Engine.generate`; a prompt that does not fit into the context is a failure."""
        wrong = {i: why for i, r in enumerate(requests) if (why := self._wrong(r.prompt))}
        good = [i for i in range(len(requests)) if i not in wrong]
        good.sort(key=lambda i: (len(requests[i].prompt), requests[i].prompt))
        replies = self._in_batches([requests[i] for i in good], self._generate, _no_memory)
        self._kept = None
        found = dict(zip(good, replies, strict=True))
        return [found.get(i) or Reply(finish="error", error=wrong[i]) for i in range(len(requests))]

    def score(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """As `Engine.score`.

        Raises:
            ValueError: an empty prompt or target, or more tokens than the context has.
        """
        pairs = [(tuple(p), tuple(t)) for p, t in zip(prompts, targets, strict=True)]
        for prompt, target in pairs:
            if not target:
                raise ValueError("targets: a target of zero tokens")
            if why := self._wrong(prompt + target[:-1]) or self._wrong(prompt):
                raise ValueError(f"prompts: {why}")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        scores = self._in_batches([pairs[i] for i in order], self._score)
        return [s for _, s in sorted(zip(order, scores, strict=True), key=lambda pair: pair[0])]

    def next_ids(self, prompt: Sequence[int], n: int) -> tuple[int, ...]:
        """The n most probable next ids behind one prompt, the most probable first."""
        if why := self._wrong(prompt):
            raise ValueError(f"prompt: {why}")
        with evaluating(self.model), torch.inference_mode():
            ids = torch.tensor([list(prompt)])
            logits = self._forward(ids, None, None, [len(prompt) - 1]).logits[0, 0]
        if not logits.logsumexp(-1).isfinite():
            raise ValueError("the model's logits are not finite")
        return tuple(logits.float().topk(n).indices.tolist())

    def self_check(
        self, requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> dict[str, int]:
        """How many requests get other ids in mode "fast" than in mode "exact".

        Args:
            requests: all that share batches in mode "fast".
            rows: which of them are compared; all by default.

        Returns:
            "rows" that were compared, those without a reply left out; "different" among them.
        """
        rows, before = range(len(requests)) if rows is None else rows, self.mode
        try:
            self.mode = "exact"
            exact = self.generate([requests[row] for row in rows])
            self.mode = "fast"
            fast = self.generate(requests) if rows else []
        finally:
            self.mode = before
        pairs = [(e, fast[row]) for e, row in zip(exact, rows, strict=True)]
        good = [(e.ids, f.ids) for e, f in pairs if e.error is None and f.error is None]
        return {"rows": len(good), "different": sum(e != f for e, f in good)}

    def _wrong(self, prompt: Sequence[int]) -> str | None:
        if not prompt:
            return "a prompt of zero tokens"
        if len(prompt) >= self.context:
            return f"a prompt of {len(prompt)} tokens does not fit into a context of {self.context}"
        return None

    def _in_batches(
        self,
        rows: list[Any],
        run: Callable[[list[Any]], list[T]],
        alone: Callable[[Exception], T] | None = None,
    ) -> list[T]:
        """`run` of pieces of `rows`, smaller ones after an out-of-memory error; `alone` of the
        error is what a row gives that does not fit in a piece of its own."""
        out: list[T] = []
        with evaluating(self.model), torch.inference_mode():
            while len(out) < len(rows):
                size = 1 if self.mode == "exact" else self.batch_size
                piece = rows[len(out) : len(out) + size]
                if not self._can_pad():  # rows of one length
                    piece = [r for r in piece if _length(r) == _length(piece[0])]
                try:
                    out += run(piece)
                except torch.OutOfMemoryError as error:
                    if len(piece) > 1:
                        self.batch_size = max(1, len(piece) // 2)
                    elif alone is None:
                        raise
                    else:
                        out.append(alone(error))
                progress.told(len(out), len(rows))
        return out

    def _can_pad(self) -> bool:
        """Whether every layer keeps plain keys and values, which a mask can hide."""
        if not hasattr(self, "_plain"):
            out = self._forward(torch.zeros(1, 1, dtype=torch.long), None, None, [0])
            if (cache := caches.of(out)) is None:
                raise ValueError(f"model: {type(self.model).__name__} gives no keys and values")
            layers = getattr(cache, "layers", [None])
            self._plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        return self._plain

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: Any, keep: list[int]) -> Any:
        """Output with logits [b, len(keep), V] of the positions `keep` of the new ids."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": True}
        if cache is not None:
            inputs |= caches.given(self.model, cache)
        if mask is not None:
            inputs["attention_mask"] = mask.to(device)
            if "position_ids" in self._takes:
                places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                inputs["position_ids"] = places.to(device)
        if "logits_to_keep" in self._takes:
            return self.model(**inputs, logits_to_keep=torch.tensor(keep, device=device))
        out = self.model(**inputs)
        out.logits = out.logits[:, keep]
        return out

    def _prefill(self, prompts: list[Ids]) -> tuple[Any, Tensor, Tensor]:
        """(cache, logits [b, V] behind each prompt, mask [b, W]) of prompts, alike or beginnings of
        each other as they may be; each token is computed once."""
        hosts = _hosts(prompts) if self._can_pad() else {p: p for p in prompts}
        longest = list(dict.fromkeys(hosts[p] for p in prompts))
        ids, mask = _padded(longest)
        row = torch.tensor([longest.index(hosts[p]) for p in prompts])
        surplus = torch.tensor([len(hosts[p]) - len(p) for p in prompts])
        width = ids.shape[1]
        keep = sorted({width - 1 - s for s in surplus.tolist()})
        out = self._forward(ids, mask if self._can_pad() else None, None, keep)
        at = torch.tensor([keep.index(width - 1 - s) for s in surplus.tolist()])
        cache, logits = caches.of(out), out.logits[row, at]
        if not surplus.any():
            if row.tolist() != list(range(len(longest))):
                cache.reorder_cache(row.to(logits.device))
            return cache, logits, mask[row]
        # A prompt's tokens stand `surplus` further left in its host's row; all end at the right.
        source = torch.arange(width) - surplus[:, None]
        for layer in cache.layers:
            layer.keys, layer.values = (
                x[row[:, None], :, source.clamp(min=0)].transpose(1, 2)
                for x in (layer.keys, layer.values)
            )
        moved = torch.where(source >= 0, mask[row[:, None], source.clamp(min=0)], 0)
        return cache, logits, moved

    def _prompts(self, prompts: list[Ids]) -> tuple[Any, Tensor, Tensor]:
        """`_prefill`, which mode "exact" does once for all replies to one prompt."""
        if self.mode != "exact":
            return self._prefill(prompts)
        if self._kept is None or self._kept[0] != prompts:
            self._kept = (prompts, self._prefill(prompts))
        return copy.deepcopy(self._kept[1])

    def _generate(self, requests: list[Request]) -> list[Reply]:
        device = self.model.device
        cache, logits, mask = self._prompts([r.prompt for r in requests])
        pick = Picker(requests, logits.device)
        room = [min(r.sampling.max_new_tokens, self.context - len(r.prompt)) for r in requests]
        limit, ends = (torch.tensor(x, device=logits.device) for x in (room, sorted(self.end_ids)))
        rows = torch.arange(len(requests), device=logits.device)  # of the batch, still in it
        done = torch.zeros_like(rows, dtype=torch.bool)
        ids: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        for step in range(int(max(room))):
            new, logp = pick(logits, rows, step)
            for row, token, value, over in zip(
                rows.tolist(), new.tolist(), logp.tolist(), done.tolist(), strict=True
            ):
                if not over:
                    ids[row].append(token)
                    logps[row].append(value)
            done |= torch.isin(new, ends) | (limit[rows] <= step + 1) | logp.isnan()
            if done.all():
                break
            if done.sum() >= 0.25 * len(rows):  # finished rows leave, but not one by one
                stay = (~done).nonzero()[:, 0]
                cache.reorder_cache(stay.to(device))
                rows, new, done, mask = rows[stay], new[stay], done[stay], mask[stay.cpu()]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            shown = mask if self._can_pad() else None
            logits = self._forward(new[:, None], shown, cache, [0]).logits[:, 0]
        return [self._reply(i, p) for i, p in zip(ids, logps, strict=True)]

    def _reply(self, ids: list[int], logps: list[float]) -> Reply:
        if logps and logps[-1] != logps[-1]:
            why = f"the model's logits are not finite at token {len(ids)} of the reply"
            return Reply(finish="error", error=why)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        finish = "stop" if ids and ids[-1] in self.end_ids else "length"
        return Reply(tuple(ids), tuple(logps), text, finish)

    def _score(self, pairs: list[tuple[Ids, Ids]]) -> list[list[float]]:
        rows = [(*prompt, *target[:-1]) for prompt, target in pairs]
        ids, mask = _padded(rows)
        width, most = ids.shape[1], max(len(t) for _, t in pairs)
        out = self._forward(
            ids, mask if self._can_pad() else None, None, list(range(width - most, width))
        )
        logp = out.logits.float().log_softmax(-1).cpu()
        return [
            logp[n, most - len(t) :].gather(1, torch.tensor(t)[:, None])[:, 0].tolist()
            for n, (_, t) in enumerate(pairs)
        ]


def _no_memory(error: Exception) -> Reply:
    first = str(error).split("\n", 1)[0]
    return Reply(finish="error", error=f"out of memory in a batch of one: {first}")


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """All ids that end a reply, by the model's generation config and the tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        found.update([ends] if isinstance(ends, int) else ends or ())
    return found


def _length(row: Request | tuple[Ids, Ids]) -> tuple[int, ...]:
    return (len(row.prompt),) if isinstance(row, Request) else tuple(map(len, row))


def _hosts(prompts: Sequence[Ids]) -> dict[Ids, Ids]:
    """For each prompt another that begins with it; itself if there is none."""
    hosts: dict[Ids, Ids] = {}
    host: Ids = ()
    for prompt in sorted(set(prompts), reverse=True):  # behind each, what begins alike
        if host[: len(prompt)] != prompt:
            host = prompt
        hosts[prompt] = host
    return hosts


def _padded(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [b, W] int64, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
