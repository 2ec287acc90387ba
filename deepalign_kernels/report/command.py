"""`deepalign report`: one page from runs."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from deepalign_kernels.report.page import build


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build one HTML page from analyses, attacks and training runs.

    Attributes:
        runs: folders of runs, or folders that hold such.
        out: path of the page.
        title: of the page.
    """

    runs: Positional[tuple[str, ...]]
    out: str = "report.html"
    title: str = "How deep does the alignment go?"


def run(options: Options) -> int:
    """Write the page.

    Raises:
        ValueError: as `build`.
    """
    page = build(options.runs, options.out, title=options.title)
    print(f"{page}: {page.stat().st_size / 1024:.0f} KiB")
    return 0
