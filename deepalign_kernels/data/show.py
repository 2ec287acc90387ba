"""What is trained, token by token, as text: a wrong mask shows at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepalign_kernels.data.examples import IGNORE, Example

HEADER = f"{'':>6} {'id':>7}  {'text':<24} {'trained':<8}{'position':>8}{'beta':>7}{'weight':>8}"


def token_rows(
    tokenizer: Any, example: Example, beta_of: Callable[[Sequence[int]], Sequence[float]]
) -> list[dict[str, Any]]:
    """One record per token: index, id, text, trained, position, beta, weight.

    Args:
        tokenizer: its `decode` is asked.
        example: see there.
        beta_of: response positions -> beta, which the example's scale then multiplies.

    Returns:
        position, beta and weight are None where the token is not trained. The first token never is:
        nothing predicts it.
    """
    betas = beta_of(list(example.positions))
    weights = [1.0] * len(example.labels) if example.weights is None else example.weights
    out = []
    for index, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        trained = index > 0 and label != IGNORE
        out.append(
            {
                "index": index,
                "id": int(token),
                "text": tokenizer.decode([token]),
                "trained": trained,
                "position": int(example.positions[index]) if trained else None,
                "beta": float(betas[index]) * example.beta_scale if trained else None,
                "weight": float(weights[index]) if trained else None,
            }
        )
    return out


def token_table(rows: Sequence[dict[str, Any]], context: int | None = 8) -> str:
    """`token_rows` as a table. Of runs without a trained token only `context` on each side are
    shown; None: all."""
    lines, at = [HEADER], 0
    while at < len(rows):
        if rows[at]["trained"]:
            lines.append(_line(rows[at]))
            at += 1
            continue
        end = next((i for i in range(at, len(rows)) if rows[i]["trained"]), len(rows))
        run = rows[at:end]
        if context is None or len(run) <= 2 * context + 1:
            lines += map(_line, run)
        else:
            hidden = f"{'':>6} ... {len(run) - 2 * context} more tokens that are not trained ..."
            last = run[len(run) - context :]
            lines += [*map(_line, run[:context]), hidden, *map(_line, last)]
        at = end
    return "\n".join(line.rstrip() for line in lines)


def _line(row: dict[str, Any]) -> str:
    text = repr(row["text"])
    text = text if len(text) <= 24 else text[:21] + "..."
    line = f"{row['index']:>6} {row['id']:>7}  {text:<24} "
    if not row["trained"]:
        return line
    return f"{line}{'yes':<8}{row['position']:>8}{row['beta']:>7g}{row['weight']:>8g}"
