"""Conversations to examples as a stream, on several processes where there are many."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any

from deepalign_kernels.data.examples import Encoding, Example, compact, encode
from deepalign_kernels.data.reading import Row, rows_of
from deepalign_kernels.data.records import check_record
from deepalign_kernels.data.template import ChatTemplate

CHUNK = 256  # conversations that a process takes at a time
FEW = 8 * CHUNK  # not worth other processes

_worker: tuple[ChatTemplate, Encoding]  # of a process of the pool
Encoded = tuple[list[Example], list[str]]  # of a chunk; and why others are left out


def examples_of(
    tokenizer: Any,
    data: Any,
    encoding: Encoding,
    *,
    workers: int | None = None,
    progress: bool = False,
    skipped: list[str] | None = None,
) -> Iterator[Example]:
    """Examples of whatever `rows_of` takes, in order, few of them in memory at a time.

    Args:
        tokenizer: as in `tokenize_chat`.
        data: see `rows_of`.
        encoding: see there.
        workers: processes beside this one; None: one for each processor but one, at most 16, from
            2048 conversations on; 0: none.
        progress: a line on the terminal, if it takes longer than two seconds.
        skipped: of each record that is left out (`on_bad_record="skip"`), where it stands and what
            is wrong with it is added here.

    Raises:
        ValueError: as `tokenize_chat`.
    """
    skips, skipped = encoding.on_bad_record == "skip", [] if skipped is None else skipped
    template, rows = ChatTemplate(tokenizer), rows_of(data, keep_broken=skips)
    first = list(islice(rows, FEW))
    if workers is None:
        workers = min((os.cpu_count() or 1) - 1, 16) if len(first) == FEW else 0
    if "fork" not in multiprocessing.get_all_start_methods():
        workers = 0  # other ways would run the caller's main module again
    chunks = _chunks(chain(first, rows))
    every = _here(template, chunks, encoding)
    if workers:
        every = _elsewhere(template, chunks, encoding, workers)
    examples = _kept(every, skipped)
    return _shown(examples) if progress else examples


def _kept(every: Iterable[Encoded], skipped: list[str]) -> Iterator[Example]:
    for examples, wrong in every:
        skipped += wrong
        yield from examples


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def encoded(template: ChatTemplate, chunk: list[Row], encoding: Encoding) -> Encoded:
    """(Examples of these rows; why others are left out). The one place where a bad record ends the
    run or is left out."""
    try:
        conversations = [check_record(row, where, encoding.unknown_keys) for row, where in chunk]
        return encode(template, conversations, encoding), []
    except ValueError as error:
        if encoding.on_bad_record == "error":
            raise
        if len(chunk) == 1:
            return [], [str(error)]
    ones = [encoded(template, [row], encoding) for row in chunk]
    return [e for kept, _ in ones for e in kept], [why for _, wrong in ones for why in wrong]


def _here(
    template: ChatTemplate, chunks: Iterable[list[Row]], encoding: Encoding
) -> Iterator[Encoded]:
    for chunk in chunks:
        yield encoded(template, chunk, encoding)


def _elsewhere(
    template: ChatTemplate, chunks: Iterable[list[Row]], encoding: Encoding, workers: int
) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(template, encoding),
    ) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # no more in memory than keeps them busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(template: ChatTemplate, encoding: Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that a fork does not have
    _worker = template, encoding


def _work(chunk: list[Row]) -> Encoded:
    examples, wrong = encoded(_worker[0], chunk, _worker[1])
    return [compact(example) for example in examples], wrong


def _shown(examples: Iterator[Example]) -> Iterator[Example]:
    from tqdm import tqdm

    with tqdm(examples, "tokenising", unit=" conversations", disable=None, delay=2) as bar:
        yield from bar
