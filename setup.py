"""Install FedGS and compile its kernels: `pip install -e .`, or `pip install -e ".[test]"` with what the tests need.

The kernels need a C++17 compiler ($CXX, c++, g++ or clang++), and the CUDA ones nvcc (in $CUDA_HOME/bin or on the PATH)
as well; no GPU, and no torch. What is missing is left out and named (`pip install -v` shows it): fedgs.py then runs on PyTorch.

    FEDGS_KERNELS=cpp pip install -e .                 # leave the CUDA kernels out; torch: leave all of them out
    TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX" pip install -e .
    CXXFLAGS="-g -march=native" python setup.py build_ext --inplace  # more flags for kernels_cpu.cpp
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD = Path("build/kernels")  # objects stay here, so that only what changed is compiled again
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# None of them changes a value: sqrt leaves errno alone, loops are vectorised though an operation in them could trap.
CPU_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -fopenmp-simd"
CUDA_ARCHITECTURES = "8.0 9.0+PTX"

NINJA = """\
builddir = {build}

rule cxx
  command = {cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule nvcc
  command = {nvcc} -ccbin {cxx} -std=c++17 -O3 {architectures} -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra $
    --threads 0 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule link
  command = {link} $in -o $out

build {build}/kernels_cpu.o: cxx csrc/kernels_cpu.cpp
  flags = {cpu_flags}
build {build}/bindings.o: cxx csrc/bindings.cpp
  flags = {binding_flags}
"""


class BuildKernels(build_ext):
    """Compiles csrc/ with ninja."""

    def build_extension(self, extension):
        wanted = os.environ.get("FEDGS_KERNELS", "cuda")
        if wanted not in ("cuda", "cpp", "torch"):
            sys.exit(f"FEDGS_KERNELS={wanted}: must be cuda, cpp or torch")
        cxx = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
        if wanted == "torch" or cxx is None:
            why = "as asked" if cxx else "there is no C++ compiler (looked for $CXX, c++, g++ and clang++)"
            print(f"fedgs: no kernels compiled, {why}; fedgs.py will run on PyTorch", file=sys.stderr)
            return
        nvcc = find_nvcc() if wanted == "cuda" else None
        print(f"fedgs: compiling the C++ kernels with {cxx}, " + (f"the CUDA kernels with {nvcc}" if nvcc else
              "no CUDA kernels (looked for nvcc in $CUDA_HOME and on the PATH)"), file=sys.stderr)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        built = BUILD / target.name
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.ninja").write_text(ninja_file(cxx, nvcc, built))
        if subprocess.run([sys.executable, "-m", "ninja", "-f", BUILD / "build.ninja"], cwd=ROOT).returncode:
            sys.exit("fedgs: compiling the kernels failed, see above. FEDGS_KERNELS=cpp leaves the CUDA kernels out, "
                     "FEDGS_KERNELS=torch all of them.")
        shutil.copyfile(ROOT / built, target)


def ninja_file(cxx, nvcc, target):
    """What to compile, and how, as ninja reads it."""
    import pybind11  # needed to build only

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    extra = os.environ.get("CXXFLAGS", "")
    objects = [f"{BUILD}/kernels_cpu.o", f"{BUILD}/bindings.o"] + ([f"{BUILD}/kernels_cuda.o"] if nvcc else [])
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    text = NINJA.format(
        build=BUILD, cxx=quote(cxx), nvcc=quote(nvcc or "nvcc"), flags=FLAGS, cpu_flags=f"{CPU_FLAGS} {extra}",
        binding_flags="-O1 " + " ".join(f"-isystem {quote(path)}" for path in includes) + (" -DFEDGS_CUDA" if nvcc else ""),
        architectures=" ".join(gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)),
        # nvcc knows where its runtime is, and links it statically: the module loads on machines without CUDA
        link=f"{quote(nvcc)} -ccbin {quote(cxx)} -shared" if nvcc else f"{quote(cxx)} {shared} -pthread {extra}")
    if nvcc:
        text += f"build {BUILD}/kernels_cuda.o: nvcc csrc/kernels_cuda.cu\n"
    return text + f"build {target}: link {' '.join(objects)}\n"


def quote(path):
    """A path as a shell in a ninja file reads it."""
    return shlex.quote(str(path)).replace("$", "$$")


def find_nvcc():
    """The CUDA compiler, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(shutil.which, [os.path.join(home, "bin", "nvcc") for home in homes] + ["nvcc"]), None)


def gencode(architectures):
    """TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX" -> nvcc's options: machine code for each, and PTX for later GPUs where asked."""
    for name in re.split("[; ]+", architectures.strip("; ")):
        number = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", name)
        if number is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: cannot read {name!r}; numbers are needed, as in \"8.0 9.0+PTX\"")
        sm = "".join(number.group(1, 2, 3))
        yield f"-gencode arch=compute_{sm},code=sm_{sm}"
        if number[4]:
            yield f"-gencode arch=compute_{sm},code=compute_{sm}"


setup(
    name="fedgs",
    version=re.search('__version__ = "(.+)"', (ROOT / "fedgs.py").read_text(encoding="utf-8"))[1],
    description="Federated Gradient Scaling for heterogeneous medical image segmentation",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["fedgs", "models", "data", "standin", "metrics", "inference", "plots", "runs", "processes"],
    packages=["csrc"],
    ext_modules=[Extension("csrc._kernels", sources=["csrc/bindings.cpp"], optional=True)],  # the sources are ninja's affair
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.8,<2.14",
        "numpy>=1.26",
        "pillow>=10",  # reads and resizes the frames
        "nibabel>=5.2",  # reads and writes CT volumes
        "scipy>=1.15",  # connected components of lesions, distances, the statistics of comparisons
        "matplotlib>=3.8",  # the pictures
        "tqdm>=4.66",  # progress with an estimate of the time left
    ],
    extras_require={"test": [
        "pytest>=8",
        "scikit-learn>=1.4",  # the published splits were made with it
        "setuptools>=68", "pybind11>=2.12", "ninja>=1.11",  # the tests compile the kernels, too
        "nbclient>=0.10", "ipykernel>=6.29",  # run the notebooks
    ], "notebooks": ["jupyterlab>=4"]},
)
