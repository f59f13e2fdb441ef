"""Building the kernels: with and without a compiler, under the sanitizers, and what nvcc makes of them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip("ninja")
pytest.importorskip("pybind11")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, in which nothing is compiled."""
    unwanted = shutil.ignore_patterns(".*", "build", "runs", "datasets", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "fedgs", ignore=unwanted)


def build(checkout, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=checkout, env=os.environ | environment, text=True, capture_output=True)


def compiled(checkout):
    return list((checkout / "csrc").glob("_kernels*.so"))


def test_without_a_compiler_the_rest_is_installed(checkout):
    result = build(checkout, PATH="", CXX="")
    assert result.returncode == 0 and not compiled(checkout)
    assert "no kernels compiled, there is no C++ compiler (looked for $CXX, c++, g++ and clang++)" in result.stderr


@needs_compiler
def test_kernels_can_be_left_out(checkout):
    result = build(checkout, FEDGS_KERNELS="torch")
    assert result.returncode == 0 and not compiled(checkout) and "no kernels compiled, as asked" in result.stderr


@needs_compiler
def test_a_build_that_fails_shows_the_command_and_the_way_out(checkout):
    (checkout / "csrc" / "kernels.h").write_text("#error an edit that went wrong\n")
    result = build(checkout, FEDGS_KERNELS="cpp")
    assert result.returncode != 0 and not compiled(checkout)
    assert "FEDGS_KERNELS=torch" in result.stderr and re.search(r"-c csrc/(kernels_cpu|bindings).cpp", result.stdout)
    assert "an edit that went wrong" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize("variable, value", [("FEDGS_KERNELS", "fast"), ("TORCH_CUDA_ARCH_LIST", "Hopper")])
def test_variables_that_cannot_be_read(checkout, variable, value):
    if variable == "FEDGS_KERNELS" or shutil.which("nvcc"):
        result = build(checkout, **{variable: value})
        assert result.returncode != 0 and variable in result.stderr and value in result.stderr
        assert "Traceback" not in result.stderr


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer as Linux does")
def test_cpu_kernels_under_the_sanitizers(checkout):
    """The tests of the CPU kernels once more, with AddressSanitizer and UBSan watching kernels_cpu.cpp."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], text=True, capture_output=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("this compiler has no AddressSanitizer")
    result = build(checkout, FEDGS_KERNELS="cpp", CXX="g++", CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all")
    assert result.returncode == 0, result.stdout + result.stderr
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_kernels.py", "-k", "(cpu or bit or refused) and not round", "-p", "no:cacheprovider"]
    environment = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(checkout)}
    tests = subprocess.run(command, cwd=checkout, env=os.environ | environment, text=True, capture_output=True)
    assert tests.returncode == 0 and re.search(r"\d\d passed", tests.stdout), tests.stdout + tests.stderr


def nvcc(*options):
    command = ["nvcc", "-std=c++17", "-O3", *options, str(ROOT / "csrc" / "kernels_cuda.cu")]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_cuda_kernels_compile_without_warnings_and_spill_nothing(architecture, tmp_path):
    report = nvcc(f"-arch=sm_{architecture}", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC",
                  "-Xptxas", "-v", "-c", "-o", str(tmp_path / "kernels.o"))
    assert "warning" not in report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 10 and set(spills) == {("0", "0", "0")}


@needs_nvcc
def test_cuda_kernels_load_and_store_16_bytes_at_a_time(tmp_path):
    nvcc("-arch=compute_90", "-ptx", "-o", str(tmp_path / "kernels.ptx"))
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", (tmp_path / "kernels.ptx").read_text(), re.DOTALL))
    counts = {}
    for name, text in kernels.items():
        name = re.search(r"(adamw|mask_difficulty|aggregate|norms)_kernel(\w*?)EEv|norms_kernel", name)[0]
        counts[name] = [len(re.findall(rf"{what}\.global\S*\.v4", text)) for what in ("ld", "st")]
    assert counts["adamw_kernelILi4ELb1EEEv"] == [5, 4] and counts["adamw_kernelILi4ELb0EEEv"] == [4, 3]
    assert counts["aggregate_kernelILi4EEEv"] == [4 + 4, 4]  # for each of a thread's four: theta and an update; out
    assert [counts[f"mask_difficulty_kernelI{pixel}EEv"] for pixel in "hfl"] == [[4, 0]] * 3


def test_every_module_is_installed():
    named = set(re.search(r"py_modules=\[(.*?)\]", (ROOT / "setup.py").read_text())[1].replace('"', "").split(", "))
    assert named == {path.stem for path in ROOT.glob("*.py")} - {"setup"}
