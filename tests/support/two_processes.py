"""Two gloo processes on this machine: a spawn that cannot hang the tests."""

import datetime
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def start(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )


def run_cases(rank, folder, cases, run):
    """`run(rank, *arguments)` of each case; its result, or its error, is a line of this process."""
    for case, arguments in cases.items():
        try:
            line = run(rank, *arguments)
        except Exception as error:  # the other tests still want their line
            line = f"{type(error).__name__}: {error}"
        with open(f"{folder}/rank{rank}.jsonl", "a") as file:
            file.write(json.dumps([case, line]) + "\n")
        dist.barrier()
    dist.destroy_process_group()


def spawn(worker, *arguments, limit=240.0):
    """{case: [what rank 0 got, what rank 1 got]}; a case that hangs is missing, and so are those
    after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        context = mp.spawn(worker, (folder, *arguments), nprocs=WORLD, join=False)
        deadline = time.monotonic() + limit
        try:
            while time.monotonic() < deadline and not context.join(timeout=5):
                pass
        except Exception as error:
            print(f"a worker ended early: {error}")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        lines = {}
        for rank in range(WORLD):
            if os.path.exists(f"{folder}/rank{rank}.jsonl"):
                with open(f"{folder}/rank{rank}.jsonl") as file:
                    for case, line in map(json.loads, file):
                        lines.setdefault(case, []).append(line)
        return lines
