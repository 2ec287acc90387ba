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


def examples_of(
    tokenizer: Any,
    data: Any,
    encoding: Encoding,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> Iterator[Example]:
    """Examples of whatever `rows_of` takes, in order, few of them in memory at a time.

    Args:
        tokenizer: as in `tokenize_chat`.
        data: see `rows_of`.
        encoding: see there.
        workers: processes beside this one; None: one for each processor but one, at most 16, from
            2048 conversations on; 0: none.
        progress: a line on the terminal, if it takes longer than two seconds.

    Raises:
        ValueError: as `tokenize_chat`.
    """
    template, rows = ChatTemplate(tokenizer), rows_of(data)
    first = list(islice(rows, FEW))
    if workers is None:
        workers = min((os.cpu_count() or 1) - 1, 16) if len(first) == FEW else 0
    if "fork" not in multiprocessing.get_all_start_methods():
        workers = 0  # other ways would run the caller's main module again
    chunks = _chunks(chain(first, rows))
    examples = _here(template, chunks, encoding)
    if workers:
        examples = _elsewhere(template, chunks, encoding, workers)
    return _shown(examples) if progress else examples


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _encoded(template: ChatTemplate, chunk: list[Row], encoding: Encoding) -> list[Example]:
    conversations = [check_record(row, where, encoding.unknown_keys) for row, where in chunk]
    return encode(template, conversations, encoding)


def _here(
    template: ChatTemplate, chunks: Iterable[list[Row]], encoding: Encoding
) -> Iterator[Example]:
    for chunk in chunks:
        yield from _encoded(template, chunk, encoding)


def _elsewhere(
    template: ChatTemplate, chunks: Iterable[list[Row]], encoding: Encoding, workers: int
) -> Iterator[Example]:
    waiting: deque[Future[list[Example]]] = deque()
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
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(template: ChatTemplate, encoding: Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that a fork does not have
    _worker = template, encoding


def _work(chunk: list[Row]) -> list[Example]:
    return [compact(example) for example in _encoded(_worker[0], chunk, _worker[1])]


def _shown(examples: Iterator[Example]) -> Iterator[Example]:
    from tqdm import tqdm

    with tqdm(examples, "tokenising", unit=" conversations", disable=None, delay=2) as bar:
        yield from bar
