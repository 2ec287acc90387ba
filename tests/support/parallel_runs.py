"""Runs of one process and of two, to be compared: gradients, weights, log, checkpoints."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import log_of
from two_processes import WORLD

from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.ranks import Ranks
from deepalign_kernels.train.state import full_state

STEPS = 5  # of four conversations: 4, 3, 4, 3, 4


def make(out, processes, callbacks=(), lora=False, tied=False, dtype=torch.float64, **options):
    """The same run for one process and for two.

    fp64, where it is known: AdamW turns the rounding of a gradient near 0 into a whole step.
    """
    base = {"batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": STEPS, "seed": 3}
    base |= {"learning_rate": 3e-3, "warmup_steps": 1, "progress": False}
    base |= options
    if processes == 1:
        base["batch_size"] *= WORLD
        base |= {"parallel": "auto", "cpu_offload": False}
    model = build_model(0, tie_word_embeddings=tied).to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config).to(dtype)
    parts = (model, build_tokenizer(), TrainConfig(out, **base), RECORDS, None, callbacks)
    return TrainingRun(*parts, eval_data=RECORDS[:3])


def whole_gradient(p):
    """What the optimizer is about to use of a parameter; None if there is nothing."""
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p) if p.requires_grad else None
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


@contextlib.contextmanager
def seen_gradients(run):
    """Yields the list of each step's gradients, before they are clipped."""
    steps, update = [], run._update

    def look():
        every = {n: whole_gradient(p) for n, p in run.model.named_parameters()}
        steps.append({n: x.cpu().clone() for n, x in every.items() if x is not None})
        return update()

    with mock.patch.object(run, "_update", look):
        yield steps


def is_shared_out(p):
    return hasattr(p, "ds_tensor") or (hasattr(p, "to_local") and p.to_local().shape != p.shape)


def trained(out, processes, **options):
    """(gradients of every step, weights at the end, log) of a run."""
    run = make(out, processes, **options)
    with seen_gradients(run) as steps:
        result = run.train()
    sharded = processes > 1 and options["parallel"] in ("fsdp", "zero3")
    assert any(map(is_shared_out, run.model.parameters())) == sharded
    return steps, full_state(run.model), result


def distance(ours, gold):
    top = max(x.abs().max().item() for x in gold.values())
    assert ours.keys() == gold.keys(), ours.keys() ^ gold.keys()
    return max((ours[n] - gold[n]).abs().max().item() for n in gold) / top


def run_case(rank, folder, name, options):
    """[gradients, weights, log, checkpoint of the other number of processes] of two against one."""
    place = Path(folder) / name.replace(" ", "-")
    steps, weights, _ = trained(place / "two", 2, **options)
    if rank:
        dist.barrier()
    else:
        own = alone(place / "one", options, steps, weights, place / "two")
        dist.barrier()
    # One process stopped two steps before the end; two go on.
    resumed = make(place / "stopped", 2, **options)
    resumed.train(resume=True)
    again = full_state(resumed.model)
    if rank:
        return None
    return [*own, distance(again, weights)]


def alone(place, options, steps, weights, two):
    """In the first process, the other waiting: the run of one process, and one that stops."""
    with mock.patch.object(Ranks, "here", lambda device: Ranks()):
        gold, gold_weights, _ = trained(place, 1, **options)

        def stop(run, record):
            if record["step"] == run.total_steps - 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(place.parent / "stopped", 1, callbacks=[stop], **options).train()
    assert len(gold) == len(steps) == options.get("max_steps", STEPS)
    gradients = max(distance(a, b) for a, b in zip(steps, gold, strict=True))
    lines = zip(_steps(two), _steps(place), strict=True)
    log = max(abs(a[k] - b[k]) for a, b in lines for k in a if b[k] is not None)
    return [gradients, distance(weights, gold_weights), log]


def _steps(out):
    """All numbers of the log's lines about steps and about held-out data, but for the speed."""
    rows, out = [r for r in log_of(out) if r["event"] in ("step", "eval")], []
    for row in rows:
        flat = {k: v for k, v in row.items() if not k.endswith(("_at", "tokens_per_s", "event"))}
        for k, values in row.items():
            flat |= {f"{k} {n}": v for n, v in enumerate(values)} if k.endswith("_at") else {}
        out.append(flat)
    return out


def compute_before(rank, folder, options):
    """`compute_reference` of two sharded processes: its files against one process's, and that a
    run finds them. The largest difference of a log-probability."""
    place = Path(folder) / "before"
    made = make(place / "two", 2, **options).compute_reference()
    with mock.patch("deepalign_kernels.train.reference.compute", side_effect=AssertionError):
        make(place / "two", 2, **options).train()
    dist.barrier()
    if rank:
        return None
    with mock.patch.object(Ranks, "here", lambda device: Ranks()):
        alone = make(place / "one", 1, **options).compute_reference()
    assert [k.path.name for v in made.values() for k in v] == [
        k.path.name for v in alone.values() for k in v
    ]
    pairs = [
        [torch.frombuffer(bytearray((k.path / "logp.bin").read_bytes()), dtype=torch.float32)
         for k in both] for name in alone for both in zip(made[name], alone[name], strict=True)
    ]  # fmt: skip
    return max((a - b).abs().max().item() for a, b in pairs)
