"""What `benchmarks gcg` measures: a random Llama, random ids, and ways to the target's NLL.

A way maps (model, inputs, wanted) to the mean negative log-likelihood [b] in nats of the inputs'
last T tokens, whose ids are `wanted` [b, T]. Inputs are what a model takes, [b, length, ...] first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.cases.logits import DTYPES
from deepalign_kernels import hf
from deepalign_kernels.generate.cache import given
from deepalign_kernels.generate.cache import of as cache_of

LOGIT_STD = 3.0  # of the random head: as peaked as a trained one, so that a wrong row shows

Inputs = dict[str, Any]
Way = Callable[[Any, Inputs, Tensor], Tensor]


def by_logits(model: Any, inputs: Inputs, wanted: Tensor) -> Tensor:
    """Logits of all positions, as the common implementations make them."""
    T = wanted.shape[1]
    return nll(model(**inputs, use_cache=False).logits[:, -T - 1 : -1].float(), wanted)


def by_logits_to_keep(model: Any, inputs: Inputs, wanted: Tensor) -> Tensor:
    """The model makes the target's logits only."""
    length, T = next(iter(inputs.values())).shape[1], wanted.shape[1]
    keep = torch.arange(length - T - 1, length - 1, device=wanted.device)
    return nll(model(**inputs, use_cache=False, logits_to_keep=keep).logits.float(), wanted)


def by_dak(model: Any, inputs: Inputs, wanted: Tensor) -> Tensor:
    """This library, inside the model's head."""
    length, (b, T) = next(iter(inputs.values())).shape[1], wanted.shape
    labels = wanted.new_full((b, length), -100)
    labels[:, -T - 1 : -1] = wanted
    return -model(**inputs, shift_labels=labels, dak_loss=hf.TokenLogp()).logp.sum(1) / T


def by_fp64(model: Any, inputs: Inputs, wanted: Tensor) -> Tensor:
    """The truth: head and log-probs in fp64, from the hidden states of the model's body."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, -wanted.shape[1] - 1 : -1]
    head = model.get_output_embeddings().weight.double().T
    pairs = zip(hidden.double().split(1), wanted.split(1), strict=True)
    return torch.cat([nll(h @ head, w) for h, w in pairs])  # one sequence at a time: memory


def nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """[b, T, V] and ids [b, T] to the mean NLL [b], in nats and in the dtype of the logits."""
    rows = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return rows.view_as(wanted).mean(1)


WAYS: dict[str, Way] = {"logits": by_logits, "logits_to_keep": by_logits_to_keep, "dak": by_dak}


class Prefix(transformers.DynamicCache):
    """Keys and values of one prompt, for any number of sequences: read, never grown."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        known: Any = self.layers[layer_idx]
        keys, values = (x.expand(len(key_states), -1, -1, -1) for x in (known.keys, known.values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


@dataclass(frozen=True)
class Job:
    """An attached, frozen model and ids [B, prompt + suffix + target], alike but for the suffix."""

    model: Any
    ids: Tensor
    prompt: int
    target: int
    prefix: Prefix

    def gradient(self, way: Way) -> Tensor:
        """[suffix, V] in the model's dtype, of the first sequence's NLL."""
        embed, ids = self.model.get_input_embeddings(), self.ids[0]
        prompt, suffix, wanted = ids.tensor_split([self.prompt, len(ids) - self.target])
        one_hot = embed.weight.new_zeros(len(suffix), len(embed.weight))
        one_hot.scatter_(1, suffix[:, None], 1.0).requires_grad_()
        rows = torch.cat([embed(prompt), one_hot @ embed.weight, embed(wanted)])
        loss = way(self.model, {"inputs_embeds": rows[None]}, wanted[None])
        return torch.autograd.grad(loss.sum(), one_hot)[0]

    @torch.no_grad()
    def score(self, way: Way, batch: int, cached: bool = False) -> Tensor:
        """[B] mean NLL per sequence in nats, `batch` sequences at a time."""
        losses = []
        for ids in self.ids.split(batch):
            inputs: Inputs = {"input_ids": ids}
            if cached:
                inputs = {"input_ids": ids[:, self.prompt :], **given(self.model, self.prefix)}
            losses.append(way(self.model, inputs, ids[:, -self.target :]))
        return torch.cat(losses)


def make_job(args: argparse.Namespace) -> Job:
    """Random weights and ids, the same for the same arguments and device."""
    H, layers, V = args.sizes
    heads, length = H // 64, args.prompt + args.suffix + args.target
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=4 * H,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
        ids = torch.randint(V, (length,)).repeat(args.candidates, 1)
        ids[:, args.prompt : -args.target] = torch.randint(V, (args.candidates, args.suffix))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=LOGIT_STD / H**0.5)
        known = model.model(input_ids=ids[:1, : args.prompt], use_cache=True)
    return Job(hf.attach(model), ids, args.prompt, args.target, Prefix(cache_of(known)))
