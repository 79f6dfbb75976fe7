"""What setup.py, constraints.txt and kernels.py must agree on, without building an environment (that is
.ci/run's part).
"""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib

from transport_geometry import kernels

import pytest

ROOT = kernels.HERE


@pytest.fixture(scope="module")
def declared():
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    kept, original = {}, setuptools.setup
    setuptools.setup = lambda **kw: kept.update(kw)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return kept


def test_modules_exist_and_the_hash_is_the_one_kernels_compares(declared):
    assert all((ROOT / f"{name}.py").is_file() for name in declared["py_modules"])
    flags = declared["ext_modules"][0].extra_compile_args["cxx"]
    assert f'-DBUILD_SOURCE="{kernels._source_hash()}"' in flags
    assert not any("fast-math" in f or "march" in f for f in flags)


def test_every_requirement_is_pinned_within_its_range(declared):
    requirements = pytest.importorskip("packaging.requirements")
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    canonical = lambda name: re.sub("[-_.]+", "-", name).lower()
    pins = {canonical(name): version for name, version in (x.split("==") for x in lines)}
    # pins itself, and is in no committed result
    assert all("==" in text for text in declared["extras_require"]["parity"])
    for text in declared["install_requires"] + declared["extras_require"]["test"]:
        wanted = requirements.Requirement(text)
        assert wanted.specifier.contains(pins[canonical(wanted.name)]), text
    assert f'"torch=={pins["torch"]}"' in (ROOT / "setup.py").read_text()  # the build environment's torch
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any(r.startswith("torch") for r in requires) and f"pybind11=={pins['pybind11']}" in requires


def said_in(folder, *, env_python=sys.executable):
    code = "import torch, kernels; x = torch.ones(2, 3); print(kernels.topk_encode(x, x, x[:, 0], 1)[1].tolist(), kernels.describe())"
    return subprocess.run(
        [env_python, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_without_the_extension_it_runs_and_gives_the_reason(tmp_path):
    shutil.copy(ROOT / "kernels.py", tmp_path)
    (tmp_path / "_kernels.py").write_text(
        "raise ImportError('libtorch_cuda.so: cannot open shared object file', name='libtorch_cuda')\n"
    )
    broken = said_in(tmp_path)
    assert "[[0], [0]]" in broken and "NOT BUILT" in broken and "libtorch_cuda.so" in broken
    (tmp_path / "_kernels.py").write_text("raise ModuleNotFoundError('no _kernels', name='_kernels')\n")
    (tmp_path / "_kernels_not_built.txt").write_text("the C++ build failed: no compiler\n")
    assert "NOT BUILT (the C++ build failed: no compiler)" in said_in(tmp_path)


@pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")
def test_a_stale_extension_says_so(tmp_path):
    shutil.copy(ROOT / "kernels.py", tmp_path)
    shutil.copy(kernels._module.__file__, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / "ops.cpp").write_text("// edited\n")
    assert "C++ (" in (said := said_in(tmp_path)) and "STALE" in said
