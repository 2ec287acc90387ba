"""token_logp: never above 0, no cancellation at p close to 1, masked columns."""

import pytest
import torch

import deepalign_kernels as dak
from deepalign_kernels.testing import EPS32

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_no_cancellation_at_the_target(p, device):
    """F1: 1 - p_y to fp32 rounding of the sum, where a bf16 read-modify-write is wrong by 100 % at
    p = 0.999."""
    V = 1000
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 7] = torch.tensor(p / (1 - p) * (V - 1)).double().log()
    logits = logits.float().to(device)
    gold = logits.double().cpu().requires_grad_()
    (g64,) = torch.autograd.grad(gold.log_softmax(-1)[0, 7], gold)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        dak.token_logp(leaf, torch.tensor([7], device=device)).sum(), leaf
    )
    assert grad[0, 7].item() == pytest.approx(g64[0, 7].item(), rel=1e-5, abs=16 * EPS32)
    assert grad[0, 7] > 0


@pytest.mark.parametrize("V", [1, 3, 4096, 33000])
def test_never_above_zero(V, device, interpreted):
    """F8: the target's logit goes through the same arithmetic as the sum, so NLL >= 0."""
    g = torch.Generator().manual_seed(V)
    rows = 5 if interpreted else 64
    logits = torch.randn(rows, V, generator=g) * 0.01
    target = torch.randint(0, V, (rows,), generator=g)
    logits[torch.arange(rows), target] += torch.linspace(0, 40, rows)
    for dtype in (torch.float32, torch.bfloat16):
        assert dak.token_logp(logits.to(device, dtype), target.to(device)).max() <= 0


def test_one_column_is_certain(device):
    x = torch.tensor([[3.0], [-1e4], [1e4]], device=device, requires_grad=True)
    logp = dak.token_logp(x, torch.zeros(3, dtype=torch.long, device=device))
    assert not logp.any()
    assert not torch.autograd.grad(logp.sum(), x)[0].any()


def test_padding_columns_do_not_count(device):
    """F7: columns masked with -inf add nothing; a masked target has log-probability -inf."""
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(device)
    padded = torch.full((3, 512), -torch.inf, device=device)
    padded[:, :500] = x
    target = torch.tensor([1, 2, 3], device=device)
    torch.testing.assert_close(
        dak.token_logp(padded, target), dak.token_logp(x, target), rtol=1e-6, atol=1e-6
    )
    assert dak.token_logp(padded, torch.tensor([511, 2, 3], device=device))[0] == -torch.inf


def test_denormal_probabilities(device):
    """F25: a column 95 nats below the maximum has a denormal probability in fp32; the sum must not
    break."""
    x = torch.full((1, 100), -95.0, device=device)
    x[0, 3] = 0.0
    logp = dak.token_logp(x, torch.tensor([5], device=device))
    assert logp.item() == pytest.approx(-95.0, rel=1e-6)


@pytest.mark.parametrize("V", [7, 5000])
def test_nan_logits_show(V, device):
    x = torch.zeros(2, V, device=device)
    x[0, V // 2] = torch.nan
    logp = dak.token_logp(x, torch.tensor([0, 0], device=device))
    assert logp[0].isnan() and not logp[1].isnan()


@pytest.mark.parametrize("bad", [7, 2**40, -1, -(2**40)])
def test_target_out_of_range_poisons_its_row(bad, device):
    """F14: NaN in value and gradient of that row alone, without a device sync."""
    x = torch.zeros(3, 7, device=device, requires_grad=True)
    target = torch.tensor([1, bad, 2], device=device)
    logp = dak.token_logp(x, target)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert logp[1].isnan() and torch.isfinite(logp[[0, 2]]).all()
    assert grad[1].isnan().all() and torch.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("ignore", [-100, 2, -1, 7, 99])
def test_ignore_index(ignore, device):
    """F14: also a valid column, or past the vocabulary."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(device)
    target = torch.tensor([1, ignore, 3, ignore], device=device)
    logp = dak.token_logp(x, target, ignore_index=ignore)
    assert not logp[[1, 3]].any() and (logp[[0, 2]] < 0).all()
