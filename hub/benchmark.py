"""Workloads for `kernels benchmark`: each op beside the plain torch that it stands for."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Logits(Benchmark):
    """Ops on the logits of two models."""

    seed = 0
    tokens, vocabulary = 256, 32768

    def setup(self) -> None:
        shape = (1, self.tokens, self.vocabulary)
        self.policy = torch.randn(shape, device=self.device)
        self.ref = self.policy + 0.3 * torch.randn(shape, device=self.device)
        self.target = torch.randint(self.vocabulary, shape[:2], device=self.device)

    def log_prob(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, self.target[..., None])[..., 0]

    def benchmark_token_logp(self) -> None:
        self.out = self.kernel.token_logp(self.policy, self.target)

    def verify_token_logp(self) -> torch.Tensor:
        return self.log_prob(self.policy)

    def benchmark_token_kl(self) -> None:
        self.out = self.kernel.token_kl(self.policy, self.ref)

    def verify_token_kl(self) -> torch.Tensor:
        q, p = self.policy.log_softmax(-1), self.ref.log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1)

    def benchmark_constrained_loss(self) -> None:
        self.out = self.kernel.constrained_loss(
            self.policy, self.target, ref_logits=self.ref, beta=0.1, reduction="none"
        )

    def verify_constrained_loss(self) -> torch.Tensor:
        apart = self.log_prob(self.ref) - self.log_prob(self.policy)
        return 2 / 0.1 * F.softplus(0.1 * apart)


class HiddenStates(Benchmark):
    """The same loss from hidden states and the weights of a head: no logits in memory."""

    seed = 0
    tokens, width, vocabulary = 256, 512, 32768

    def setup(self) -> None:
        self.hidden = torch.randn(self.tokens, self.width, device=self.device)
        self.head = torch.randn(self.vocabulary, self.width, device=self.device) / 20
        self.target = torch.randint(self.vocabulary, (self.tokens,), device=self.device)

    def benchmark_linear_token_logp(self) -> None:
        self.out = self.kernel.linear_token_logp(self.hidden, self.head, self.target)

    def verify_linear_token_logp(self) -> torch.Tensor:
        logits = self.hidden @ self.head.T
        return logits.log_softmax(-1).gather(-1, self.target[..., None])[..., 0]
