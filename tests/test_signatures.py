"""A row op's signature is written in Python, in both schemas and in C++: all say the same. (That
csrc/cpu and csrc/cuda define what ops.h declares, the compiler checks.)"""

import importlib
import inspect
import pathlib
import re

import pytest
import torch

from deepalign_kernels import backends

OPS_H = pathlib.Path(__file__).parent.parent / "csrc" / "ops.h"
TYPES = {"MaybeTensor": "Tensor | None", "int64_t": "int", "double": "float"}
TYPES |= {"Optional[Tensor]": "Tensor | None"}


def of_function(room, op):
    module = importlib.import_module(f"deepalign_kernels.{room}.{backends.STEMS[op]}")
    parameters = inspect.signature(getattr(module, op)).parameters.values()
    return [(p.name, p.annotation) for p in parameters]


def of_schema(namespace, op):
    schema = getattr(getattr(torch.ops, namespace), op).default._schema
    return [(a.name, TYPES.get(str(a.type), str(a.type))) for a in schema.arguments]


def of_header(op):
    (found,) = re.findall(rf"\b{op}\(([^)]*)\);", OPS_H.read_text())
    pairs = (argument.split() for argument in found.split(","))
    return [(name, TYPES.get(kind, kind)) for kind, name in pairs]


@pytest.mark.parametrize("op", backends.OPS)
def test_all_signatures_of_an_op_agree(op):
    expected = of_function("reference", op)
    if not backends.unavailable("triton", op, "cpu"):
        assert of_function("triton_kernels", op) == expected
    if not backends.unavailable("native", op, "cpu"):
        assert of_schema("deepalign_native", op) == expected
        assert of_header(op) == expected
    if hasattr(torch.ops.deepalign, op):  # there the op makes `out` itself
        without = [p for p in expected if p[0] != "out"]
        assert of_schema("deepalign", op) == without
