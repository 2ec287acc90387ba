"""One page from runs: tables, figures, a verdict by stated rules.

    read      folders of runs -> typed contents
    figures   contents -> figures: series with intervals, heat maps, tables
    verdict   contents -> three sentences
    svg       a figure -> inline SVG
    page      all of it -> one HTML file without any reference to the outside

Reads files of `runs` and the log of a training run, and knows neither attacks nor analyses.
"""

from deepalign_kernels.report.page import build

__all__ = ["build"]
