"""What pyproject.toml, setup.py, constraints.txt and the package must agree on; builds that fail; a wheel."""

import os
import pathlib
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

import common
from transport_geometry import PACKAGE, errors, kernels

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
# an installed copy asks nobody, and knows of no checkout
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def pins(file: str) -> dict[str, str]:
    """{name: version} of a constraints file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pinned = (line.split("#")[0].strip().split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned}


def requirements(*extras: str) -> list[Requirement]:
    """The dependencies, and those of extras."""
    wanted = sum((PROJECT["optional-dependencies"][extra] for extra in extras), PROJECT["dependencies"])
    return [Requirement(text) for text in wanted]


def run(*command, **kwargs) -> str:
    """What a command prints. Fails with what it says where it fails."""
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ALONE, **kwargs)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def setup():
    """What setup.py defines, and under "given" what it gives to setuptools."""
    given: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.setattr(sys, "path", sys.path.copy())
        return runpy.run_path(str(ROOT / "setup.py")) | {"given": given}


# ---------------------------------------------------------------------------------------- what is declared
def test_the_extension_knows_its_source_and_is_built_with_our_pybind11(setup):
    """The hash of csrc is the one that `kernels` compares; torch's pybind11 refuses TORCH_TARGET_VERSION."""
    extension = setup["given"]["ext_modules"][0]
    flags = extension.extra_compile_args["cxx"]
    assert f'-DBUILD_SOURCE="{kernels._source_hash()}"' in flags
    assert not any("fast-math" in flag or "march" in flag for flag in flags)
    ours, *others = extension.include_dirs
    assert (pathlib.Path(ours) / "pybind11/pybind11.h").is_file() and torch.__path__[0] not in ours and others


def test_every_requirement_is_pinned_within_its_range():
    pinned = pins("constraints.txt")
    for wanted in requirements("test"):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted
    # pins itself, and is in no committed result
    assert all("==" in text for text in PROJECT["optional-dependencies"]["parity"])


def test_the_build_is_against_the_pinned_torch(setup):
    pinned, requires = pins("constraints.txt"), PYPROJECT["build-system"]["requires"]
    assert f'"torch=={pinned["torch"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert not any(text.startswith("torch") for text in requires)
    assert f"pybind11=={pinned['pybind11']}" in requires
    assert setup["given"]["setup_requires"] == []  # torch is here: nothing is fetched for the build


def test_the_promised_floors_are_what_ci_tests():
    oldest = pins(".ci/oldest.txt")
    assert oldest.pop("torch") == pins("constraints.txt")["torch"]  # the file says why
    floors = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements()}
    for name, floor in floors.items():
        if name != "torch":
            released = re.fullmatch(rf"{re.escape(floor)}(\.0)*", oldest[name])
            assert released, f"{name}>={floor} is promised, and {oldest[name]} tested"


# ---------------------------------------------------------------------------------- without the extension
def said_in(folder: pathlib.Path) -> str:
    # an editable install finds what a folder lacks of the package in its own checkout
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)];"
        "import torch; from transport_geometry import kernels; x = torch.ones(2, 3);"
        "print(kernels.topk_encode(x, x, x[:, 0], 1)[1].tolist(), kernels.describe())"
    )
    return run(sys.executable, "-c", code, cwd=folder)


@pytest.fixture
def copy(tmp_path):
    """A folder with what `kernels` needs of the package, and no extension."""
    (tmp_path / "transport_geometry").mkdir()
    for name in ("__init__.py", "kernels.py"):
        shutil.copy(PACKAGE / name, tmp_path / "transport_geometry")
    return tmp_path


def test_without_the_extension_it_runs_and_gives_the_reason(copy):
    package = copy / "transport_geometry"
    (package / "_kernels.py").write_text("raise ImportError('libtorch_cuda.so: cannot open', name='torch')\n")
    broken = said_in(copy)
    assert "[[0], [0]]" in broken and "NOT BUILT" in broken and "libtorch_cuda.so" in broken
    # a file that is not there would be looked for in the editable install
    absent = "raise ModuleNotFoundError('no _kernels', name='transport_geometry._kernels')\n"
    (package / "_kernels.py").write_text(absent)
    (package / "_kernels_not_built.txt").write_text("the C++ kernels do not build: no compiler\n")
    assert "NOT BUILT (the C++ kernels do not build: no compiler)" in said_in(copy)


@pytest.mark.skipif(kernels.DEVICES != "cpu", reason="an extension for the CPU alone")
def test_with_the_cpus_kernels_alone_it_gives_the_reason(copy):
    shutil.copy(kernels._module.__file__, copy / "transport_geometry")
    assert "plain PyTorch on CUDA" not in said_in(copy) or torch.cuda.is_available()
    (copy / "transport_geometry/_kernels_not_built.txt").write_text("the CUDA kernels: no -lcudart\n")
    said = said_in(copy)
    assert "C++ (cpu" in said and "plain PyTorch on CUDA" in said and "no -lcudart" in said


@pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")
def test_a_stale_extension_says_so(copy):
    shutil.copy(kernels._module.__file__, copy / "transport_geometry")
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "csrc/ops.cpp").write_text("// edited\n")
    assert "C++ (" in (said := said_in(copy)) and "STALE" in said


