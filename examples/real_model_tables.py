"""stub"""

from typing import Any


def mean(v):
    return sum(v) / len(v)


def line(m: Any) -> str:
    asr = " ".join(f"{100 * mean(v):.0f}" for v in m["asr"].values())
    kl = [mean(c) for c in zip(*[r[:5] for r in m["kl_base"]])]
    kb = [mean(c) for c in zip(*[r[:5] for r in m["kl_before"]])]
    return f"{m['alignment']} {m['variant']} {m['seed']}: asr {asr} | others {100 * mean(m['others_answered']):.0f} dates {100 * mean(m['dates_right']):.0f} odds {mean(m['odds']):.1f} margin {mean(m['margin']):.1f} kl {[round(x, 2) for x in kl]} before {[round(x, 2) for x in kb]} {m['favourites'][:4]} {m['cpu_seconds']}\n   {m['replies']}"


def machine():
    return {}


def text(d):
    return ""
