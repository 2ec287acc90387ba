"""Token ids in, token ids and log-probs out: a prefill of k tokens is exactly k tokens.

engine    what goes in and comes out
sampling  the next token of each row, by settings and random number of its own
cache     keys and values, under either of their names
local     any causal LM of transformers: shared keys and values, exact or fast
server    any OpenAI-compatible server: retries, limits, checks
"""

from deepalign_kernels.generate.engine import Engine, Reply, Request, Sampling

__all__ = ["Engine", "Reply", "Request", "Sampling"]
