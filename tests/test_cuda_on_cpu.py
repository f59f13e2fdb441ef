"""The CUDA kernels on a CPU, watched by sanitizers, against the PyTorch lines that define them.

cuda_on_cpu.h says what this can notice and what only a GPU can. At the end faults are planted in
the kernels, and each has to be noticed.
"""

import functools
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from torch import Tensor

import fedgs

OPERATIONS = (  # in the order of their numbers in cuda_on_cpu.cpp
    "mask_difficulty",
    "naive mask_difficulty",
    "adamw_accumulate",
    "naive adamw_accumulate",
    "aggregate",
    "naive aggregate",
)
SANITIZERS = {"addresses": ["-fsanitize=address,undefined"], "races": ["-fsanitize=thread"]}
KERNELS = (ROOT / "csrc" / "kernels_cuda.cu").read_text(encoding="utf-8")


def missing() -> str:
    """What is not here of what this needs; "" if all is."""
    if sys.platform != "linux":
        return "fibres and sanitizers are used as on Linux"
    if shutil.which("g++") is None:
        return "no g++"
    for library in ("libasan.so", "libubsan.so", "libtsan.so"):
        found = subprocess.run(
            ["g++", f"-print-file-name={library}"], text=True, capture_output=True
        )
        if not os.path.isabs(found.stdout.strip()):
            return f"this g++ has no {library}"
    return ""


# Slow: the compiler takes more than two seconds before the first of them begins.
pytestmark = [pytest.mark.skipif(missing() != "", reason=missing()), pytest.mark.slow]


# --------------------------------------------------------------------- programs that run kernels


