"""Compile the kernels. Everything else about installing FedGS is in pyproject.toml.

    pip install -e .                                    # what is found decides what is compiled
    FEDGS_KERNELS=cpp pip install -e .                  # no CUDA kernels; torch: none at all
    TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX" pip install -e .
    CXXFLAGS="-g -march=native" python setup.py build_ext --inplace    # more for kernels_cpu.cpp

The kernels need a C++17 compiler ($CXX, c++, g++ or clang++), and the CUDA ones nvcc (in
$CUDA_HOME/bin or on the PATH) as well; no GPU, and no torch. What is missing is left out and named
(`pip install -v` shows it): fedgs.py then runs on PyTorch.
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
# None of these changes a value: sqrt leaves errno alone, and loops are vectorised though an
# operation in them could trap.
CPU_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -fopenmp-simd"
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
CUDA_ARCHITECTURES = "8.0 9.0+PTX"

NINJA = """\
builddir = {build}

rule cxx
  command = {cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule nvcc
  command = {nvcc} -ccbin {cxx} {cuda_flags} --threads 0 -MMD -MF $out.d -c $in -o $out
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

    def build_extension(self, extension: Extension) -> None:
        wanted = os.environ.get("FEDGS_KERNELS", "cuda")
        if wanted not in ("cuda", "cpp", "torch"):
            sys.exit(f"FEDGS_KERNELS={wanted}: must be cuda, cpp or torch")

        # Without kernels FedGS is complete, only slower: that is no reason not to install it.
        cxx = find_cxx()
        if wanted == "torch":
            say("no kernels compiled, as asked; fedgs.py will run on PyTorch")
            return
        if cxx is None:
            say(
                "no kernels compiled, there is no C++ compiler (looked for $CXX, c++, g++ and "
                "clang++); fedgs.py will run on PyTorch"
            )
            return

        nvcc = find_nvcc() if wanted == "cuda" else None
        cuda = "no CUDA kernels (looked for nvcc in $CUDA_HOME and on the PATH)"
        if nvcc is not None:
            cuda = f"the CUDA kernels with {nvcc}"
        say(f"compiling the C++ kernels with {cxx}, {cuda}")

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(compile_kernels(cxx, nvcc, target.name), target)


def say(message: str) -> None:
    print(f"fedgs: {message}", file=sys.stderr)


def compile_kernels(cxx: str, nvcc: str | None, name: str) -> Path:
    """The library of this name in the build folder. Ends the program where ninja fails."""
    built = BUILD / name
    plan = BUILD / "build.ninja"
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    (ROOT / plan).write_text(ninja_file(cxx, nvcc, built))

    ninja = subprocess.run([sys.executable, "-m", "ninja", "-f", plan], cwd=ROOT)
    if ninja.returncode != 0:
        sys.exit(
            "fedgs: compiling the kernels failed, see above. FEDGS_KERNELS=cpp leaves the CUDA "
            "kernels out, FEDGS_KERNELS=torch all of them."
        )
    return ROOT / built


def ninja_file(cxx: str, nvcc: str | None, target: Path) -> str:
    """What to compile, and how, as ninja reads it."""
    import pybind11  # installing without kernels does not need it

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    binding_flags = "-O1"
    for include in includes:
        binding_flags += f" -isystem {quote(include)}"
    objects = [f"{BUILD}/kernels_cpu.o", f"{BUILD}/bindings.o"]
    more_flags = os.environ.get("CXXFLAGS", "")

    if nvcc is None:
        shared = "-shared"
        if sys.platform == "darwin":
            shared += " -undefined dynamic_lookup"
        link = f"{quote(cxx)} {shared} -pthread {more_flags}"
        architectures = []
    else:
        binding_flags += " -DFEDGS_CUDA"
        objects.append(f"{BUILD}/kernels_cuda.o")
        # nvcc links CUDA's runtime statically: the module loads on machines without CUDA, too.
        link = f"{quote(nvcc)} -ccbin {quote(cxx)} -shared"
        architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)

    text = NINJA.format(
        build=BUILD,
        cxx=quote(cxx),
        nvcc=quote(nvcc or "nvcc"),
        flags=FLAGS,
        cpu_flags=f"{CPU_FLAGS} {more_flags}",
        binding_flags=binding_flags,
        cuda_flags=" ".join([CUDA_FLAGS, *architectures]),
        link=link,
    )
    if nvcc is not None:
        text += f"build {BUILD}/kernels_cuda.o: nvcc csrc/kernels_cuda.cu\n"
    return text + f"build {target}: link {' '.join(objects)}\n"


def quote(path: str) -> str:
    """A path as a shell in a ninja file reads it."""
    return shlex.quote(str(path)).replace("$", "$$")


def find_cxx() -> str | None:
    """The C++ compiler."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler."""
    candidates = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            candidates.append(os.path.join(home, "bin", "nvcc"))

    for candidate in [*candidates, "nvcc"]:
        if shutil.which(candidate):
            return candidate
    return None


def gencode(architectures: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX" -> nvcc's options.

    That is machine code for each, and where asked PTX, which later GPUs compile for themselves.
    """
    options = []
    for name in re.split("[; ]+", architectures.strip("; ")):
        number = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", name)
        if number is None:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST: cannot read {name!r}; numbers are needed, "
                'as in "8.0 9.0+PTX"'
            )
        major, minor, variant, ptx = number.groups()
        sm = major + minor + variant
        options.append(f"-gencode arch=compute_{sm},code=sm_{sm}")
        if ptx:
            options.append(f"-gencode arch=compute_{sm},code=compute_{sm}")
    return options


setup(
    # ninja knows the sources and compiles them; setuptools wants to be told of one.
    ext_modules=[Extension("csrc._kernels", sources=["csrc/bindings.cpp"], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
