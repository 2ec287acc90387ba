"""The constrained loss in a loop with accelerate, inside the model's own head.

accelerate launch examples/15_accelerate.py [MODEL]
"""

import tiny
import torch
from accelerate import Accelerator

from deepalign_kernels import hf
from deepalign_kernels.train import constrained_rows

model, tokenizer = tiny.load()

# --8<-- [start:accelerate]
accelerator = Accelerator()
rows = constrained_rows(model, tokenizer, tiny.CHATS * 4)  # the model before training: reference
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=hf.collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.5, 0.999))
model, optimizer, loader = accelerator.prepare(hf.attach(model.train()), optimizer, loader)
for batch in loader:
    count = accelerator.reduce(hf.weight_of(batch))  # trained tokens of all processes
    loss, inputs = hf.loss_of(batch)
    out = hf.compute_loss(model, loss, **inputs, num_items_in_batch=count)
    accelerator.backward(out.loss * accelerator.num_processes)  # gradients are averaged
    optimizer.step()
    optimizer.zero_grad()
# --8<-- [end:accelerate]

print(f"loss {out.loss.item():.4f}, mean log ratio {out.parts['log_ratio'].mean().item():.4f}")
