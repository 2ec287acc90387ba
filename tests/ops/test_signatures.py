"""A row op's signature is written in Python, in both schemas and in C++: all say the same. (That
csrc/cpu and csrc/cuda define what ops.h declares, the compiler checks.)"""

import importlib
import inspect
import pathlib
import re

import pytest
import torch

import deepalign_kernels as dak
from deepalign_kernels import backends
from deepalign_kernels.ops.linear import options

OPS_H = pathlib.Path(__file__).parents[2] / "csrc" / "ops.h"
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


LINEAR = {name: getattr(dak, name) for name in dak.__all__ if name.startswith("linear_")}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_ops_share_their_options(name):
    """One list, from which every op takes all; what an op names itself is not in it."""
    *own, rest = inspect.signature(LINEAR[name]).parameters.values()
    no_gradient = name in ("linear_token_stats", "linear_token_profile")
    shared = options.HeadOptions if no_gradient else options.LinearOptions
    assert rest.annotation == f"Unpack[{shared.__name__}]"
    assert not {p.name for p in own} & shared.__annotations__.keys()
    assert shared.__annotations__.keys() <= options._Head._field_defaults.keys()
    for field in shared.__annotations__:
        assert f"{field}:" in (options.HeadOptions.__doc__ or "") + (shared.__doc__ or "")


def test_a_misspelt_option_is_named():
    x, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"token_logp\(\) got .* 'tempratur'; did you mean 'temper"):
        dak.linear_token_logp(x, x, y, tempratur=2.0)
    with pytest.raises(TypeError, match="linear_token_stats.* unexpected .* 'grad_weight_dtype'"):
        dak.linear_token_stats(x, x, x, x, grad_weight_dtype=torch.float32)
