"""Prints the names of the cases that the library at the given path solves; run with the sanitizers' own libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from jacobiflow.native import build
from tests.helpers.library_flows import CASES as FLOWS
from tests.helpers.library_flows import LARGE, NATIVE, check
from tests.helpers.native_problems import CASES

torch.set_grad_enabled(False)
loaded = build.load_library(Path(sys.argv[1]))
build._loaded = lambda: (loaded, "")
for name, case in CASES.items():
    flow = case.flow()
    z = case.z(flow)
    # Copies of weights that are not contiguous must live until they are used.
    for parameter in flow.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    torch.set_num_threads(case.threads)
    if case.block(flow).exact_inverse(z, case.context())[0].isfinite().all():
        print(name)
for name, (features, hidden) in LARGE.items():
    flow = FLOWS[name].make(2, features, hidden=hidden)
    check(flow, torch.randn(37, features), torch.randn(37, 2), threads=3)
    print(name)
for name in NATIVE:
    flow = FLOWS[name].make(2, 6, torch.float64)
    check(flow, torch.randn(70, 6).double(), torch.randn(1, 2).double().expand(70, 2))
    print(name)
