"""Fused per-token KL and constrained fine-tuning losses between a policy and a reference model.

The method is that of "Safety Alignment Should Be Made More Than Just a Few Tokens Deep"
(arXiv 2406.05946). Importing this package needs torch alone and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from deepalign_kernels.backends import use_backend
from deepalign_kernels.losses import BetaSchedule, reduce_tokens, response_positions
from deepalign_kernels.ops import (
    ConstrainedParts,
    Direction,
    HeadOptions,
    LinearConstrainedParts,
    LinearOptions,
    MemoryEstimate,
    Reduction,
    TokenProfile,
    TokenStats,
    checked,
    constrained_loss,
    estimate_memory,
    linear_constrained_loss,
    linear_token_kl,
    linear_token_logp,
    linear_token_profile,
    linear_token_stats,
    token_entropy,
    token_kl,
    token_logp,
    token_stats,
)
from deepalign_kernels.rules import Rule

if TYPE_CHECKING:
    from deepalign_kernels import (  # noqa: F401
        analyze,
        attack,
        data,
        generate,
        hf,
        judge,
        plan,
        report,
        runs,
        toyworld,
        train,
        trl,
    )

_LAZY = (
    *("analyze", "attack", "data", "generate", "hf", "judge", "plan", "report", "runs"),
    *("toyworld", "train", "trl"),
)

__version__ = "0.1.0"
__all__ = [
    "BetaSchedule",
    "ConstrainedParts",
    "Direction",
    "HeadOptions",
    "LinearConstrainedParts",
    "LinearOptions",
    "MemoryEstimate",
    "Reduction",
    "Rule",
    "TokenProfile",
    "TokenStats",
    "checked",
    "constrained_loss",
    "estimate_memory",
    "linear_constrained_loss",
    "linear_token_kl",
    "linear_token_logp",
    "linear_token_profile",
    "linear_token_stats",
    "reduce_tokens",
    "response_positions",
    "token_entropy",
    "token_kl",
    "token_logp",
    "token_stats",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`dak.train` and the other rooms need more than torch: imported when first asked for."""
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY, "__version__"})
