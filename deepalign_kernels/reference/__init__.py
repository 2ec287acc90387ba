"""The specification of every op in plain torch: formula, gradient, edge cases.

These functions are the oracle of the tests and the `eager` backend. Nothing here imports anything
but torch. Every other backend must give the same results within `deepalign_kernels.testing`.
"""
