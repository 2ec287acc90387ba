"""Fifteen minutes, or more, on one GPU (benchmarks/gpu.sh), and what follows from them."""
