"""The maths on token vectors: schedule, positions, reductions."""

import pytest
import torch

import deepalign_kernels as dak


def test_the_schedule_of_the_paper():
    beta = dak.BetaSchedule()(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 700]]))
    assert torch.equal(beta, torch.tensor([[0.1, 0.5, 2, 2], [2, 2, 0.1, 0.1]]))


def test_other_schedules():
    positions = torch.tensor([1, 2, 3], dtype=torch.int32)
    assert dak.BetaSchedule.uniform(0.3)(positions).tolist() == pytest.approx([0.3] * 3)
    assert dak.BetaSchedule(first=1, prefix=3, rest=0, prefix_length=2)(positions).tolist() == [
        1,
        3,
        0,
    ]
    assert dak.BetaSchedule(prefix_length=0)(positions).tolist() == pytest.approx([0.1] * 3)


def test_a_table_holds_by_position_and_its_last_entry_from_there_on():
    values = [0.5, 2, 0.3, 0, 0.7]

    def one_by_one(positions):
        every = [values[min(p, 5) - 1] if p else values[-1] for p in positions.flatten().tolist()]
        return torch.tensor(every, dtype=torch.float32).reshape(positions.shape)

    schedule = dak.BetaSchedule(table=values)
    for dtype in (torch.int32, torch.int64):
        positions = torch.tensor([[1, 2, 3, 4], [5, 6, 700, 0]], dtype=dtype)
        assert torch.equal(schedule(positions), one_by_one(positions))
    assert schedule(positions).dtype == torch.float32
    assert schedule == dak.BetaSchedule(table=tuple(values)) and hash(schedule) is not None
    many = torch.arange(50)
    paper = dak.BetaSchedule(table=[0.5, 2, 2, 2, 2, 0.1])
    assert torch.equal(paper(many), dak.BetaSchedule()(many))
    assert dak.BetaSchedule(table=[3])(many).unique().tolist() == [3]


@pytest.mark.parametrize(
    "kw",
    [
        {"table": []},
        {"table": 0.5},
        {"table": "0.5"},
        {"table": [0.5, -1]},
        {"table": [0.5, float("nan")]},
        {"table": [0.5, True]},
        {"table": [0.5, 2], "rest": 0.2},
        {"table": [0.5, 2], "prefix_length": 2},
        {"first": -1},
        {"prefix": float("nan")},
        {"rest": "x"},
        {"prefix_length": -1},
        {"prefix_length": 2.0},
    ],
)
def test_a_wrong_schedule_is_refused(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        dak.BetaSchedule(**kw)


def test_positions_restart_at_every_turn():
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100, 8, 9], [1, 2, -100, -100, 3, -100, 4, 5]])
    expected = torch.tensor([[0, 0, 1, 2, 3, 0, 1, 2], [1, 2, 0, 0, 1, 0, 1, 2]])
    assert torch.equal(dak.response_positions(labels), expected)
    assert torch.equal(dak.response_positions(labels[0]), expected[0])


def test_positions_restart_at_every_packed_document():
    """Two documents that touch, the second without a prompt."""
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert dak.response_positions(labels).tolist() == [[1, 2, 3, 4, 5]]
    packed = dak.response_positions(labels, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert packed.tolist() == [[1, 2, 3, 1, 2]]


def test_positions_against_a_loop():
    g = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(20, 50, generator=g) < 0.6, 7, -1)
    restart = torch.rand(20, 50, generator=g) < 0.1
    position_ids = torch.zeros(20, 50, dtype=torch.long)
    expected = torch.zeros(20, 50, dtype=torch.long)
    for b in range(20):
        doc = run = 0
        for t in range(50):
            doc = 0 if restart[b, t] else doc + 1
            position_ids[b, t] = doc
            run = 0 if labels[b, t] == -1 else (1 if t and restart[b, t] else run + 1)
            expected[b, t] = run
    assert torch.equal(
        dak.response_positions(labels, ignore_index=-1, position_ids=position_ids), expected
    )


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.bool),
        [1, 2],
    ],
    ids=str,
)
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        dak.response_positions(labels)


def test_wrong_position_arguments_are_refused():
    labels = torch.zeros(3, dtype=torch.long)
    for position_ids in (torch.zeros(4, dtype=torch.long), [0, 1, 2]):
        with pytest.raises(ValueError, match="position_ids"):
            dak.response_positions(labels, position_ids=position_ids)
    with pytest.raises(ValueError, match="ignore_index"):
        dak.response_positions(labels, ignore_index="x")
    for positions in (torch.zeros(3), [1, 2]):
        with pytest.raises(ValueError, match="positions"):
            dak.BetaSchedule()(positions)


def test_reductions():
    values, valid = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, True, False])
    assert dak.reduce_tokens(values, valid).item() == 1.5
    assert dak.reduce_tokens(values, valid, reduction="sum").item() == 3
    assert torch.equal(dak.reduce_tokens(values, valid, reduction="none"), values)
    assert dak.reduce_tokens(values, valid, normalizer=6).item() == 0.5
    assert dak.reduce_tokens(values, valid, normalizer=torch.tensor(6)).item() == 0.5
    assert dak.reduce_tokens(values * 0, ~valid & False).item() == 0
    many = torch.ones(70_000, dtype=torch.float16)  # neither count nor sum fits fp16
    for reduction, expected in (("mean", 1.0), ("sum", 70_000.0)):
        result = dak.reduce_tokens(many, many > 0, reduction=reduction)
        assert result.dtype == torch.float32 and result.item() == pytest.approx(expected, rel=1e-6)
    large = torch.full((10,), 3e38)  # nor does this sum fit fp32
    assert dak.reduce_tokens(large, large > 0).item() == pytest.approx(3e38, rel=1e-6)
    for wrong in (valid.float(), [True, True, False]):
        with pytest.raises(ValueError, match="valid"):
            dak.reduce_tokens(values, wrong)
    for wrong in ([1.0, 2.0, 0.0], values.long()):
        with pytest.raises(ValueError, match="values"):
            dak.reduce_tokens(wrong, valid)
    with pytest.raises(ValueError, match="reduction"):
        dak.reduce_tokens(values, valid, reduction="avg")


def test_reduced_token_losses_equal_the_fused_loss():
    g = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(6, 40, generator=g), torch.randn(6, 40, generator=g)
    target = torch.tensor([1, 2, -100, 3, -100, 4])
    kw = dict(beta=0.5, ref_logits=ref)
    tokens = dak.constrained_loss(policy, target, reduction="none", **kw)
    torch.testing.assert_close(
        dak.reduce_tokens(tokens, target != -100), dak.constrained_loss(policy, target, **kw)
    )
