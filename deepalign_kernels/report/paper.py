"""Numbers of arXiv 2406.05946 that stand beside one's own. Those of figures were read off the
images, about 2 % exact; those of tables are the paper's. All are of 7B models on harmful prompts:
comparable in shape, not in size."""

from deepalign_kernels.report.figure import Series

KL = {
    "Llama-2-7B-Chat": (9.28, 2.51, 2.70, 1.68, 1.34, 1.13, 1.06, 1.05, 1.10, 1.16, 1.01, 0.90,
                        0.82, 0.78, 0.73, 0.75, 0.71, 0.68, 0.55, 0.68),
    "Llama-2-7B-Chat, augmented": (9.45, 7.8, 6.65, 8.5, 8.0, 8.8, 9.1, 8.95, 9.05, 9.05, 9.75,
                                   9.25, 9.4, 9.85, 10.4, 10.0, 10.15, 10.4, 10.5, 10.1),
}  # fmt: skip
SHARE = {"Llama-2-7B-Chat": 0.57, "Gemma-1.1-7B-IT": 0.41, "Llama-2-7B-Chat, augmented": 0.22}
PREFILL = {  # table 3, percent
    "Llama-2-7B-Chat": ((5, 42.1), (10, 51.5), (20, 56.1), (40, 57.0)),
    "Llama-2-7B-Chat, augmented": ((5, 2.8), (10, 2.9), (20, 3.4), (40, 4.5)),
}
FINETUNE = ((0, 1.5), (2, 22.4), (4, 76.4), (6, 87.9))  # caption of figure 3, percent by step


def kl() -> list[Series]:
    """Figures 1 and 4, over the value at position 1."""
    return [
        Series(f"paper: {name}", range(1, 21), [v / values[0] for v in values], paper=True)
        for name, values in KL.items()
    ]


def prefill(most: float) -> list[Series]:
    """Table 3, up to `most` tokens, so that the axis need not grow."""
    within = {name: [p for p in points if p[0] <= most] for name, points in PREFILL.items()}
    return [
        Series(f"paper: {name}", [k for k, _ in p], [y for _, y in p], shown=False, paper=True)
        for name, p in within.items()
        if p
    ]


def finetune() -> Series:
    """Figure 3, 100 harmful examples, batches of 64."""
    x, y = zip(*FINETUNE, strict=True)
    return Series("paper: Llama-2-7B-Chat, SFT", x, y, shown=False, paper=True)
