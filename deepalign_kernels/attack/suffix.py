"""Where a suffix stands in a rendered prompt, and which ids are the ids of a text there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.attack.chat import Chat, Ids
from deepalign_kernels.data.prompts import Prompt


class Place:
    """A suffix's place in one rendered prompt.

    Args:
        chat: how prompts are rendered.
        prompt: with a first `suffix`.

    Raises:
        ValueError: the template does not show the suffix once, or tokens reach across its ends.

    Attributes:
        before: ids before the suffix.
        after: ids behind it.
        first: ids of the prompt's own suffix.
    """

    def __init__(self, chat: Chat, prompt: Prompt) -> None:
        self._chat = chat
        text = chat.text(prompt)
        if text.count(prompt.suffix) != 1:
            raise ValueError(f"suffix: expected it once in the rendered prompt of {prompt.id}")
        begin = text.index(prompt.suffix)
        end = begin + len(prompt.suffix)
        plain = not chat.templated
        try:
            coded = chat.tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
        except NotImplementedError as error:  # tokenizers in Python
            raise ValueError(f"tokenizer: it does not say where tokens stand ({error})") from error
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        inside = [n for n, (a, b) in enumerate(spans) if a < end and b > begin and a < b]
        start, stop = inside[0], inside[-1] + 1
        self.before, self.first = tuple(ids[:start]), tuple(ids[start:stop])
        self.after = tuple(ids[stop:])
        # A first token often holds the space before it: then each suffix has to.
        at = min(spans[start][0], begin)
        self._left, self._right = text[:at], text[spans[stop - 1][1] :]
        self._lead = text[at:begin]
        if self._lead.strip() or spans[stop - 1][1] != end:
            raise ValueError(f"suffix: a token reaches across an end of it in {prompt.id}")
        self._anchor = list(self.before[-1:])

    def texts(self, suffixes: Sequence[Ids]) -> list[str | None]:
        """The suffix as a prompt's `suffix`, for each of these ids whose text gives the whole
        rendered prompt's ids again; None for the others."""
        decode = self._chat.tokenizer.batch_decode
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        skip = len(decode([self._anchor], **options)[0])
        raw = [
            text[skip:] for text in decode([self._anchor + list(s) for s in suffixes], **options)
        ]
        coded = self._chat.encode([self._left + text + self._right for text in raw])
        out: list[str | None] = []
        for ids, text, whole in zip(suffixes, raw, coded, strict=True):
            good = whole == self.before + tuple(ids) + self.after and text.startswith(self._lead)
            suffix = text[len(self._lead) :]
            out.append(suffix if good and suffix == suffix.strip() and suffix else None)
        return out


def allowed_ids(tokenizer: Any, vocab: int, *, ascii_only: bool, device: Any) -> Tensor:
    """[V] bool: ids a suffix may have. No special or added ones, none the tokenizer does not know,
    and if asked for only those whose text is printable ASCII."""
    known = min(len(tokenizer), vocab)
    texts = tokenizer.batch_decode([[i] for i in range(known)])
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[:known] = torch.tensor(
        [bool(t) and (not ascii_only or (t.isascii() and t.isprintable())) for t in texts]
    )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    mask[[i for i in special if i < vocab]] = False
    return mask.to(device)


def distinct(candidates: Tensor, current: Tensor) -> list[Ids]:
    """Rows of [B, S] without repetitions and without `current`, in their order."""
    rows = dict.fromkeys(map(tuple, candidates.tolist()))
    rows.pop(tuple(current.tolist()), None)
    return list(rows)
