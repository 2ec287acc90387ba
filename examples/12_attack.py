"""How deep a model's safety goes: attacks with harmless prompts into a run, judged, with intervals.

Needs the extra "eval". Untrained, the model neither answers nor refuses; the numbers mean nothing.
"""

import tempfile

from deepalign_kernels.toyworld import World, build_model, build_tokenizer

tokenizer = build_tokenizer()
model = build_model(tokenizer).eval()
records = World(limit=6).records("restricted")
folder = tempfile.mkdtemp()

# --8<-- [start:attack]
from deepalign_kernels.attack import GCG, Compose, Decoding, Prefill
from deepalign_kernels.attack.suite import evaluate, judge_run
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.judge import Keywords
from deepalign_kernels.runs import Run, cells, read_records, read_verdicts

engine = LocalEngine(model, tokenizer, mode="exact")
prompts = [
    Prompt(str(n), r["messages"][0]["content"], answer=r["messages"][1]["content"])
    for n, r in enumerate(records)
]
gcg = GCG(steps=3, width=32, init="mix mix mix", target="sure , here is", max_new_tokens=8)
attacks = {
    "prefill": Prefill(depths=(0, 5, 10), max_new_tokens=16),
    "decoding": Decoding(temperatures=(0.5, 1.0), top_ks=(), top_ps=(), max_new_tokens=16),
    "gcg": gcg,
    "gcg+prefill": Compose(gcg, Prefill(depths=(5,), max_new_tokens=16)),
}
with Run(folder, {"model": "toy", "prompts": "six desserts"}) as run:
    evaluate(run, engine, attacks, prompts)
    judge_run(run, [Keywords(), Keywords("gcg", case=True)])

table = cells(read_records(folder, "sample"), read_verdicts(folder))
for cell in table:
    print(cell.attack, dict(cell.setting), cell.judge, cell.rate)
# --8<-- [end:attack]