# ----------------------------------------------------------------------------------- a build that fails
# a torch that says it is CUDA's, and an nvcc that does as it is told
BUILD = """
import runpy, sys, torch
from torch.utils import cpp_extension
if "{nvcc}":
    torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "{home}"
sys.argv = ["setup.py", "build_ext", "--build-lib", "built"]
runpy.run_path("setup.py", run_name="__main__")
"""
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo 'Cuda compilation tools, release 13.0, V13.0.88' && exit
for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done
{nvcc}
"""
LINKS = pytest.mark.skipif(
    platform.system() != "Linux" or not shutil.which("g++"), reason="a linker and its words: GNU's"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "nvcc, source, says, built",
    [
        ("echo nvcc fatal: Unsupported gpu architecture; exit 1", "int one;", "nvcc fatal: Unsupp", True),
        ('echo "int two;" | g++ -fPIC -x c++ -c - -o "$out"', "int one;", "cannot find -l", True),
        ("", '#include "no_such.h"', "no_such.h: No such file", False),
    ],
    ids=["nvcc fails", "no CUDA libraries", "the compiler fails"],
)
@LINKS
def test_what_a_build_cannot_build_it_leaves_out_and_says_why(tmp_path, nvcc, source, says, built):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    for name, text in {"ops.cpp": source, "encode.cpp": "int three;", "ops_cuda.cu": ""}.items():
        (tmp_path / "csrc" / name).write_text(text + "\n")
    (home := tmp_path / "cuda/bin").mkdir(parents=True)
    (home / "nvcc").write_text(NVCC.format(nvcc=nvcc))
    (home / "nvcc").chmod(0o755)
    code = BUILD.format(nvcc="yes" if nvcc else "", home=tmp_path / "cuda")
    environment = {name: value for name, value in ALONE.items() if name != "REQUIRE_KERNELS"}
    environment["TORCH_CUDA_ARCH_LIST"] = "9.0"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    folder = tmp_path / "built/transport_geometry"
    note = (folder / "_kernels_not_built.txt").read_text()
    assert bool(list(folder.glob("_kernels*.so"))) == built
    assert says in note and note.strip() in ran.stderr
    assert ("the CUDA kernels do not build" in note) == bool(nvcc)
    assert ("the C++ kernels do not build" in note) == (not built)


def test_a_source_tree_that_may_not_be_written_to_is_built_elsewhere(setup):
    assert not setup["given"]["options"]
    given: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(os, "access", lambda path, mode: False)
        runpy.run_path(str(ROOT / "setup.py"))
    for folder in (given["options"]["egg_info"]["egg_base"], given["options"]["build"]["build_base"]):
        assert not pathlib.Path(folder).is_relative_to(ROOT)


def test_a_torchvision_for_another_torch_is_named():
    """As transformers says it, whose models do not load beside one."""
    with pytest.raises(errors.UserError, match="torchvision is built for another torch"):
        with errors.one_line("--models stdlib-s"):
            why = RuntimeError("operator torchvision::nms does not exist")
            raise ModuleNotFoundError("Could not import module 'GPTNeoXForCausalLM'.") from why


# ------------------------------------------------------------------------------------------------- at start
def test_help_says_what_is_taken_where_a_flag_is_not_typed(capsys):
    with pytest.raises(SystemExit):
        common.parse_args("", {"models": "a,b,c,d,e", "k": "4,12", "expansion": 4}, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for default in ("a,...,e", "4,12", "4", "float32", "stdlib", "train", "base", "keep", "outputs/cache"):
        assert f"(default: {default})" in said, default
    assert "None" not in said


def test_what_takes_a_second_to_import_is_imported_where_it_is_used():
    heavy = {"transformers", "datasets", "scipy.stats", "matplotlib"}
    scripts = ", ".join(path.stem for path in [*ROOT.glob("exp*.py"), ROOT / "audit.py"])
    code = f"import {scripts}, sys; print({heavy} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"


# ------------------------------------------------------------------------------------------------- a wheel
@pytest.mark.slow
def test_a_wheel_from_the_source_archive_holds_the_package_and_its_kernels(tmp_path):
    """In an environment that sees this one's libraries, but none of its editable installs."""
    egg_info = ["egg_info", "--egg-base", tmp_path]
    run(sys.executable, "setup.py", "-q", *egg_info, "sdist", "-d", tmp_path, cwd=ROOT)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    (archive,) = tmp_path.glob("*.tar.gz")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", archive, "-w", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    run(*pip, "--python", environment / "bin/python", "install", "--no-deps", wheel, cwd=tmp_path)
    (site,) = environment.glob("lib/python*/site-packages")
    top = {path.name for path in site.iterdir()}
    assert top == {"transport_geometry", f"transport_geometry-{PROJECT['version']}.dist-info"}
    installed = {path.relative_to(site) for path in site.glob("transport_geometry/**/*.py")}
    assert installed == {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "from transport_geometry import audit, kernels; print(audit.__file__, kernels.in_short())"
    said = run(environment / "bin/python", "-c", code, cwd=tmp_path)
    assert said.startswith(str(site)) and ("fast kernels: on" in said or not kernels.BUILT)
