"""The constrained loss in a module of Lightning, inside the model's own head.

python examples/14_lightning.py [MODEL]
"""

import tiny
import torch
from pytorch_lightning import LightningModule, Trainer

from deepalign_kernels import hf
from deepalign_kernels.train import constrained_rows

model, tokenizer = tiny.load()

# --8<-- [start:lightning]
rows = constrained_rows(model, tokenizer, tiny.CHATS * 4)  # the model before training: reference


class Constrained(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = hf.attach(model)

    def training_step(self, batch, index):
        loss, inputs = hf.loss_of(batch)
        out = hf.compute_loss(self.model, loss, **inputs)
        self.log("log_ratio", out.parts["log_ratio"].mean())
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-5, betas=(0.5, 0.999))


loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=hf.collate)
trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(Constrained(model.train()), loader)
# --8<-- [end:lightning]
