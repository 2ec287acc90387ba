"""What a manifest tells of its run beside the rates: what was left out, what was checked before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepalign_kernels.runs.stats import wilson
from deepalign_kernels.runs.store import MEASURED
from deepalign_kernels.runs.table import percent

LEFT_OUT = {  # entry of the manifest: why
    "left_out": "they need a local model, not a server",
    "not_continued": "this server begins anew behind a given beginning of a reply",
}


def told(manifest: Mapping[str, Any]) -> list[str]:
    """A sentence each."""
    out = [
        f"NOT RUN: {', '.join(manifest[entry])}: {why}"
        for entry, why in LEFT_OUT.items()
        if manifest.get(entry)
    ]
    measured = manifest.get(MEASURED) or {}
    if measured.get("continues", False) is not False:  # None: the check could not tell
        kind = "checked" if measured["continues"] else "NOT VERIFIED"
        out.append(f"{kind}: the server goes on behind a given beginning of a reply")
    if found := measured.get("self_check"):
        rows, different = found["rows"], found["different"]
        rate = wilson(different, rows) if rows else None
        share = f": {100 * rate.value:.1f} % ({percent(rate)})" if rate else ""
        out.append(
            f"self-check: {different} of {rows} replies differ between modes exact and fast{share}"
        )
    return out
