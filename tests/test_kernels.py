"""The compiled kernels against the PyTorch lines that define them, on every device that is here."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import square_images

import fedgs
from support.errors import UserError

csrc = pytest.importorskip(
    "csrc", reason="the kernels are not compiled: pip install -v -e . says why"
)

GPU = torch.cuda.is_available() and not csrc.problem(torch.device("cuda"))
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU, or no CUDA kernels for it")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float32)
# One element more and less than what a thread, a block or a piece takes, on either device.
SIZES = (0, 1, 3, 4, 5, 1023, 4096, 4099, 32769, 300_001)


# --------------------------------------------------------------------------------- mask_difficulty


def random_masks(shape, dtype, value, generator, device):
    """Masks, 2 % lesion, and flags, 70 % of them set."""
    masks = torch.rand(shape, generator=generator) < 0.02
    small = torch.rand(shape[0], generator=generator) < 0.7
    masks = (masks.to(dtype) * value).to(dtype)
    return masks.to(device), small.to(device)


def all_small(images, device):
    return torch.ones(images, dtype=torch.bool, device=device)


def assert_same_difficulty(masks, small, log_base=100.0, operation=csrc.mask_difficulty):
    area, difficulty, eta = operation(masks, small, log_base)
    expected = fedgs.mask_difficulty(masks, small, log_base)
    assert torch.equal(area, expected[0])
    assert area.dtype == torch.int64
    torch.testing.assert_close(difficulty, expected[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(eta, expected[2], rtol=1e-6, atol=0)


@on_devices
@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_difficulty(device, dtype, value, generator):
    sizes = [(1, 1), (3, 5), (16, 16), (80, 80), (127, 129), (181, 181), (256, 512)]
    for images, size in itertools.product((1, 2, 5), sizes):
        for shape in ((images, *size), (images, 1, *size)):
            masks, small = random_masks(shape, dtype, value, generator, device)
            assert_same_difficulty(masks, small, log_base=1000.0)


@on_devices
def test_mask_difficulty_of_nothing(device):
    for shape in ((0, 1, 8, 8), (0, 8, 8), (2, 0, 8), (3, 1, 0, 0)):
        masks = torch.zeros(shape, dtype=torch.uint8, device=device)
        assert_same_difficulty(masks, all_small(shape[0], device))
    assert_same_difficulty(torch.zeros(3, 64, 64, device=device), all_small(3, device))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_difficulty_of_everything(device, dtype):
    """Whole images of lesion: no counter may overflow on the way."""
    masks = torch.ones(3, 301, 305, dtype=dtype, device=device)
    assert_same_difficulty(masks, all_small(3, device))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_difficulty_of_views(device, dtype, generator):
    """Not contiguous, or contiguous but not at a multiple of 16 bytes."""
    masks, small = random_masks((6, 1, 45, 77), dtype, 1, generator, device)
    for view in (masks[1:], masks.transpose(2, 3), masks[..., 3:, ::2], masks.flip(0)):
        assert_same_difficulty(view, small[: len(view)])
    assert_same_difficulty(masks[::2], small[::2])


@on_devices
def test_what_counts_as_lesion(device):
    """Everything but 0, and that has two signs."""
    values = torch.tensor([0.0, -0.0, math.nan, math.inf, -1e-45, 0.5], device=device)
    masks = values.view(6, 1, 1).expand(6, 3, 3)
    area, _, _ = csrc.mask_difficulty(masks, all_small(6, device), 100.0)
    assert area.tolist() == [0, 0, 9, 9, 9, 9]
    assert_same_difficulty(masks, all_small(6, device))

    integers = torch.tensor([2**40, -1, 0], device=device).view(3, 1, 1)
    assert_same_difficulty(integers, all_small(3, device))


def test_masks_beyond_2_to_the_31():
    """The third image begins where 32 bits end. Pages of zeros take no memory until written to."""
    pixels = np.zeros((3, 2**15, 2**15 + 1), dtype=np.uint8)
    pixels[2, -1, -5:] = 1
    masks = torch.from_numpy(pixels)
    area, _, _ = csrc.mask_difficulty(masks, all_small(3, "cpu"), 100.0)
    assert area.tolist() == [0, 0, 5]


# ------------------------------------------------------------------------------- adamw_accumulate_


def step_vectors(n, generator, device, offset=0):
    """theta, grad, m, v, update, from tiny to large; not at 16 bytes with an offset."""
    exponents = -6 + 8 * torch.rand(5, n + offset, generator=generator)
    vectors = torch.randn(5, n + offset, generator=generator) * 10**exponents
    vectors[2].copysign_(vectors[1])  # where m and grad cancel, rounding alone would decide s
    vectors[3].square_()
    return [x.clone()[offset:] for x in vectors.to(device)]


def assert_same_step(vectors, step, eta, lr=1e-3, operation=csrc.adamw_accumulate_, **others):
    """Both paths start from the same values. With eta None, update is left alone."""
    step = torch.tensor(step, device=vectors[0].device)
    before = [x.clone() for x in vectors]
    expected = [x.clone() for x in vectors]
    for adamw_accumulate_, given in (
        (operation, vectors),
        (fedgs.adamw_accumulate_, expected),
    ):
        theta, grad, m, v, update = given
        if eta is None:
            update = None
        adamw_accumulate_(theta, grad, m, v, step, lr, update, eta, **others)

    for x, value, earlier in zip(vectors, expected, before, strict=True):
        rounding = 1e-6 * (earlier.abs() + value.abs())  # a sum may be much smaller than its terms
        close = value.isfinite() & ((x - value).abs() <= rounding)
        same = (x == value) | (x.isnan() & value.isnan())
        assert (close | same).all()


@on_devices
@pytest.mark.parametrize("eta", [1.7, None])
@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_accumulate(device, eta, offset, generator):
    scale = None if eta is None else torch.tensor(eta, device=device)
    for n in SIZES:
        vectors = step_vectors(n, generator, device, offset)
        for step in (1, 2, 1000):
            assert_same_step(vectors, step, scale)


@on_devices
def test_adamw_hyperparameters(device, generator):
    vectors = step_vectors(1000, generator, device)
    eta = torch.tensor(3.0, device=device)
    others = {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    assert_same_step(vectors, 3, eta, lr=0.5, **others)


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_step_hides_no_bad_gradient(device, value, generator):
    vectors = step_vectors(1000, generator, device)
    _, grad, _, _, update = vectors
    grad[[0, 7, 998, 999]] = value
    assert_same_step(vectors, 2, torch.tensor(1.0, device=device))
    bad = update.isfinite().logical_not().sum()
    assert bad == (0 if value == 3e38 else 4)


# --------------------------------------------------------------------------------------- aggregate


def assert_same_aggregate(total, updates, weights, operation=csrc.aggregate):
    before = total.clone()
    result, norms, finite = operation(total, updates, weights)
    expected = fedgs.aggregate(total, updates, weights)
    torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(norms, expected[1], rtol=1e-10, atol=0, equal_nan=True)
    assert norms.dtype == torch.float64
    assert torch.equal(finite, expected[2])
    assert torch.equal(total, before)


@on_devices
@pytest.mark.parametrize("offset", [0, 1])
def test_aggregate(device, offset, generator):
    for n, clients in itertools.product(SIZES, (1, 2, 4, 5, 9, 33)):
        vectors = torch.randn(clients + 1, n + offset, generator=generator).to(device)
        total, *updates = [x.clone()[offset:] for x in vectors]
        weights = torch.rand(clients, generator=generator, dtype=torch.float64)
        assert_same_aggregate(total, updates, (weights / weights.sum()).tolist())


@on_devices
@pytest.mark.parametrize("clients", [3, 4, 7, 35])
def test_clients_are_added_in_order(device, clients):
    """2^24 + 1 is 2^24 in float32: what comes between the large ones is lost, wherever they are."""
    for first, second in itertools.combinations(range(clients), 2):
        values = [1.0] * clients
        values[first], values[second] = 2.0**24, -(2.0**24)
        updates = [torch.full((9,), value, device=device) for value in values]
        result, _, _ = csrc.aggregate(torch.zeros(9, device=device), updates, [1.0] * clients)

        expected = torch.zeros(())
        for value in values:
            expected += value
        assert (result == expected.item()).all()


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_bad_client_is_named(device, value, generator):
    total, *updates = torch.randn(6, 40_001, generator=generator).to(device)
    updates[4][-1] = value
    assert_same_aggregate(total, updates, [0.2] * 5)
    _, _, finite = csrc.aggregate(total, updates, [0.2] * 5)
    assert finite.tolist() == [True] * 4 + [False]


@on_devices
def test_a_large_update_is_finite(device):
    """Though the square of its elements is beyond float32."""
    large = torch.full((1000,), 3e38, device=device)
    _, _, finite = csrc.aggregate(torch.zeros_like(large), [large], [1.0])
    assert finite.tolist() == [True]


@on_devices
def test_one_update_may_come_twice(device, generator):
    total, update = torch.randn(2, 5000, generator=generator).to(device)
    assert_same_aggregate(total, [update, update, total], [0.25, 0.25, 0.5])


# ------------------------------------------------------------------------------ all three together


def everything(vectors, updates, masks):
    """The results of all three. vectors, theta to update, are copied first."""
    theta, grad, m, v, update = copies = [x.clone() for x in vectors]
    eta = torch.full((), 1.5, device=theta.device)  # made there: a graph may hold this
    step = torch.full((), 3, device=theta.device)
    csrc.adamw_accumulate_(theta, grad, m, v, step, 1e-3, update, eta)

    weights = [1 / len(updates)] * len(updates)
    results = csrc.aggregate(vectors[0], updates, weights)
    measures = csrc.mask_difficulty(masks, all_small(len(masks), masks.device), 100.0)
    return [*copies, *results, *measures]


def assert_same_bits(results, expected):
    for x, value in zip(results, expected, strict=True):
        assert torch.equal(x, value)


def test_threads_do_not_change_a_bit(generator):
    theta, grad, m, v, update, *updates = torch.randn(12, 1_000_003, generator=generator)
    vectors = [theta, grad, m, v.abs(), update]
    masks = torch.rand(3, 700, 700, generator=generator) < 0.01
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(vectors, updates, masks)

        # Several times: on a busy machine one thread may do all before the others have begun.
        for count in (2, 3, 7, 7, 7, 7, 7, 7):
            torch.set_num_threads(count)
            assert_same_bits(everything(vectors, updates, masks), expected)
    finally:
        torch.set_num_threads(threads)


@on_devices
def test_what_memory_held_before_does_not_change_a_bit(device, generator):
    theta, grad, m, v, update, *updates = torch.randn(11, 70_001, generator=generator).to(device)
    vectors = [theta, grad, m, v.abs(), update]
    masks = torch.rand(3, 300, 300, generator=generator).to(device) < 0.01
    clean = everything(vectors, updates, masks)

    # New tensors now hold NaN, or the largest integer, until something is written to them.
    torch.use_deterministic_algorithms(True)
    try:
        dirty = everything(vectors, updates, masks)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(dirty, clean)


def test_indices_are_64_bit():
    """Which elements a piece holds, far beyond 2^31: all kernels index through this."""
    n = 2**40 + 11
    for index, size in ((0, 4), (2**31, 4), (2**25 + 1, 2**15), (n // 4096, 4096), (n - 1, 1)):
        begin = index * size
        assert csrc._kernels.piece(index, size, n) == (begin, min(begin + size, n))


# -------------------------------------------------------------------------------- to learn from


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_naive_mask_difficulty(device, dtype, generator):
    for shape in ((3, 1, 45, 77), (2, 256, 512), (0, 8, 8), (2, 0, 8)):
        masks, small = random_masks(shape, dtype, 1, generator, device)
        assert_same_difficulty(masks, small, operation=csrc.naive_mask_difficulty)


@on_gpu
@pytest.mark.parametrize("eta", [1.7, None])
def test_naive_adamw_accumulate(device, eta, generator):
    scale = None if eta is None else torch.tensor(eta, device=device)
    for n, offset in itertools.product(SIZES, (0, 1)):
        vectors = step_vectors(n, generator, device, offset)
        assert_same_step(vectors, 7, scale, operation=csrc.naive_adamw_accumulate_)


@on_gpu
def test_naive_aggregate(device, generator):
    for n, clients in itertools.product(SIZES, (1, 5, 33)):
        total, *updates = torch.randn(clients + 1, n, generator=generator).to(device)
        weights = [1 / clients] * clients
        assert_same_aggregate(total, updates, weights, operation=csrc.naive_aggregate)


def test_naive_kernels_are_for_gpus():
    masks = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match="masks is on cpu: the naive kernels run on CUDA GPUs"):
        csrc.naive_mask_difficulty(masks, torch.ones(2), 100.0)
    with pytest.raises(ValueError, match="theta is on cpu"):
        csrc.naive_adamw_accumulate_(**step_arguments())
    with pytest.raises(ValueError, match="total is on cpu"):
        csrc.naive_aggregate(torch.zeros(8), [torch.zeros(8)], [1.0])


# --------------------------------------------------------------------------------------- arguments


def step_arguments(**changed):
    """Arguments that fit, but for those that are given."""
    names = ("theta", "grad", "m", "v", "update")
    vectors = {name: torch.zeros(8) for name in names}
    step, eta = torch.tensor(1), torch.tensor(1.0)
    return {**vectors, "step": step, "lr": 1e-3, "eta": eta, **changed}


@pytest.mark.parametrize(
    "message, changed",
    [
        ("m must be float32", {"m": torch.zeros(8).double()}),
        ("theta must be a contiguous vector", {"theta": torch.zeros(2, 4)}),
        ("grad must be a contiguous vector", {"grad": torch.zeros(16)[::2]}),
        ("v has 9 elements, theta 8", {"v": torch.zeros(9)}),
        ("grad is on meta, theta on cpu", {"grad": torch.zeros(8, device="meta")}),
        ("eta must be 0-dim float32", {"eta": torch.ones(1)}),
        ("eta must be 0-dim float32", {"eta": torch.tensor(1.0).double()}),
        ("eta is on meta", {"eta": torch.ones((), device="meta")}),
        ("update and eta go together", {"eta": None}),
        ("update and eta go together", {"update": None}),
        ("step must count from 1, not 0", {"step": torch.tensor(0)}),
        ("step must be a tensor, not 1", {"step": 1}),
        ("step must be 0-dim int64", {"step": torch.ones(1, dtype=torch.int64)}),
        ("step must be 0-dim int64", {"step": torch.tensor(1, dtype=torch.int32)}),
        ("step is on meta", {"step": torch.ones((), dtype=torch.int64, device="meta")}),
    ],
)
def test_steps_that_are_refused(message, changed):
    given = step_arguments(**changed)
    before = {}
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            before[name] = x.clone()

    with pytest.raises(ValueError, match=message):
        csrc.adamw_accumulate_(**given)
    for name, x in before.items():
        assert torch.equal(given[name], x)


def test_vectors_that_overlap_are_refused():
    both = torch.zeros(12)
    with pytest.raises(ValueError, match="grad and m share memory"):
        csrc.adamw_accumulate_(**step_arguments(grad=both[:8], m=both[4:]))
    with pytest.raises(ValueError, match="update and eta share memory"):
        csrc.adamw_accumulate_(**step_arguments(update=both[:8], eta=both[3]))
    with pytest.raises(ValueError, match="step and theta share memory"):
        csrc.adamw_accumulate_(**step_arguments(theta=both[:8], step=both.view(torch.int64)[0]))


def test_neighbours_in_memory_are_not_refused():
    both = torch.zeros(16)
    csrc.adamw_accumulate_(**step_arguments(grad=both[:8], m=both[8:]))


@pytest.mark.parametrize(
    "message, updates, weights",
    [
        ("updates is empty", [], []),
        ("weights must be 2 numbers", [torch.zeros(8), torch.zeros(8)], [1.0]),
        (r"updates\[1\] has 9 elements, total 8", [torch.zeros(8), torch.zeros(9)], [0.5, 0.5]),
        (r"updates\[0\] must be float32", [torch.zeros(8).half()], [1.0]),
        (r"updates\[0\] must be a contiguous vector", [torch.zeros(2, 4)], [1.0]),
    ],
)
def test_aggregates_that_are_refused(message, updates, weights):
    with pytest.raises(ValueError, match=message):
        csrc.aggregate(torch.zeros(8), updates, weights)


MASKS = torch.zeros(2, 4, 4)
SHAPE = r"masks must be \(B, 1, H, W\) or \(B, H, W\)"


@pytest.mark.parametrize(
    "message, masks, small",
    [
        ("masks must be bool, uint8, int64 or float32", MASKS.double(), torch.ones(2)),
        (SHAPE, torch.zeros(2, 3, 4, 4), torch.ones(2)),
        (SHAPE, torch.zeros(4, 4), torch.ones(4)),
        (r"small must be \(2,\)", MASKS, torch.ones(3)),
        ("small is on meta", MASKS, torch.ones(2, device="meta")),
        ("masks is on meta", MASKS.to("meta"), torch.ones(2, device="meta")),
    ],
)
def test_masks_that_are_refused(message, masks, small):
    with pytest.raises(ValueError, match=message):
        csrc.mask_difficulty(masks, small, 100.0)


@pytest.mark.parametrize("log_base", [1.0, 0.0, math.nan])
def test_bases_that_are_refused(log_base):
    with pytest.raises(ValueError, match="log_base must be above 1"):
        csrc.mask_difficulty(MASKS, torch.ones(2), log_base)


# ------------------------------------------------------------------------------- in the federation


@on_devices
@pytest.mark.parametrize("method", ["fedgs", "fedavg"])
@pytest.mark.slow
def test_a_round_is_the_same_on_either_path(device, method, generator):
    config = fedgs.Config(
        method=method,
        local_epochs=2,
        batch_size=2,
        lr=1e-3,
        image_size=32,
        width=2,
        precision="fp32",
    )
    images = square_images("C1", 4, generator).to(device)
    kernels, _ = fedgs.choose_kernels("auto", torch.device(device))
    assert kernels.name == {"cpu": "cpp", "cuda": "cuda"}[device]
    assert kernels.mask_difficulty is csrc.mask_difficulty

    steps = []
    statistics = []
    for path in (kernels, fedgs.PYTORCH):
        flat = fedgs.FlatNetwork(fedgs.build_network(config).to(device))
        start = flat.state()
        server = fedgs.Server(start, {"C1": 1.0}, config, path)
        server.apply([fedgs.train_client(flat, start, images, config, 1, path)])
        steps.append(server.state.parameters - start.parameters)
        statistics.append(server.state.buffers)

    for compiled, plain in (steps, statistics):
        assert plain.norm() > 0
        assert (compiled - plain).norm() < 1e-3 * plain.norm()


def test_kernels_that_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="--kernels cuda: not for cpu; choose cpp, torch or auto"):
        fedgs.choose_kernels("cuda", cpu)

    monkeypatch.setitem(sys.modules, "csrc", None)  # as where the import fails
    kernels, reason = fedgs.choose_kernels("auto", cpu)
    assert kernels is fedgs.PYTORCH
    assert "csrc is not compiled" in reason
    with pytest.raises(UserError, match="--kernels cpp: csrc is not compiled"):
        fedgs.choose_kernels("cpp", cpu)


def test_kernels_that_were_not_compiled_for_the_device(monkeypatch):
    monkeypatch.delattr(csrc._kernels, "cuda_problem", raising=False)
    kernels, reason = fedgs.choose_kernels("auto", torch.device("cuda"))
    assert kernels is fedgs.PYTORCH
    assert "compiled without CUDA" in reason

    elsewhere = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match="theta is on cuda:0, but csrc was compiled without CUDA"):
        csrc.on_cpu(elsewhere, "theta")


# ---------------------------------------------------------------------------------------- on a GPU


@on_gpu
def test_graph_replay(device, generator):
    """The launches can be captured, and a replay computes from what the tensors then hold."""
    masks, _ = random_masks((4, 1, 200, 201), torch.uint8, 1, generator, device)
    theta, grad, m, v, update, other = torch.randn(6, 100_001, generator=generator).to(device)
    vectors = [theta, grad, m, v.abs(), update]
    everything(vectors, [update, other], masks)  # loads what no graph may load

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(vectors, [update, other], masks)

    for _ in range(3):
        new_masks, _ = random_masks((4, 1, 200, 201), torch.uint8, 1, generator, device)
        masks.copy_(new_masks)
        grad.copy_(torch.randn(100_001, generator=generator))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert_same_bits(replayed, everything(vectors, [update, other], masks))


@on_gpu
def test_streams_do_not_share_a_counter(device, generator):
    shape = (3, 1, 512, 511)
    cases = [random_masks(shape, torch.uint8, 1, generator, device) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()

    areas = []
    for _ in range(20):
        for (masks, small), stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                area, _, _ = csrc.mask_difficulty(masks, small, 100.0)
                areas.append(area)
    torch.cuda.synchronize()

    expected = [fedgs.mask_difficulty(masks, small, 100.0)[0] for masks, small in cases]
    for i, area in enumerate(areas):
        assert torch.equal(area, expected[i % len(cases)])


@on_gpu
def test_mask_difficulty_is_one_launch(device, generator):
    masks, small = random_masks((4, 1, 512, 512), torch.int64, 1, generator, device)
    csrc.mask_difficulty(masks, small, 100.0)  # the stream's counter is zeroed once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        csrc.mask_difficulty(masks, small, 100.0)
        torch.cuda.synchronize()

    on_device = torch.autograd.DeviceType.CUDA
    launched = [event.name for event in profile.events() if event.device_type == on_device]
    assert len(launched) == 1
    assert "mask_difficulty" in launched[0]
