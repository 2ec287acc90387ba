"""What is analysed: answers, token by token, each behind its context; given, or sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels import check
from deepalign_kernels.data.examples import Example, tokenize_chat

IGNORE = -100


@dataclass(frozen=True)
class Pair:
    """One answer and what stands before it.

    Attributes:
        context: token ids up to the answer, with what the chat template puts before its content.
        answer: the first token ids of the answer; position 1 first.
        group: name of the group of examples it belongs to.
        where: for messages, such as "chat.jsonl:12".
    """

    context: tuple[int, ...]
    answer: tuple[int, ...]
    group: str = "all"
    where: str = ""


def pairs_of(tokenizer: Any, data: Any, positions: int = 20) -> list[Pair]:
    """The first `positions` tokens of every answer.

    Args:
        tokenizer: as in `tokenize_chat`: its chat template is used for both models.
        data: what `tokenize_chat` takes, a list of `Example` or of `Pair`, or a dict of such with
            the name of each group. Of a conversation with several replies the last is analysed.
        positions: at most so many tokens of each answer, >= 1.

    Raises:
        ValueError: as `tokenize_chat`; no data; an example without a position 1.
    """
    check.count("positions", positions, 1)
    named = data if isinstance(data, Mapping) else {"all": data}
    out: list[Pair] = []
    for group, source in named.items():
        items = list(source) if not isinstance(source, str) and hasattr(source, "__iter__") else []
        if items and all(isinstance(item, Pair) for item in items):
            out += [replace(p, answer=p.answer[:positions], group=group) for p in items]
            continue
        given = items and all(isinstance(item, Example) for item in items)
        examples = items if given else tokenize_chat(tokenizer, source)
        out += [_pair(e, str(group), positions) for e in examples]
    if not out:
        raise ValueError("data: no example to analyse")
    return out


def _pair(example: Example, group: str, positions: int) -> Pair:
    starts = [i for i, position in enumerate(example.positions) if position == 1]
    if not starts or starts[-1] == 0:
        raise ValueError(
            f"{example.where or 'data'}: no token at position 1 of an answer behind a context"
        )
    begin = end = starts[-1]
    while end < len(example.input_ids) and example.positions[end] == end - begin + 1:
        end += 1
    ids = tuple(example.input_ids)
    return Pair(ids[:begin], ids[begin : min(end, begin + positions)], group, example.where)


@dataclass(frozen=True)
class PairBatch:
    """A batch for one forward: right-padded [B, T]; `targets[:, t]` follows `input_ids[:, t]`."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor  # -100 outside the answers
    index: list[int]  # of the pairs


def batches(pairs: Sequence[Pair], max_tokens: int, pad_id: int = 0) -> Iterator[PairBatch]:
    """Pairs of like length together, `max_tokens` with padding in a batch; every sequence ends
    where its last analysed token is predicted."""
    order = sorted(range(len(pairs)), key=lambda i: _length(pairs[i]), reverse=True)
    while order:
        size = max(1, max_tokens // _length(pairs[order[0]]))
        yield _rows(pairs, order[:size], pad_id)
        order = order[size:]


def _length(pair: Pair) -> int:
    return len(pair.context) + len(pair.answer) - 1


def _rows(pairs: Sequence[Pair], index: list[int], pad_id: int) -> PairBatch:
    width = max(_length(pairs[i]) for i in index)
    ids = torch.full((len(index), width), pad_id)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, i in enumerate(index):
        pair, length = pairs[i], _length(pairs[i])
        ids[row, :length] = torch.tensor((*pair.context, *pair.answer[:-1]))
        mask[row, :length] = 1
        targets[row, len(pair.context) - 1 : length] = torch.tensor(pair.answer)
    return PairBatch(ids, mask, targets, index)


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go: that of the embeddings, or the CPU for weights that are offloaded."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return torch.device("cpu") if device.type == "meta" else device


@torch.inference_mode()
def sample_answers(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    positions: int = 20,
    temperature: float = 0.9,
    top_p: float = 0.6,
    seed: int = 0,
    max_tokens: int = 8192,
) -> list[Pair]:
    """The same contexts with answers drawn from `model`, as the paper's figure 3c has them.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: says what ends an answer and what pads.
        pairs: whose contexts are answered.
        positions: tokens of each answer, at most.
        temperature: > 0; the paper samples with 0.9 and top_p 0.6.
        top_p: in (0, 1].
        seed: of each batch's draws, together with its number; torch's random state is kept.
        max_tokens: with padding, in a batch.

    Returns:
        One pair for each, in the same order; an answer ends with the end mark where one came.
    """
    from transformers import GenerationConfig

    stops = _stops(model, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=check.number("temperature", temperature, above=0.0),
        top_p=check.number("top_p", top_p, above=0.0),
        top_k=0,
        max_new_tokens=positions,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=stops,
    )
    out, device = list(pairs), device_of(model)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].context), reverse=True)
    number = 0
    while order:
        width = len(pairs[order[0]].context)
        index = order[: max(1, max_tokens // (width + positions))]
        order = order[len(index) :]
        ids = torch.full((len(index), width), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(index):
            context = pairs[i].context
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            rows: Any = model.generate(  # type: ignore[operator]
                ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        number += 1
        for i, row in zip(index, rows[:, width:].tolist(), strict=True):
            ends = [at for at, token in enumerate(row) if token in stops]
            out[i] = replace(pairs[i], answer=tuple(row[: ends[0] + 1] if ends else row))
    return out


def _stops(model: nn.Module, tokenizer: Any) -> list[int]:
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def check_tokenizers(tokenizer: Any, base: Any) -> list[str]:
    """Both models must mean the same by every token id.

    Returns:
        Notes on what differs and does no harm: added tokens that one of the two lacks or renames.

    Raises:
        ValueError: ordinary tokens that differ, with the first.
    """
    ours, theirs = ({i: t for t, i in x.get_vocab().items()} for x in (tokenizer, base))
    added = {*tokenizer.get_added_vocab().values(), *base.get_added_vocab().values()}
    other = [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]
    wrong = [i for i in (*other, *(ours.keys() ^ theirs.keys())) if i not in added]
    if wrong:
        i = min(wrong)
        raise ValueError(
            f"base: its tokenizer is another one: {len(wrong)} token ids differ, the first is {i},"
            f" {ours.get(i)!r} here and {theirs.get(i)!r} there. A divergence by token needs one"
            " vocabulary: compare models that share a tokenizer"
        )
    notes = []
    if other:
        i = min(other)
        notes.append(f"{len(other)} added tokens have other names, such as {ours[i]!r} for "
                     f"{theirs[i]!r}")  # fmt: skip
    if lone := sorted(ours.keys() ^ theirs.keys()):
        has = "the model" if lone[0] in ours else "the base"
        notes.append(f"{len(lone)} added tokens are known to one model only, such as "
                     f"{ours.get(lone[0], theirs.get(lone[0]))!r} to {has}")  # fmt: skip
    return notes
