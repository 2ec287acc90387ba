"""Two ranks, each with a part of the vocabulary, give the loss and gradient of one.

torchrun --nproc-per-node 2 examples/08_tensor_parallel.py
"""

import torch
import torch.distributed as dist

import deepalign_kernels as dak

# --8<-- [start:group]
dist.init_process_group("gloo")  # "nccl" on GPUs
group = dist.group.WORLD  # of a DeviceMesh: mesh.get_group("tp")
# --8<-- [end:group]
torch.manual_seed(0)  # the same tensors on both ranks, of which each keeps its columns
policy_logits, ref_logits = torch.randn(2, 6, 1000), torch.randn(2, 6, 1000)
labels = torch.randint(0, 1000, (2, 6))
mine = slice(0, 600) if dist.get_rank() == 0 else slice(600, 1000)
shard = policy_logits[..., mine].clone().requires_grad_()
ref_shard = ref_logits[..., mine]

# --8<-- [start:loss]
loss = dak.constrained_loss(shard, labels, beta=1.0, ref_logits=ref_shard, process_group=group)
loss.backward()  # the gradient of this shard, without communication
# --8<-- [end:loss]

full = policy_logits.requires_grad_()
expected = dak.constrained_loss(full, labels, beta=1.0, ref_logits=ref_logits)
expected.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(shard.grad, full.grad[..., mine])
print(f"rank {dist.get_rank()}: loss {loss.item():.4f}, the same as on one rank")
dist.destroy_process_group()
