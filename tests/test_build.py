"""Building the kernels: with and without a compiler, under sanitizers, and what nvcc produces."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("ninja")
pytest.importorskip("pybind11")

COMPILERS = ("c++", "g++", "clang++")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, in which nothing is compiled."""
    unwanted = shutil.ignore_patterns(
        ".*", "build", "runs", "datasets", "notebooks", "*.so", "*.egg-info", "__pycache__"
    )
    return shutil.copytree(ROOT, tmp_path / "fedgs", ignore=unwanted)


def call(command, folder, **environment):
    """Run a command in a folder, with more variables in its environment."""
    variables = os.environ | environment
    return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True)


def build(checkout, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return call(command, checkout, **environment)


def compiled(checkout):
    return list((checkout / "csrc").glob("_kernels*.so"))


# ------------------------------------------------------------------------------ what is installed


def test_every_module_is_installed():
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = project["tool"]["setuptools"]
    modules = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(setuptools["py-modules"]) == modules - {"setup"}
    assert set(setuptools["packages"]) == packages


def test_the_version_is_read_without_importing(checkout):
    """Torch need not be there to build, so whatever cannot be imported must not be."""
    source = (checkout / "fedgs.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    (checkout / "fedgs.py").write_text(f"import not_there\n{source}", encoding="utf-8")

    result = call([sys.executable, "setup.py", "--version"], checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == version


# --------------------------------------------------------------------------------------- compiling


def test_without_a_compiler_the_rest_is_installed(checkout):
    result = build(checkout, PATH="", CXX="")
    assert result.returncode == 0
    assert not compiled(checkout)
    reason = "there is no C++ compiler (looked for $CXX, c++, g++ and clang++)"
    assert f"no kernels compiled, {reason}" in result.stderr


@needs_compiler
def test_kernels_can_be_left_out(checkout):
    result = build(checkout, FEDGS_KERNELS="torch")
    assert result.returncode == 0
    assert not compiled(checkout)
    assert "no kernels compiled, as asked" in result.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_cpu_kernels_compile_without_warnings(checkout, cxx):
    if shutil.which(cxx) is None:
        pytest.skip(f"no {cxx}")
    result = build(checkout, FEDGS_KERNELS="cpp", CXX=cxx, CXXFLAGS="-Werror")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning" not in result.stdout
    assert len(compiled(checkout)) == 1
    assert f"compiling the C++ kernels with {cxx}, no CUDA kernels" in result.stderr


@needs_compiler
@pytest.mark.slow
def test_a_build_that_fails_shows_the_command_and_the_way_out(checkout):
    (checkout / "csrc" / "kernels.h").write_text("#error an edit that went wrong\n")
    result = build(checkout, FEDGS_KERNELS="cpp")
    assert result.returncode != 0
    assert not compiled(checkout)
    assert "FEDGS_KERNELS=torch" in result.stderr
    assert re.search(r"-c csrc/(kernels_cpu|bindings).cpp", result.stdout)
    assert "an edit that went wrong" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "variable, value",
    [
        ("FEDGS_KERNELS", "fast"),
        pytest.param("TORCH_CUDA_ARCH_LIST", "Hopper", marks=needs_nvcc),
    ],
)
def test_variables_that_cannot_be_read(checkout, variable, value):
    result = build(checkout, **{variable: value})
    assert result.returncode != 0
    assert variable in result.stderr
    assert value in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------ what was compiled


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer as Linux does")
def test_cpu_kernels_under_the_sanitizers(checkout):
    """Their tests once more, with AddressSanitizer and UBSan watching kernels_cpu.cpp."""
    asan = call(["g++", "-print-file-name=libasan.so"], checkout).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("this compiler has no AddressSanitizer")

    # The sanitizer looks for the function that throws before Python has loaded C++'s library.
    stdcxx = call(["g++", "-print-file-name=libstdc++.so.6"], checkout).stdout.strip()

    flags = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"
    result = build(checkout, FEDGS_KERNELS="cpp", CXX="g++", CXXFLAGS=flags)
    assert result.returncode == 0, result.stdout + result.stderr

    selected = "(cpu or bit or refused) and not round"
    # -s: pytest would otherwise keep what the sanitizer says before it ends the process.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["tests/test_kernels.py", "-k", selected]
    tests = call(
        command,
        checkout,
        LD_PRELOAD=f"{asan} {stdcxx}",
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONPATH=str(checkout),
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert re.search(r"\d\d passed", tests.stdout), tests.stdout


def nvcc(*options):
    """Compile the CUDA kernels. -> what nvcc said"""
    command = ["nvcc", "-std=c++17", "-O3", *options, "csrc/kernels_cuda.cu"]
    result = call(command, ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_cuda_kernels_compile_without_warnings_and_spill_nothing(architecture, tmp_path):
    host = ["-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC"]
    device = [f"-arch=sm_{architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    report = nvcc(*host, *device, "-c", "-o", str(tmp_path / "kernels.o"))
    assert "warning" not in report

    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    # Those in use, and the naive ones. Functions that they call are listed as well.
    assert report.count("Compiling entry function") == 10 + 7 <= len(spills)
    assert set(spills) == {("0", "0", "0")}


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_load_and_store_16_bytes_at_a_time(tmp_path):
    target = tmp_path / "kernels.ptx"
    nvcc("-arch=compute_90", "-ptx", "-o", str(target))

    loads = {}
    stores = {}
    texts = {}
    for symbol, text in re.findall(r"\.entry (\w+)\((.*?)\n}", target.read_text(), re.DOTALL):
        if "naive" in symbol:
            assert ".v4" not in text
            continue
        kernel = re.search(r"(adamw|mask_difficulty|aggregate)_kernelI\w*?EEv|norms_kernel", symbol)
        loads[kernel[0]] = len(re.findall(r"ld\.global\S*\.v4", text))
        stores[kernel[0]] = len(re.findall(r"st\.global\S*\.v4", text))
        texts[kernel[0]] = text

    accumulate, plain = "adamw_kernelILi4ELb1EEEv", "adamw_kernelILi4ELb0EEEv"
    assert (loads[accumulate], stores[accumulate]) == (5, 4)
    assert (loads[plain], stores[plain]) == (4, 3)

    # They are under way before anyone waits for the corrections.
    for kernel in (accumulate, plain):
        assert "v4" not in texts[kernel].split("bar.sync")[1].split("st.global")[0]

    # For each of a thread's four: total and an update; out.
    aggregate = "aggregate_kernelILi4EEEv"
    assert (loads[aggregate], stores[aggregate]) == (4 + 4, 4)

    for pixel in ("h", "f", "l"):
        masks = f"mask_difficulty_kernelI{pixel}EEv"
        assert (loads[masks], stores[masks]) == (4, 0)
