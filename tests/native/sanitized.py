"""Prints the names of the cases that the library at the given path solves; run with the sanitizers' own libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from native_problems import CASES

from jacobiflow import native
from jacobiflow.native import build

loaded = native.load_library(Path(sys.argv[1]))
build._loaded = lambda: SimpleNamespace(library=loaded)
for name, case in CASES.items():
    flow = case.flow()
    z = case.z(flow)
    # Copies of weights that are not contiguous must live until they are used.
    for parameter in flow.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    torch.set_num_threads(case.threads)
    if case.block(flow).exact_inverse(z, case.context()).isfinite().all():
        print(name)
