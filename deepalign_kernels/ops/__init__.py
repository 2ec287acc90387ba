"""Public ops: docstring, validation, fake, autograd. What runs is decided in `backends.py`."""

from deepalign_kernels.check import checked
from deepalign_kernels.ops._reduce import Reduction
from deepalign_kernels.ops.linear import known  # noqa: F401  registers its row functions
from deepalign_kernels.ops.linear.constrained_loss import (
    LinearConstrainedParts,
    linear_constrained_loss,
)
from deepalign_kernels.ops.linear.memory import MemoryEstimate, estimate_memory
from deepalign_kernels.ops.linear.options import HeadOptions, LinearOptions
from deepalign_kernels.ops.linear.token_kl import linear_token_kl
from deepalign_kernels.ops.linear.token_logp import linear_token_logp
from deepalign_kernels.ops.linear.token_profile import TokenProfile, linear_token_profile
from deepalign_kernels.ops.linear.token_stats import linear_token_stats
from deepalign_kernels.ops.logits.constrained_loss import ConstrainedParts, constrained_loss
from deepalign_kernels.ops.logits.token_entropy import token_entropy
from deepalign_kernels.ops.logits.token_kl import Direction, token_kl
from deepalign_kernels.ops.logits.token_logp import token_logp
from deepalign_kernels.ops.logits.token_stats import TokenStats, token_stats

__all__ = [
    "ConstrainedParts",
    "Direction",
    "HeadOptions",
    "LinearConstrainedParts",
    "LinearOptions",
    "MemoryEstimate",
    "Reduction",
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
    "token_entropy",
    "token_kl",
    "token_logp",
    "token_stats",
]
