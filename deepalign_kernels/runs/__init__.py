"""Records of experiments: kept, gone on with, counted.

    record    the schema: what an attack or an analysis yields
    journal   an append-only file that survives a kill
    store     the folder of a run: manifest, units, resume, progress
    stats     intervals, paired tests, agreement of judges
    table     from samples and verdicts to rates
    grids     rates of whole grids of settings, and those that the paper has too

Imports `progress` alone. `report` reads runs through this and knows neither attacks nor analyses.
"""

from deepalign_kernels.runs.record import Record, derived_seed
from deepalign_kernels.runs.store import (
    Run,
    Unit,
    fill,
    read_manifest,
    read_records,
    read_verdicts,
)
from deepalign_kernels.runs.table import Cell, cells

__all__ = [
    "Cell",
    "Record",
    "Run",
    "Unit",
    "cells",
    "derived_seed",
    "fill",
    "read_manifest",
    "read_records",
    "read_verdicts",
]
