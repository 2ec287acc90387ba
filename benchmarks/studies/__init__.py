"""Single questions: growth, host time, parts of the CPU kernels, GCG, and the pages of docs/."""
