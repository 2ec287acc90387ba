"""The demo's three figures. The only file of the toy world that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign_kernels.toyworld import claims

WIDTH, HEIGHT, DPI = 6.4, 3.6, 150  # inches, inches, dots per inch
COLORS = {
    claims.BASE: "#7f7f7f",
    claims.ALIGNED: "#1f77b4",
    claims.DEEP: "#2ca02c",
    claims.ATTACK_SFT: "#d62728",
    claims.ATTACK_PAPER: "#9467bd",
    claims.ATTACK_TWO: "#17becf",
    claims.ATTACK_UNIFORM: "#ff7f0e",
}


def draw(result: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write the figures of one seed's result as PNG into `out`; {caption: path}."""
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    return {
        "KL to the base model at each position of a restricted answer. The aligned model differs"
        " from its base in the first tokens only.": _kl(result, out / "kl_per_position.png"),
        "Attack success when the first k tokens of the answer are prefilled.": _prefill(
            result, out / "prefill.png"
        ),
        "Attack success without prefill while the aligned model is fine-tuned on 100 restricted"
        " pairs.": _attack(result, out / "attack.png"),
    }


def _axes(xlabel: str, ylabel: str) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained").add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _line(axes: Any, name: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    """One curve; every next one has smaller marks, so that equal curves can all be seen."""
    size = max(9 - 1.2 * len(axes.lines), 3)
    axes.plot(xs, ys, "o-", color=COLORS[name], label=name, markersize=size)


def _save(axes: Any, path: Path) -> Path:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.figure.savefig(path)
    return path


def _kl(result: dict[str, Any], path: Path) -> Path:
    axes = _axes("position in the answer (tokens)", "KL(model || base) (nats)")
    for name, values in result["kl"].items():
        _line(axes, name, range(1, len(values) + 1), values)
    axes.set_xticks([1, 5, 10, 15, 20])
    return _save(axes, path)


def _prefill(result: dict[str, Any], path: Path) -> Path:
    axes = _axes("prefilled answer tokens k", "attack success (%)")
    for row in result["rows"]:
        if row["name"] in COLORS:
            depths = [int(k) for k in row["asr"]]
            _line(axes, row["name"], depths, [100 * rate for rate in row["asr"].values()])
    axes.set_ylim(-4, 104)
    return _save(axes, path)


def _attack(result: dict[str, Any], path: Path) -> Path:
    axes = _axes("attack step", "attack success at k = 0 (%)")
    for name, points in result["attack_curves"].items():
        _line(axes, name, [step for step, _ in points], [100 * rate for _, rate in points])
    axes.set_ylim(-4, 104)
    return _save(axes, path)
