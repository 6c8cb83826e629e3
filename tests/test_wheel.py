"""The package as users get it: a wheel, in its own environment, away from the sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import jacobiflow as jf
from jacobiflow import native
from tests.helpers.native_problems import copying_compiler

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, pathlib
import jacobiflow as jf
from jacobiflow import native
from jacobiflow.data import load_images

def openmp():
    maps = pathlib.Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({line.split()[-1] for line in lines if "omp" in pathlib.Path(line.split()[-1]).name})

before, certificates = openmp(), {}
for name in ("digits-p1", "emoji-p2", "fashion-p2"):
    samples = jf.sample(jf.load(name), 2)
    assert samples.images.isfinite().all()
    certificates[name] = float(samples.residual.max())
assert openmp() == before, "a second pool of threads beside PyTorch's"
assert len(load_images("fashion-512", 28, 1).images) == 512
print(json.dumps({"file": jf.__file__, "certificates": certificates, "native": native.describe()}))
"""


def check_output(command: list[str | Path], folder: Path, **settings: str | Path) -> str:
    """The output of a command, which does not see this environment's settings for Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: without .git nothing is ignored but by name."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out", "dist", "build", "runs", "node_modules")
    shutil.copytree(ROOT, sources, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, sources]
    if (library := native.load_library()) is None:
        check_output(command, folder)
    else:  # compiled already; test_targets.py compiles what is in a wheel
        check_output(command, folder, CXX=copying_compiler(folder / "compiler", library.path))
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_its_data_and_its_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        metadata = next(name for name in sizes if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in sizes} == {"jacobiflow", metadata.split("/")[0]}
    assert {"jacobiflow/py.typed", "jacobiflow/data/emoji256.npz"} <= sizes.keys()
    licences = sorted(name.split("/", 2)[2] for name in sizes if ".dist-info/licenses/" in name)
    assert licences == ["LICENSE", "src/jacobiflow/data/EMOJI_LICENSE", "src/jacobiflow/data/FASHION_MNIST_LICENSE"]
    assert "License-Expression: Apache-2.0" in text
    assert re.findall(r"\]\((?!https://|#)[^)]*", text) == [], "links that PyPI does not resolve"
    assert sum(sizes.values()) < 48e6


def test_the_wheel_alone_draws_samples_and_runs_the_readme(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=os.name != "nt")
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    check_output([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
    (site,) = (tmp_path / "env").rglob("site-packages")
    # The dependencies come from this environment. Its own .pth files, an editable install's too, are not read there.
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    no_compiler = {"PATH": scripts, "CXX": "", "XDG_CACHE_HOME": tmp_path / "cache"}
    report = json.loads(check_output([scripts / "python", "-c", PROGRAM], tmp_path, **no_compiler))
    assert Path(report["file"]).is_relative_to(site), "that is not the wheel's package"
    if native.load_library() is not None:
        assert re.fullmatch("compiled for .*, in the wheel", report["native"])
    assert all(certificate <= 1e-3 for certificate in report["certificates"].values())

    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        output = check_output([scripts / "python", "-c", code], tmp_path, **no_compiler)
        assert output.splitlines() == re.findall(r"^# (.*)$", code.split("print(")[-1], re.MULTILINE)

    command = [scripts / "jacobiflow", "sample", "--model", "digits-p1", "--num", "2", "--out", "samples"]
    output = check_output(command, tmp_path, **no_compiler)
    assert "wrote samples/samples.png, manifest.json, strategy.json, 1 shard\n" in output
    assert sorted(os.listdir(tmp_path / "samples" / "shards")) == ["00000.npz"]


def test_the_conda_recipe_is_of_this_version_and_needs_what_the_wheel_needs() -> None:
    recipe = (ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8")
    assert f'version: "{jf.__version__}"' in recipe
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base", "huggingface-hub": "huggingface_hub"}
    needed = {"python >=3.10"}
    for requirement in map(Requirement, metadata.requires("jacobiflow") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "cli"}):
            bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            needed.add(f"{names.get(requirement.name, requirement.name)} {bounds}")
    assert needed == set(re.findall(r"- (.+)", recipe.partition("  run:\n")[2].partition("\n\n")[0]))
