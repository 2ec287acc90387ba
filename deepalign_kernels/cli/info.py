"""`deepalign info`: what `python -m deepalign_kernels` prints."""

from __future__ import annotations

import dataclasses

from deepalign_kernels import __main__ as report


@dataclasses.dataclass(frozen=True)
class Options:
    """Versions; which backend runs each op on each device, and why."""


def run(options: Options) -> None:
    report.main()
