"""The constrained loss as a plugin of Axolotl: in its YAML

plugins: [constrained.Plugin]   # this file, as constrained.py where Python finds it
constrained_data: chats.jsonl   # in place of Axolotl's own datasets, whose columns it would need
sample_packing: false
"""

# --8<-- [start:plugin]
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from deepalign_kernels import hf
from deepalign_kernels.train import constrained_rows


class ConstrainedTrainer(hf.ConstrainedMixin, AxolotlTrainer):
    """Axolotl's, with the loss in the model's own head."""


class Arguments(BaseModel):
    constrained_data: str


class Plugin(BasePlugin):
    def get_input_args(self):
        return f"{__name__}.Arguments"

    def get_trainer_cls(self, cfg):
        return ConstrainedTrainer

    def post_trainer_create(self, cfg, trainer):  # the model has not moved: it is the reference
        data = cfg.constrained_data
        trainer.train_dataset = constrained_rows(trainer.model, trainer.processing_class, data)
        trainer.data_collator = hf.collate


# --8<-- [end:plugin]