class Emulation:
    """Programs that run the kernels, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "cuda_runtime.h").write_text('#include "cuda_on_cpu.h"\n')
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.compile_runtime, SANITIZERS))
            list(pool.map(self.compile, SANITIZERS))

    def gxx(self, *arguments):
        command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        command += [f"-I{self.folder}", f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}"]
        finished = subprocess.run([*command, *arguments], text=True, capture_output=True)
        if finished.returncode != 0 or finished.stderr:
            raise RuntimeError(finished.stderr)

    def compile_runtime(self, watch):
        """What plays the GPU. Its own accesses are no races."""
        source = ROOT / "tests" / "cuda_on_cpu.cpp"
        self.gxx("-O1", f"-D{watch.upper()}", "-c", source, "-o", self.folder / f"{watch}.o")

    def compile(self, watch, name="kernels", kernels=KERNELS, options=("-O1", "-g")):
        """Make the program of this name, from this text of kernels_cuda.cu."""
        declaration = r"__shared__ (\w+) (\w+)((?:\[\w+\])*);"
        memory = r"auto& \2 = cuda_on_cpu::shared<\1\3>(__COUNTER__);"
        text = re.sub(declaration, memory, kernels)
        source = self.folder / f"{name}-{watch}.cpp"
        source.write_text(text, encoding="utf-8")
        program = self.folder / f"{name}-{watch}"
        options = [*options, *SANITIZERS[watch], "-fno-sanitize-recover=all"]
        self.gxx(*options, source, self.folder / f"{watch}.o", "-o", program)

    def run(self, calls, watch="addresses", seed=1, name="kernels"):
        """Make these calls. Their buffers then hold what the kernels left there, and are checked.

        Raises AssertionError for a fault that was noticed.
        """
        given = self.folder / f"{name}-{watch}.calls"
        results = self.folder / f"{name}-{watch}.results"
        given.write_bytes(struct.pack("q", len(calls)) + b"".join(call.packed() for call in calls))
        variables = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        finished = subprocess.run(
            [self.folder / f"{name}-{watch}", given, results, str(seed)],
            env=os.environ | variables,
            text=True,
            capture_output=True,
            timeout=600,
        )
        if "unexpected memory mapping" in finished.stderr:
            pytest.skip("g++'s ThreadSanitizer does not start here: see vm.mmap_rnd_bits")
        assert finished.returncode == 0, finished.stderr

        content = memoryview(bytearray(results.read_bytes()))
        for call in calls:
            content = call.unpack(content)
        assert len(content) == 0
        for call in calls:
            call.check()


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("cuda_on_cpu"))


class Buffer(NamedTuple):
    """Memory of a call: a tensor; or a larger one, of which this is the end."""

    end: Tensor
    elements: int
    misaligned: int  # bytes beyond a multiple of 16 at which the memory begins


def make_buffer(x, misaligned=0):
    """misaligned: elements beyond a multiple of 16 bytes."""
    return Buffer(x, x.numel(), misaligned * x.itemsize)


@dataclass
class Call:
    """A call of an operation."""

    operation: str
    numbers: list[float]
    buffers: list[Buffer | None]
    check: Callable[[], None]  # raises AssertionError unless the buffers hold what they should
    times: int = 1
    stream: int = 1
    goes_on: bool = False  # while the next call runs
    skip: int = 0  # blocks that are left out, at a launch's beginning

    def packed(self):
        """The call, as cuda_on_cpu.cpp reads it."""
        operation = OPERATIONS.index(self.operation)
        how = (operation, self.times, self.stream, self.goes_on, self.skip, len(self.numbers))
        parts = [struct.pack("6q", *how), struct.pack(f"{len(self.numbers)}d", *self.numbers)]
        parts.append(struct.pack("q", len(self.buffers)))
        for buffer in self.buffers:
            if buffer is None:
                parts.append(struct.pack("3q", -1, 0, 0))
                continue
            x = buffer.end
            given = (buffer.elements * x.itemsize, buffer.misaligned, x.nbytes)
            parts += [struct.pack("3q", *given), x.numpy().tobytes()]
        return b"".join(parts)

    def unpack(self, content):
        """Take what the buffers hold now from its beginning. -> the rest"""
        for buffer in self.buffers:
            if buffer is not None and buffer.end.nbytes:
                x = buffer.end
                x.view(-1).copy_(torch.frombuffer(content, dtype=x.dtype, count=x.numel()))
                content = content[x.nbytes :]
        return content


# --------------------------------------------------------------------------------- mask_difficulty

PIXELS = {torch.bool: 0, torch.uint8: 0, torch.float32: 1, torch.int64: 2}  # as in kernels.h


def mask_call(masks, small=None, log_base=100.0, misaligned=0, naive="", **how):
    """misaligned: pixels by which the masks begin beyond a multiple of 16 bytes."""
    images = len(masks)
    if small is None:
        small = torch.ones(images, dtype=torch.bool)
    expected = fedgs.mask_difficulty(masks, small, log_base)
    area = torch.full((images,), -7)
    difficulty, eta = torch.full((images,), math.nan), torch.full((), math.nan)
    ticket = torch.zeros(1, dtype=torch.int32)

    def check():
        assert torch.equal(area, expected[0])
        torch.testing.assert_close(difficulty, expected[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(eta, expected[2], rtol=1e-6, atol=0)
        assert ticket == 0

    numbers = [PIXELS[masks.dtype], images, masks.shape[-2] * masks.shape[-1], log_base]
    buffers = [make_buffer(x) for x in (masks, small, area, difficulty, eta, ticket)]
    buffers[0] = make_buffer(masks, misaligned)
    return Call(naive + "mask_difficulty", numbers, buffers, check, **how)


def random_masks(shape, dtype, generator, value=1):
    """Masks, 2 % lesion, and flags, 70 % of them set."""
    masks = torch.rand(shape, generator=generator) < 0.02
    small = torch.rand(shape[0], generator=generator) < 0.7
    return (masks.to(dtype) * value).to(dtype), small


def mask_calls(generator, naive=""):
    """Every kind of pixels, in some sizes, at every place that they can begin at."""
    calls = []
    for dtype in PIXELS:
        places = range(16 // dtype.itemsize)
        for size, misaligned in itertools.product(((3, 5), (61, 33)), places):
            masks, small = random_masks((2, *size), dtype, generator, value=255)
            calls.append(mask_call(masks, small, 1000.0, misaligned, naive))

        # A pixel less and more than what a block takes, and several blocks.
        pixels = 16384 // dtype.itemsize
        for size in ((1, pixels - 1), (1, pixels), (1, pixels + 1), (3, pixels - 5)):
            masks, small = random_masks((2, *size), dtype, generator)
            calls.append(mask_call(masks, small, misaligned=3 % len(places), naive=naive))
    return calls


def special_masks(naive=""):
    """Nothing, everything, and what counts as lesion."""
    shapes = ((0, 8, 8), (2, 0, 8), (3, 0, 0), (300, 1, 1))
    masks = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
    masks += [torch.ones(2, 127, 301, dtype=dtype) for dtype in PIXELS]

    values = torch.tensor([0.0, -0.0, math.nan, math.inf, -1e-45, 0.5])
    integers = torch.tensor([2**40, -1, 0, 2**32])
    masks += [x.view(-1, 1, 1).expand(-1, 3, 3).contiguous() for x in (values, integers)]
    return [mask_call(x, naive=naive) for x in masks]


def repeated_masks(generator):
    """One ticket for call after call, as in a graph; and three streams with one each at a time."""
    calls = []
    for _ in range(3):
        masks, small = random_masks((3, 2, 16383), torch.uint8, generator)
        calls.append(mask_call(masks, small, times=3))
    for stream in (1, 2, 3):
        masks, small = random_masks((4, 3, 16384), torch.uint8, generator)
        calls.append(mask_call(masks, small, times=2, stream=stream, goes_on=stream < 3))
    return calls


def masks_beyond_2_to_the_31(naive=""):
    """The third image begins where 32 bits end. Only the last two blocks run."""
    images, pixels = 3, 2**30 + 16384 * 3 + 5
    blocks = images * (pixels // 16384 + 1)
    if naive:
        blocks = images * pixels // 256 + 1

    call = mask_call(torch.zeros(3, 20, 30, dtype=torch.uint8), naive=naive, skip=blocks - 2)
    call.numbers[2] = pixels
    masks, _, area, _, _, ticket = call.buffers
    call.buffers[0] = masks._replace(elements=images * pixels)
    masks.end.view(-1)[-1 - torch.arange(5) ** 2] = 1
    ticket.end.fill_(blocks - 2)  # as if all others had taken theirs

    def check():
        assert area.end.tolist() == [0, 0, 5]
        assert naive or ticket.end == 0

    call.check = check
    return call


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mask_difficulty(emulation, seed, generator):
    emulation.run(mask_calls(generator) + special_masks(), seed=seed)


def test_naive_mask_difficulty(emulation, generator):
    emulation.run(mask_calls(generator, "naive ") + special_masks("naive "))


@pytest.mark.parametrize("watch", SANITIZERS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_tickets_serve_call_after_call(emulation, watch, seed, generator):
    emulation.run(repeated_masks(generator), watch, seed)


@pytest.mark.parametrize("naive", ["", "naive "])
def test_masks_beyond_2_to_the_31(emulation, naive):
    emulation.run([masks_beyond_2_to_the_31(naive)])


# ------------------------------------------------------------------------------- adamw_accumulate_

SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 4099)
PAPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def step_vectors(n, generator):
    """theta, grad, m, v, update, from tiny to large."""
    exponents = -6 + 8 * torch.rand(5, n, generator=generator)
    theta, grad, m, v, update = torch.randn(5, n, generator=generator) * 10**exponents
    # Where m and grad cancel, rounding alone would decide s.
    return [theta, grad, m.copysign(grad), v.square(), update]


def step_call(vectors, t=7, eta=1.7, misaligned=(), naive="", lr=1e-3, options=PAPER, skip=0):
    """misaligned: which of the vectors begin one element beyond a multiple of 16 bytes."""
    before = [x.clone() for x in vectors]
    expected = [x.clone() for x in vectors]
    numbers = [len(vectors[0]), lr, *options["betas"], options["eps"], options["weight_decay"]]
    buffers = [make_buffer(x, i in misaligned) for i, x in enumerate(vectors)]
    step = torch.tensor(t)
    if eta is None:
        buffers[4:] = [None, None, make_buffer(step)]
        fedgs.adamw_accumulate_(*expected[:4], step, lr, **options)
    else:
        scale = torch.tensor(eta)
        buffers += [make_buffer(scale), make_buffer(step)]
        fedgs.adamw_accumulate_(*expected[:4], step, lr, expected[4], scale, **options)

    def check():
        for x, value, earlier in zip(vectors, expected, before, strict=True):
            rounding = 1e-6 * (earlier.abs() + value.abs())
            close = value.isfinite() & ((x - value).abs() <= rounding)
            same = (x == value) | (x.isnan() & value.isnan())
            assert (close | same).all()

    return Call(naive + "adamw_accumulate", numbers, buffers, check, skip=skip)


def step_calls(generator, naive=""):
    calls = []
    for n, eta in itertools.product(SIZES, (1.7, None)):
        for misaligned in ((), (0, 1, 2, 3, 4)):
            vectors = step_vectors(n, generator)
            calls.append(step_call(vectors, 1 + n, eta, misaligned, naive))

    # Any one of them may be where 16 bytes cannot be read at once.
    calls += [step_call(step_vectors(1030, generator), 1, 1.7, (i,), naive) for i in range(5)]

    others = {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    vectors = step_vectors(1000, generator)
    calls.append(step_call(vectors, 3, 3.0, naive=naive, lr=0.5, options=others))
    for value in (math.nan, math.inf, -math.inf, 3e38):
        vectors = step_vectors(1003, generator)
        vectors[1][[0, 7, 998, 1002]] = value
        calls.append(step_call(vectors, 2, 1.0, naive=naive))
    return calls


def step_beyond_2_to_the_31(generator, block, misaligned=(), naive=""):
    """The last two blocks, of so many parameters each, step the last parameters."""
    n = 2**31 + 5
    skip = n // block - 1
    vectors = step_vectors(n - skip * block, generator)
    call = step_call(vectors, misaligned=misaligned, naive=naive, skip=skip)
    call.numbers[0] = n
    call.buffers[:5] = [x._replace(elements=n) for x in call.buffers[:5]]
    return call


@pytest.mark.parametrize("naive", ["", "naive "])
def test_adamw_accumulate(emulation, naive, generator):
    emulation.run(step_calls(generator, naive))


def test_races_in_adamw_accumulate(emulation, generator):
    calls = [step_call(step_vectors(3000, generator), misaligned=where) for where in ((), (2,))]
    emulation.run(calls, "races")


def test_steps_beyond_2_to_the_31(emulation, generator):
    everything = range(5)
    calls = [
        step_beyond_2_to_the_31(generator, 1024),
        step_beyond_2_to_the_31(generator, 256, everything),
        step_beyond_2_to_the_31(generator, 256, naive="naive "),
    ]
    emulation.run(calls)


# --------------------------------------------------------------------------------------- aggregate


def sum_call(total, updates, weights, misaligned=(), naive="", skip=0):
    """misaligned: which of total, the result and the updates begin one element beyond 16 bytes."""
    expected = fedgs.aggregate(total, updates, weights)
    before = [x.clone() for x in (total, *updates)]
    result = torch.full_like(total, math.nan)
    norms = torch.full((len(updates),), -7.0, dtype=torch.float64)

    def check():
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(norms, expected[1], rtol=1e-10, atol=0, equal_nan=True)
        for x, value in zip((total, *updates), before, strict=True):
            assert torch.equal(x.nan_to_num(), value.nan_to_num())

    vectors = [make_buffer(x, i in misaligned) for i, x in enumerate((total, result, *updates))]
    vectors.insert(2, make_buffer(norms))
    return Call(naive + "aggregate", [len(total), *weights], vectors, check, skip=skip)


def random_sum(n, clients, generator, **how):
    total, *updates = torch.randn(clients + 1, n, generator=generator)
    weights = torch.rand(clients, generator=generator)
    return sum_call(total, updates, (weights / weights.sum()).tolist(), **how)


def sum_calls(generator, naive=""):
    add = functools.partial(random_sum, generator=generator, naive=naive)
    calls = []
    for n, clients in itertools.product((*SIZES, 4096, 9000), (1, 2, 5)):
        calls += [add(n, clients), add(n, clients, misaligned=range(clients + 2))]
    calls += [add(1030, 2, misaligned=(i,)) for i in range(4)]

    # More clients than a launch takes. 2^24 + 1 is 2^24 in float32: the order of the sum shows.
    calls += [add(1030, clients) for clients in (32, 33, 65)]
    for first, second in itertools.combinations((0, 3, 31, 32, 34), 2):
        values = torch.ones(35)
        values[first], values[second] = 2.0**24, -(2.0**24)
        updates = [torch.full((9,), value) for value in values.tolist()]
        calls.append(sum_call(torch.zeros(9), updates, [1.0] * 35, naive=naive))

    for value in (math.nan, math.inf, -math.inf):
        total, *updates = torch.randn(6, 5001, generator=generator)
        updates[4][-1] = value
        calls.append(sum_call(total, updates, [0.2] * 5, naive=naive))
    large = torch.full((1000,), 3e38)
    calls.append(sum_call(torch.zeros(1000), [large], [1.0], naive=naive))
    return calls


def sum_of_many_tiles(generator, tiles):
    """A block's tiles are 1056 apart. Only the last block runs, and adds what is in its last."""
    n = 1056 * tiles * 4096 - 3
    call = random_sum(4093, 1, generator, skip=1055)
    call.numbers[0] = n
    norms = call.buffers[2]
    call.buffers = [x._replace(elements=n) for x in call.buffers]
    call.buffers[2] = norms
    return call


