"""What `benchmarks/gpu.sh` does: calls, their steps, the peers' wheels, and what they answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

COMMAND_SECONDS = 600  # a command may take so long
TOTAL_SECONDS = 900  # and the GPU is there for so long, unless --seconds says otherwise
START_SECONDS = 75  # of them go by before the first command runs
BETWEEN_SECONDS = 10  # and so many around each call: files come and go
CARRY_BYTES = 64 << 20  # may travel with one call, the working tree included

# Python 3.12 on x86-64 Linux with torch 2.11 and triton 3.6; nothing of theirs is fetched again.
# nvidia-cutlass-dsl 4.7.0 is the newest with which quack-kernels 0.6.5 imports.
WHEELS = (
    "liger_kernel==0.8.5", "trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19",
    "cut_cross_entropy==25.1.1", "quack-kernels==0.6.5", "nvidia-cutlass-dsl==4.7.0",
    "nvidia-cutlass-dsl-libs-base==4.7.0", "nvidia-cutlass-dsl-libs-core==4.7.0",
    "nvidia-cutlass-dsl-libs-cu13==4.7.0", "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5", "torchao==0.18.0", "torch-optimi==0.3.3", "accelerate==1.15.0",
)  # fmt: skip
PART_BYTES = 45_000_000  # a wheel that is larger travels in parts, one with each call

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
LOGITS = "native,triton,plain,compile,liger-ce,liger-jsd"
LINEAR = "native,triton,gemms,compile,liger-flce-16,liger-flsce"
LOGITS_PEERS = "triton,liger-ce,liger-jsd,trl,quack"
LINEAR_PEERS = (
    "triton,gemms,liger-flce-16,liger-flce-sm90,liger-flsce,liger-fljsd,liger-chunked,"
    "quack-linear,trl-chunked,trl-divergence,cce"
)
MAIN_OPS = "token_logp,token_kl/policy_ref,constrained_loss/ref_logits"
LINEAR_OPS = "linear_token_logp,linear_constrained_loss"
METRICS = ",".join(
    (
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        "dram__bytes_write.sum",
        "smsp__inst_executed.sum",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    )
)


@dataclass(frozen=True)
class Step:
    """One command. seconds: as predicted. limit: it is stopped after so many. command: Python's
    arguments, or with `tool` that program's, "{out}" being the folder of the results; rehearsal:
    the same at tiny shapes on a CPU, None: nothing to play there. env: added to the environment.
    """

    name: str
    seconds: int
    limit: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None
    tool: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One command of at most COMMAND_SECONDS. wheels: it uses the peers'. parts: which of the parts
    of large wheels travel with it."""

    number: int
    name: str
    steps: tuple[Step, ...]
    wheels: bool = False
    parts: tuple[int, ...] = ()

    @property
    def seconds(self) -> int:
        return sum(s.seconds for s in self.steps)

    @property
    def limit(self) -> int:
        return sum(s.limit for s in self.steps)


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _sanitizer(tool: str, backend: str, seconds: int, limit: int) -> Step:
    """Every op of a backend under one tool of compute-sanitizer. Triton first compiles what the
    tests before it have not; two rows of one length keep that short."""
    ops = ("-m", "benchmarks", "each_op", "--backend", backend)
    ops += ("--shapes", "6x4096,6x50257") if backend == "triton" else ()
    # Every tensor its own allocation, so that a step past the end of one is seen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    own = ("--tool", tool, "--error-exitcode", "86", "--print-limit", "20", sys.executable, *ops)
    tiny = (*ops, "--device", "cpu", "--shapes", "6x257")
    return Step(f"{tool} {backend}", seconds, limit, own, tiny, "compute-sanitizer", alone)


def _tests(call: int, workers: int, most: int, *which: str) -> tuple[str, ...]:
    return (*PYTEST, "-n", str(workers), f"--maxfail={most}", "--durations=5", *which)


def _run(kind: str, options: str, file: str) -> tuple[str, ...]:
    return ("-m", "benchmarks", kind, *_split(options), "--json", "{out}/" + file)


def _log(call: int) -> dict[str, str]:
    return {"DEEPALIGN_TEST_LOG": f"{{out}}/tests-{call}.jsonl"}


