"""Thirty minutes on one GPU (benchmarks/gpu.sh), and what follows from them."""