@pytest.mark.parametrize("naive", ["", "naive "])
def test_aggregate(emulation, naive, generator):
    emulation.run(sum_calls(generator, naive))


def test_races_in_aggregate(emulation, generator):
    emulation.run([random_sum(9000, 3, generator), random_sum(1000, 34, generator)], "races")


@pytest.mark.parametrize("tiles", [3, 497])
def test_sums_of_many_tiles(emulation, tiles, generator):
    """The second is beyond 2^31."""
    emulation.run([sum_of_many_tiles(generator, tiles)])


# ------------------------------------------------------------------------------------------ faults

# Mistakes in kernels_cuda.cu, as patches of it. Above each: the build in which it is noticed, the
# operation and the mistake, and where a sanitizer or the emulation says something, what that is.
PATCHES = """
@@ races | mask_difficulty: no barrier before a block's counts are added up | data race
-    __syncthreads();

     if (threadIdx.x == 0) {
         if (images > 0) {
@@ races | mask_difficulty: no barrier before all ask whether theirs is the last block | data race
-    __syncthreads();
     if (!last) return;
@@ races | mask_difficulty: no barrier between areas and difficulties | data race
-    __syncthreads();

     // Difficulties: a thread an image.
@@ races | mask_difficulty: no barrier before the step scale | data race
-    __syncthreads();

     // The step scale, and the ticket for the next call.
@@ addresses | mask_difficulty: a barrier that not all come to | waits for threads of its block
-    if (!last) return;
+    if (!last || warp > 3) return;
@@ races | mask_difficulty: no fence between a count and the ticket | data race
-        __threadfence();  // the count is there before the ticket says so
@@ races | mask_difficulty: that fence before the count | data race
+            __threadfence();
             partial[blockIdx.x] = count;
         }
-        __threadfence();  // the count is there before the ticket says so
@@ races | mask_difficulty: no fence between the ticket and the counts | data race
-        __threadfence();  // and whoever took the last ticket sees all counts
@@ addresses | mask_difficulty: half a warp in the mask of a shuffle | a lane that has none
-        value += __shfl_xor_sync(~0u, value, offset);
+        value += __shfl_xor_sync(0xffffu, value, offset);
@@ addresses | mask_difficulty: half a warp added up |
-    for (int offset = 16; offset > 0; offset /= 2)
+    for (int offset = 8; offset > 0; offset /= 2)
@@ addresses | mask_difficulty: a pixel beyond the last one | heap-buffer-overflow
-    if (tail + thread < n) count += masks[tail + thread] != T(0);
+    if (tail + thread <= n) count += masks[tail + thread] != T(0);
@@ addresses | mask_difficulty: pixels of the head counted with the rest, too |
-    const int tail = head + loads * PER_LOAD;
+    const int tail = loads * PER_LOAD;
@@ addresses | mask_difficulty: 16 bytes loaded from anywhere | misaligned address
-    const int head = min(n, (PER_LOAD - misaligned) % PER_LOAD);
+    const int head = 0 * misaligned;
@@ addresses | mask_difficulty: the place of an image in 32 bits |
-        const T* start = masks + image * pixels + range.begin;
+        const T* start = masks + int(image * pixels) + range.begin;
@@ addresses | mask_difficulty: the ticket stays as it is |
-        *ticket = 0;
@@ addresses | mask_difficulty: the first block takes itself for the last |
-        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
+        last = atomicAdd(ticket, 1u) == 0;
@@ addresses | mask_difficulty: the last block is told by its number |
-        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
+        last = atomicAdd(ticket, 1u) + 1 && blockIdx.x == gridDim.x - 1;
@@ addresses | mask_difficulty: launched on no stream | another stream than asked
-    config.stream = stream;
+    (void)stream;
@@ races | naive mask_difficulty: a plain addition for an atomic one | data race
-    atomicAdd(reinterpret_cast<unsigned long long*>(area + i / pixels), 1ull);
+    area[i / pixels] += 1;
@@ races | adamw_accumulate: no barrier between the corrections and their use | data race
-    __syncthreads();

     if (whole) {
@@ addresses | adamw_accumulate: four stepped where fewer are left | heap-buffer-overflow
-    const bool whole = range.begin + WIDTH <= step.n;
+    const bool whole = range.begin < step.n;
@@ addresses | adamw_accumulate: one vector's alignment not asked for | misaligned address
-    const bool wide = aligned(step.theta) && aligned(step.grad) && aligned(step.m) &&
+    const bool wide = aligned(step.theta) && aligned(step.grad) &&
@@ addresses | adamw_accumulate: a thread's number in 32 bits |
-    const Range range = piece(int64_t(blockIdx.x) * THREADS + threadIdx.x, WIDTH, step.n);
+    const Range range = piece(int(blockIdx.x * THREADS + threadIdx.x), WIDTH, step.n);
@@ races | aggregate: no barrier before a block's squares are added up | data race
-    __syncthreads();

     if (int(threadIdx.x) < clients.count) {
@@ addresses | aggregate: sums that begin with what was there |
-        for (int k = 0; k < clients.count; ++k) sums[k][warp] = 0;
+        for (int k = 1; k < clients.count; ++k) sums[k][warp] = 0;
@@ addresses | aggregate: four loaded where fewer are left | heap-buffer-overflow
-    if (i + WIDTH <= n) return load<WIDTH>(from + i);
+    if (i < n) return load<WIDTH>(from + i);
@@ addresses | aggregate: four stored where fewer are left | heap-buffer-overflow
-    if (i + WIDTH <= n) return store(to + i, values);
+    if (i < n) return store(to + i, values);
@@ addresses | aggregate: the weight of another client |
-                    sum[p].x[j] += clients.weights[k] * x[p].x[j];
+                    sum[p].x[j] += clients.weights[k ? k - 1 : 0] * x[p].x[j];
@@ addresses | aggregate: two clients' norms swapped |
-    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
+    if (threadIdx.x == 0) norms[gridDim.x - 1 - blockIdx.x] = sum;
@@ addresses | aggregate: the 33rd client begins anew |
-        const float* from = first == 0 ? sum.total : sum.out;
+        const float* from = sum.total;
@@ addresses | aggregate: tiles that several blocks add up |
-    for (int64_t tile = blockIdx.x; tile * TILE < n; tile += gridDim.x) {
+    for (int64_t tile = blockIdx.x; tile * TILE < n; tile += gridDim.x / 2 + 1) {
@@ addresses | aggregate: the place of a tile in 32 bits |
-        const int64_t start = piece(tile, TILE, n).begin + threadIdx.x * WIDTH;
+        const int start = int(piece(tile, TILE, n).begin) + threadIdx.x * WIDTH;
"""


