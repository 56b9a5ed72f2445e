"""The examples in the docstrings of the kernels' package run, and every public op has one."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest
import torch

from catmllm_kernels.registry import OPS

MODULES = [
    "rounding",
    "schema",
    *(f"{op}.op" for op in OPS),
    "escn.layout",
    "linear_logprob.allowed",
    "varlen_attention.layout",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"catmllm_kernels.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("op", OPS)
def test_every_public_function_has_an_example(op: str) -> None:
    package = importlib.import_module(f"catmllm_kernels.{op}")
    functions = [f for f in (getattr(package, name) for name in package.__all__) if inspect.isfunction(f)]
    assert functions
    assert [f.__name__ for f in functions if ">>> " not in (f.__doc__ or "")] == []
