"""trl's SFTTrainer with the constrained loss of arXiv 2406.05946.

    from deepalign_kernels.trl import ConstrainedSFTConfig, ConstrainedSFTTrainer

Tokens, labels and response positions come from `deepalign_kernels.data`, the loss is computed
inside the model's own output head (`hf.attach`), and everything else is trl's: packing, PEFT,
DeepSpeed, evaluation, checkpoints, reports. An SFT script changes in two names, of the classes.
"""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        'deepalign_kernels.trl needs trl: pip install "deepalign_kernels[train]"'
    ) from error

from deepalign_kernels.trl.config import ConstrainedSFTConfig
from deepalign_kernels.trl.trainer import ConstrainedSFTTrainer

__all__ = ["ConstrainedSFTConfig", "ConstrainedSFTTrainer"]
