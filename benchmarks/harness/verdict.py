"""The targets this library sets itself, beside what was measured.

GPU targets: milliseconds on one H200 (8192 x 128256, bf16), from the floors and the best published
figures; on another card as much longer as its memory is slower. A target is met only if it is met
on every shape and dtype that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.cells import Row
from benchmarks.harness.report import bandwidth_of, best_of_ours, cells, ratio
from benchmarks.offline.cards import CARDS, Card, card_of

BYTES_PER_TOKEN = 1024  # "O(T) beyond the gradient": a few vectors per token, whatever V
NOISE = 1.03  # "never slower": two medians this close are equal


@dataclass(frozen=True)
class Target:
    """measure: (cell, ceilings) -> the figure, or None where the cell cannot say. good: whether it
    is met.
    """

    text: str
    ops: tuple[str, ...]
    phase: str | None
    measure: Callable[[dict[str, Row], Ceilings], float | None]
    good: Callable[[float], bool]
    form: str


def _ours(cell: dict[str, Row], device: str) -> Row | None:
    """On a CPU the targets are the native backend's; on a GPU the best one's."""
    return cell.get("native") if device == "cpu" else best_of_ours(cell)


def _speedup(over: str, device: str) -> Callable[[dict[str, Row], Ceilings], float | None]:
    return lambda cell, _: ratio(cell.get(over), _ours(cell, device))


def _bandwidth(device: str) -> Callable[[dict[str, Row], Ceilings], float | None]:
    def measure(cell: dict[str, Row], c: Ceilings) -> float | None:
        row = _ours(cell, device)
        if not row or not row.ms:
            return None
        return row.ideal_bytes / row.ms * 1e3 / bandwidth_of(row, c)

    return measure


def _in_fp32(measure: Callable[[dict[str, Row], Ceilings], float | None]) -> Callable:
    return lambda cell, c: measure(cell, c) if next(iter(cell.values())).dtype == "fp32" else None


def _arithmetic(cell: dict[str, Row], c: Ceilings) -> float | None:
    row = cell.get("native")
    return row.cached_rate / bandwidth_of(row, c) if row and row.cached_rate else None


def _memory(device: str) -> Callable[[dict[str, Row], Ceilings], float | None]:
    def measure(cell: dict[str, Row], _: Ceilings) -> float | None:
        row = _ours(cell, device)
        return None if not row or row.beyond_gradient is None else row.beyond_gradient / row.T

    return measure


def _at_least(n: float) -> Callable[[float], bool]:
    return lambda x: x >= n


def _common(device: str) -> list[Target]:
    every = tuple("token_logp token_kl constrained_loss token_stats".split())
    return [
        Target(
            "never slower than torch.compile",
            every,
            None,
            _speedup("compile", device),
            _at_least(1 / NOISE),
            "{:.3g}x",
        ),
        Target(
            f"extra memory beyond the gradient <= {BYTES_PER_TOKEN} bytes per token",
            every,
            None,
            _memory(device),
            lambda x: x <= BYTES_PER_TOKEN,
            "{:.0f} B",
        ),
    ]


def _of_products(device: str) -> Callable[[dict[str, Row], Ceilings], float | None]:
    return lambda cell, _: ratio(_ours(cell, device), cell.get("gemms"))


def linear_targets(device: str, card: Card | None = None) -> list[Target]:
    op = "linear_constrained_loss"
    every = (op, "linear_token_logp", "linear_token_kl")
    gemms, speed = _of_products(device), "{:.2f}x"
    return [
        Target(
            f"{op} fwd+bwd <= 1.15x its three GEMMs", (op,), "fwd_bwd", gemms, _at_most(1.15), speed
        ),
        Target(
            f"{op}, 70% masked <= 0.4x the unmasked GEMMs",
            (f"{op}/70% masked",),
            "fwd_bwd",
            gemms,
            _at_most(0.4),
            speed,
        ),
        *(
            Target(
                f"faster than {name}", every, None, _speedup(name, device), _at_least(1.0), speed
            )
            for name in ("plain", "compile")
        ),
    ]


def _at_most(n: float) -> Callable[[float], bool]:
    return lambda x: x <= n


def targets(device: str, card: Card | None = None) -> list[Target]:
    if device == "cpu":
        kl, plain = ("token_kl/policy_ref",), _speedup("plain", "cpu")
        dear = ("constrained_loss", "token_logp")
        return [
            Target("token_kl fwd >= 10x plain", kl, "fwd", plain, _at_least(10), "{:.3g}x"),
            Target(
                "token_kl fwd >= 70% of read bandwidth",
                kl,
                "fwd",
                _bandwidth("cpu"),
                _at_least(0.7),
                "{:.0%}",
            ),
            Target(
                "(the same from the cache: what arithmetic allows)",
                kl,
                "fwd",
                _arithmetic,
                _at_least(0.7),
                "{:.0%}",
            ),
            Target(
                "fp32 fwd in one sweep >= 80% of read bandwidth",
                ("token_logp", *kl, "token_kl/ref_policy", "constrained_loss"),
                "fwd",
                _in_fp32(_bandwidth("cpu")),
                _at_least(0.8),
                "{:.0%}",
            ),
            Target("token_kl fwd+bwd >= 8x plain", kl, "fwd_bwd", plain, _at_least(8), "{:.3g}x"),
            Target(
                "constrained_loss, token_logp fwd+bwd >= 5x plain",
                dear,
                "fwd_bwd",
                plain,
                _at_least(5),
                "{:.3g}x",
            ),
            *_common("cpu"),
        ]
    limits = {
        "token_logp": 1.65,
        "token_kl/policy_ref": 3.0,
        "token_kl/ref_policy": 3.0,
        "token_kl/js": 4.3,
        "constrained_loss/ref_logits": 2.3,
    }
    return [
        *(_on_card(op, ms, card or CARDS["H200"]) for op, ms in limits.items()),
        Target(
            "token_kl fwd >= 80% of read bandwidth",
            ("token_kl/policy_ref",),
            "fwd",
            _bandwidth("cuda"),
            _at_least(0.8),
            "{:.0%}",
        ),
        *_common("cuda"),
    ]


def _on_card(op: str, h200_ms: float, card: Card) -> Target:
    limit = h200_ms * CARDS["H200"].copy / card.copy if card.copy else 0.0

    def measure(cell: dict[str, Row], _: Ceilings) -> float | None:
        row = best_of_ours(cell)
        at = row and (row.T, row.V, row.dtype) == (8192, 128256, "bf16")
        return row.ms if row and at and card.copy else None

    text = f"{op} fwd+bwd <= {limit:.3g} ms (8192x128256 bf16, {card.name})"
    return Target(text, (op,), "fwd_bwd", measure, lambda ms: ms <= limit, "{:.3g} ms")


def judge(
    rows: Sequence[Row], ceilings: Ceilings, device: str, gpu: str = ""
) -> tuple[list[str], list[list[str]]]:
    """(header, lines): per target the worst figure on each shape and dtype, and whether all meet
    it. gpu: the name of the card that was measured.
    """
    by_cell = cells(rows)
    places = list(dict.fromkeys(f"{r.shape} {r.dtype}" for r in rows))
    lines = []
    choice = linear_targets if any(r.H for r in rows) else targets
    for t in choice(device, card_of(gpu, ceilings.copy)):
        found: dict[str, list[float]] = {place: [] for place in places}
        refused = False
        for (op, phase, *_), cell in by_cell.items():
            mine = op in t.ops or op.partition("/")[0] in t.ops
            if not mine or t.phase not in (None, phase):
                continue
            refused |= any(r.failed and r.group == "ours" for r in cell.values())
            figure = t.measure(cell, ceilings)
            if figure is not None:
                row = next(iter(cell.values()))
                found[f"{row.shape} {row.dtype}"].append(figure)
        figures = [figure for place in found.values() for figure in place]
        if not figures:
            state = "not measured"
        else:
            state = "met" if all(map(t.good, figures)) and not refused else "NOT MET"
        worst = [_worst(t, found[place]) for place in places]
        lines.append([t.text, *worst, state])
    return ["target", *places, "verdict"], lines


def _worst(t: Target, figures: list[float]) -> str:
    if not figures:
        return "-"
    bad = [x for x in figures if not t.good(x)]
    ordered = sorted(bad or figures)
    lowest_is_worst = t.good(float("inf"))
    return t.form.format(ordered[0] if lowest_is_worst else ordered[-1])