CONFORMANCE = _split(
    "tests/ops/test_conformance.py"
    " tests/linear/test_linear_values.py tests/linear/test_linear_saved.py"
    " tests/ops/test_token_kl.py tests/ops/test_token_logp.py tests/ops/test_token_stats.py"
    " tests/ops/test_constrained_loss.py"
)
TINY = "--quick --device cpu --dtypes fp32 --seconds 0.01 --rounds 2"
CALLS = (
    Call(1, "right", (
        Step("environment", 15, 40, ("-m", "benchmarks", "gpu", "environment"),
             ("-m", "benchmarks", "gpu", "environment")),
        Step("tests of the GPU", 90, 160, _tests(1, 4, 12, "tests/ops/test_gpu.py"),
             (*PYTEST, "tests/ops/test_gpu.py", "-k", "native and 4096 and dtype0"), "", _log(1)),
        _sanitizer("memcheck", "triton", 35, 80),
        *(_sanitizer(tool, "native", 20, 45) for tool in ("memcheck", "racecheck", "synccheck")),
    )),
    Call(2, "conformance", (
        Step("conformance", 140, 300, _tests(2, 10, 40, "-k", "cuda-triton", *CONFORMANCE),
             (*PYTEST, "-k", "cpu-native and parts", "tests/ops/test_token_kl.py"), "", _log(2)),
    )),
    Call(3, "fast", (
        Step("logits", 90, 150,
             _run("run", f"--device cuda --shapes 8192x128256 --ops {MAIN_OPS}"
                         f" --providers {LOGITS} --limit 100", "logits.json"),
             _run("run", f"{TINY} --shapes 12x640 --ops token_logp --providers {LOGITS}",
                  "logits.json")),
        Step("linear", 85, 150,
             _run("linear", f"--device cuda --shapes 8192x4096x128256 --ops {LINEAR_OPS}"
                            f" --providers {LINEAR} --limit 100", "linear.json"),
             _run("linear", f"{TINY} --shapes 32x16x640 --ops linear_token_logp"
                            f" --providers {LINEAR}", "linear.json")),
    ), wheels=True),
    Call(4, "choose", (
        Step("plans", 130, 220,
             ("-m", "benchmarks", "sweep", "plans", "--limit", "160", "--json", "{out}/plans.json"),
             ("-m", "benchmarks", "sweep", "plans", "--device", "cpu", "--shapes", "2x257", "--ops",
              "token_logp_fwd,token_logp_fused", "--seconds", "0.01", "--json",
              "{out}/plans.json")),
        Step("chunks", 30, 60,
             ("-m", "benchmarks", "sweep", "chunks", "--json", "{out}/chunks.json"),
             ("-m", "benchmarks", "sweep", "chunks", "--device", "cpu", "--dtype", "fp32",
              "--shapes", "64x32x512", "--workspaces", "1,2", "--json", "{out}/chunks.json")),
    ), parts=(0,)),
    Call(5, "counters", (
        *(Step(f"ncu {backend}", 45, 90,
               ("--clock-control", "none", "--csv", "--print-units", "base", "--metrics", METRICS,
                "-k", "regex:_rows|_grad|_token|_constrained", "--log-file",
                f"{{out}}/ncu-{backend}.csv", sys.executable, "-m", "benchmarks", "each_op",
                "--backend", backend, "--shapes", "2048x128256"), None, "ncu")
          for backend in ("triton", "native")),
        Step("conformance native", 140, 300,
             _tests(5, 10, 40, "-k", "cuda-native", *CONFORMANCE),
             (*PYTEST, "-k", "cpu-native and parts", "tests/ops/test_token_kl.py"), "", _log(5)),
    ), parts=(1,)),
    Call(6, "peers", (
        Step("logits peers", 150, 240,
             _run("run", f"--device cuda --shapes 8192x128256,8192x32000"
                         f" --providers {LOGITS_PEERS} --limit 180", "logits-peers.json"),
             _run("run", f"{TINY} --shapes 12x640 --providers {LOGITS_PEERS}",
                  "logits-peers.json")),
        Step("linear peers", 200, 310,
             _run("linear", f"--device cuda --shapes 8192x4096x128256"
                            f" --providers {LINEAR_PEERS} --limit 220", "linear-peers.json"),
             _run("linear", f"{TINY} --shapes 32x16x640 --providers {LINEAR_PEERS}",
                  "linear-peers.json")),
    ), wheels=True),
    Call(7, "training", (
        Step("training under a limit", 290, 500,
             ("-m", "benchmarks", "capped", "--json", "{out}/training.json"),
             ("-m", "benchmarks", "capped", "--tiny", "--recipes", "1", "--length", "64",
              "--limits", "24", "--json", "{out}/training.json")),
    ), wheels=True),
)  # fmt: skip
LOGITS_FILES = ("logits.json", "logits-peers.json")
LINEAR_FILES = ("linear.json", "linear-peers.json")

TORCHRUN = "torchrun --nproc-per-node 2"  # on a machine with two GPUs
# Everything that only a GPU can say, and the command that says it.
ONLY_A_GPU = (
    ("Does every kernel launch, wait for nothing, replay in a graph, agree with plain torch?", "1"),
    ("Does memcheck find nothing in the Triton and CUDA C++ kernels, and racecheck and", ""),
    ("  synccheck nothing in CUDA C++?", "1"),
    ("Do compiled Triton kernels keep the error budget in every mode?", "2"),
    ("How fast are the main ops beside plain torch, torch.compile, Liger and their GEMMs?", "3"),
    ("Which launch plans win, and which ops belong into CUDA_CPP_VERIFIED?", "4 (with 1 and 5)"),
    ("Which workspace and chunk do the linear ops want?", "4"),
    ("How many bytes and instructions does a kernel really take?", "5"),
    ("Do the CUDA C++ kernels keep the error budget in every mode?", "5"),
    ("How fast are all ops beside the kernels of TRL, QuACK, cce and the rest of Liger?", "6"),
    ("What do recipes for 24 and 48 GiB take, and how many tokens a second do they train?", "7"),
    ("What does a step of GCG cost?", "python -m benchmarks gcg --json OUT/gcg.json"),
    ("Do results grow linearly with T and V?", "python -m benchmarks growth --out OUT"),
    ("Do vocabulary shards work over NCCL?", f"{TORCHRUN} -m benchmarks.gpu.shards"),
    ("Do the Triton kernels run on ROCm?", "the same tests on such a GPU (call 2)"),
)


def fits(call: Call, seconds: float, spent: float = START_SECONDS) -> bool:
    """Whether `call`, as predicted, ends within `seconds`, of which `spent` are gone."""
    return spent + call.seconds + BETWEEN_SECONDS <= seconds


def affordable(seconds: float) -> tuple[Call, ...]:
    """The first calls, in order, that end within `seconds` as predicted."""
    spent, found = float(START_SECONDS), []
    for call in CALLS:
        if not fits(call, seconds, spent):
            break
        spent += call.seconds + BETWEEN_SECONDS
        found.append(call)
    return tuple(found)