class Fault(NamedTuple):
    """One of these patches."""

    watch: str
    title: str
    says: str
    right: str  # the text,
    wrong: str  # and with the mistake


def read_fault(patch):
    heading, *lines = patch.rstrip("\n").split("\n")
    right = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    wrong = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    watch, title, says = (word.strip() for word in heading.split("|"))
    return Fault(watch, title, says, right, wrong)


FAULTS = {}
for patch in PATCHES.split("@@ ")[1:]:
    fault = read_fault(patch)
    FAULTS[fault.title] = fault


def calls_of(operation, watch, generator):
    """All of an operation's calls above; few for ThreadSanitizer, which sees a race in any."""
    if operation == "mask_difficulty":
        calls = repeated_masks(generator)
        if watch == "addresses":
            calls += mask_calls(generator) + special_masks() + [masks_beyond_2_to_the_31()]
    elif operation == "naive mask_difficulty":
        calls = special_masks("naive ")
    elif operation == "adamw_accumulate":
        calls = step_calls(generator)
        calls.append(step_beyond_2_to_the_31(generator, 256, range(5)))
    else:
        calls = [random_sum(9000, 3, generator)]
        if watch == "addresses":
            calls += sum_calls(generator) + [sum_of_many_tiles(generator, t) for t in (3, 497)]
    return calls


@pytest.fixture(scope="module")
def trials(emulation):
    """{fault: what comes of it, in the future}"""

    def try_out(name, fault):
        assert KERNELS.count(fault.right) == 1
        kernels = KERNELS.replace(fault.right, fault.wrong)
        # ThreadSanitizer does not see all accesses of a program that is not optimised.
        options = ["-O1"] if fault.watch == "races" else ["-O0"]
        emulation.compile(fault.watch, name, kernels, options)

        operation = fault.title.split(":")[0]
        calls = calls_of(operation, fault.watch, torch.Generator().manual_seed(0))
        try:
            emulation.run(calls, fault.watch, name=name)
        except AssertionError as noticed:
            return str(noticed)
        return "nothing"

    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for number, (title, fault) in enumerate(FAULTS.items()):
            futures[title] = pool.submit(try_out, f"fault{number}", fault)
        yield futures


@pytest.mark.parametrize("title", FAULTS)
def test_faults_are_noticed(trials, title):
    noticed = trials[title].result()
    assert noticed != "nothing"
    assert FAULTS[title].says in noticed
