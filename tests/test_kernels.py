"""The compiled kernels against the PyTorch lines that define them, on every device that is here."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import fedgs

csrc = pytest.importorskip("csrc", reason="the kernels are not compiled: pip install -v -e . says why")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available() or csrc.problem(torch.device("cuda")) != "", reason="no GPU, or no CUDA kernels for it"))]
on_devices = pytest.mark.parametrize("device", DEVICES)

# One element more and less than what a thread, a block or a piece takes, on either device.
SIZES = [0, 1, 3, 4, 5, 1023, 4096, 4099, 32769, 300_001]


def uniform(*shape, generator, device="cpu", low=0.0, high=1.0):
    return (low + (high - low) * torch.rand(*shape, generator=generator)).to(device)


# ------------------------------------------------------------------------------------------- mask_difficulty


def assert_same_difficulty(masks, small, log_base=100.0):
    area, delta, eta = csrc.mask_difficulty(masks, small, log_base)
    expected_area, expected_delta, expected_eta = fedgs.mask_difficulty(masks, small, log_base)
    assert torch.equal(area, expected_area) and area.dtype == torch.int64
    torch.testing.assert_close(delta, expected_delta, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(eta, expected_eta, rtol=1e-6, atol=0)


def random_masks(shape, dtype, value, generator, device):
    masks = torch.rand(shape, generator=generator) < 0.02
    small = torch.rand(shape[0], generator=generator) < 0.7
    return (masks.to(dtype) * value).to(dtype).to(device), small.to(device)


@on_devices
@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_mask_difficulty(device, dtype, value, generator):
    sizes = [(1, 1), (3, 5), (16, 16), (80, 80), (127, 129), (181, 181), (256, 512)]
    for images, size in itertools.product((1, 2, 5), sizes):
        for shape in ((images, *size), (images, 1, *size)):
            assert_same_difficulty(*random_masks(shape, dtype, value, generator, device), log_base=1000.0)


@on_devices
def test_mask_difficulty_of_nothing(device):
    for shape in ((0, 1, 8, 8), (0, 8, 8), (2, 0, 8), (3, 1, 0, 0)):
        masks = torch.zeros(shape, dtype=torch.uint8, device=device)
        assert_same_difficulty(masks, torch.ones(shape[0], dtype=torch.bool, device=device))
    assert_same_difficulty(torch.zeros(3, 64, 64, device=device), torch.ones(3, dtype=torch.bool, device=device))


@on_devices
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_mask_difficulty_of_everything(device, dtype):
    """Whole images of lesion: no counter may overflow on the way."""
    assert_same_difficulty(torch.ones(3, 301, 305, dtype=dtype, device=device), torch.ones(3, dtype=torch.bool, device=device))


@on_devices
def test_mask_difficulty_of_views(device, generator):
    """Not contiguous, or contiguous but not at a multiple of 16 bytes."""
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        masks, small = random_masks((6, 1, 45, 77), dtype, 1, generator, device)
        for view in (masks[1:], masks.transpose(2, 3), masks[..., 3:, ::2], masks.flip(0)):
            assert_same_difficulty(view, small[: len(view)])
        assert_same_difficulty(masks[::2], small[::2])


@on_devices
def test_what_counts_as_lesion(device):
    """Everything but 0, and that has two signs."""
    masks = torch.tensor([0.0, -0.0, math.nan, math.inf, -1e-45, 0.5], device=device).view(6, 1, 1).expand(6, 3, 3)
    small = torch.ones(6, dtype=torch.bool, device=device)
    assert csrc.mask_difficulty(masks, small, 100.0)[0].tolist() == [0, 0, 9, 9, 9, 9]
    assert_same_difficulty(masks, small)
    assert_same_difficulty(torch.tensor([2**40, -1, 0], device=device).view(3, 1, 1), small[:3])


# ------------------------------------------------------------------------------------------ adamw_accumulate_


def assert_same_step(vectors, step, eta, lr=1e-3, **hyper):
    """theta, grad, m, v and perhaps delta; both paths start from the same values."""
    theta, grad, m, v, *delta = vectors
    before, copies = ([x.clone() for x in vectors] for _ in range(2))
    csrc.adamw_accumulate_(theta, grad, m, v, step, lr, *delta, *([eta] if delta else []), **hyper)
    fedgs.adamw_accumulate_(*copies[:4], step, lr, *copies[4:], *([eta] if delta else []), **hyper)
    for x, expected, earlier in zip(vectors, copies, before, strict=True):
        rounding = 1e-6 * (earlier.abs() + expected.abs())  # a sum may be much smaller than what is summed
        close = expected.isfinite() & ((x - expected).abs() <= rounding)
        assert (close | (x == expected) | (x.isnan() & expected.isnan())).all()


def step_vectors(n, generator, device, accumulate=True, offset=0):
    """theta, grad, m, v, delta with magnitudes from tiny to large; with an offset, not at a multiple of 16 bytes."""
    scale = 10 ** uniform(5, n + offset, generator=generator, low=-6, high=2)
    vectors = (torch.randn(5, n + offset, generator=generator) * scale).to(device)
    vectors[2].copysign_(vectors[1])  # where m and grad cancel, rounding alone would decide s
    vectors[3].square_()
    return [x.clone()[offset:] for x in vectors[: 5 if accumulate else 4]]


@on_devices
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_accumulate(device, accumulate, offset, generator):
    for n in SIZES:
        vectors = step_vectors(n, generator, device, accumulate, offset)
        for step in (1, 2, 1000):
            assert_same_step(vectors, step, torch.tensor(1.7, device=device))


@on_devices
def test_adamw_hyperparameters(device, generator):
    assert_same_step(step_vectors(1000, generator, device), 3, torch.tensor(3.0, device=device), lr=0.5,
                     betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3)


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_step_hides_no_bad_gradient(device, value, generator):
    vectors = step_vectors(1000, generator, device)
    vectors[1][[0, 7, 998, 999]] = value
    assert_same_step(vectors, 2, torch.tensor(1.0, device=device))
    assert vectors[4].isfinite().logical_not().sum() == (0 if value == 3e38 else 4)


# -------------------------------------------------------------------------------------------------- aggregate


def assert_same_aggregate(theta, updates, weights, server_lr=1.0):
    new, norms, finite = csrc.aggregate(theta, updates, weights, server_lr)
    expected, expected_norms, expected_finite = fedgs.aggregate(theta, updates, weights, server_lr)
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0, equal_nan=True)
    assert norms.dtype == torch.float64 and torch.equal(finite, expected_finite)
    return new


@on_devices
@pytest.mark.parametrize("offset", [0, 1])
def test_aggregate(device, offset, generator):
    for n, clients in itertools.product(SIZES, (1, 2, 4, 5, 9, 33)):
        vectors = torch.randn(clients + 1, n + offset, generator=generator).to(device)
        theta, *updates = [x.clone()[offset:] for x in vectors]
        before = theta.clone()
        weights = torch.rand(clients, generator=generator, dtype=torch.float64)
        assert_same_aggregate(theta, updates, (weights / weights.sum()).tolist(), server_lr=0.7)
        assert torch.equal(theta, before)


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_bad_client_is_named(device, value, generator):
    updates = list(torch.randn(6, 40_001, generator=generator).to(device))
    updates[4][-1] = value
    assert_same_aggregate(updates[5], updates[:5], [0.2] * 5)
    assert csrc.aggregate(updates[5], updates[:5], [0.2] * 5)[2].tolist() == [True] * 4 + [False]
    large = torch.full((1000,), 3e38, device=device)  # finite, though its square is beyond float32
    assert csrc.aggregate(large, [large], [1.0])[2].tolist() == [True]


@on_devices
def test_one_update_may_come_twice(device, generator):
    theta, update = torch.randn(2, 5000, generator=generator).to(device)
    assert_same_aggregate(theta, [update, update, theta], [0.25, 0.25, 0.5])


# ------------------------------------------------------------------------------------------ all three together


def test_threads_do_not_change_a_bit(generator):
    theta, grad, m, v, delta, *updates = torch.randn(12, 1_000_003, generator=generator)
    masks = torch.rand(3, 700, 700, generator=generator) < 0.01
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            vectors = [x.clone() for x in (theta, grad, m, v.abs(), delta)]
            csrc.adamw_accumulate_(*vectors[:4], 3, 1e-3, vectors[4], torch.tensor(1.5))
            results.append([*vectors, *csrc.aggregate(theta, updates, [1 / 7] * 7),
                            *csrc.mask_difficulty(masks, torch.ones(3, dtype=torch.bool), 100.0)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_indices_are_64_bit():
    """Which elements a piece holds, far beyond 2^31; all kernels of both devices index through this."""
    n = 2**40 + 11
    for index, size in ((0, 4), (2**31, 4), (2**25 + 1, 2**15), (n // 4096, 4096), (n - 1, 1)):
        assert csrc._kernels.piece(index, size, n) == (index * size, min(index * size + size, n))


def vectors_without(name, **changed):
    theta = torch.zeros(8)
    return {**{name: theta.clone() for name in ("theta", "grad", "m", "v", "delta")}, "step": 1, "lr": 1e-3,
            "eta": torch.tensor(1.0), **changed}


@pytest.mark.parametrize("message, changed", [
    ("m must be float32, not torch.float64", {"m": torch.zeros(8).double()}),
    ("grad has 7 elements, theta 8", {"grad": torch.zeros(7)}),
    ("v must be a contiguous vector", {"v": torch.zeros(16)[::2]}),
    ("theta must be a contiguous vector", {"theta": torch.zeros(2, 4)}),
    ("delta is on meta", {"delta": torch.zeros(8, device="meta")}),
    ("eta must be 0-dim float32", {"eta": torch.ones(1)}),
    ("eta must be 0-dim float32", {"eta": torch.tensor(1.0).double()}),
    ("eta is on meta", {"eta": torch.ones((), device="meta")}),
    ("delta and eta go together", {"eta": None}),
    ("delta and eta go together", {"delta": None}),
    ("step must count from 1", {"step": 0}),
])
def test_steps_that_are_refused(message, changed):
    given = vectors_without("", **changed)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    with pytest.raises(ValueError, match=message):
        csrc.adamw_accumulate_(**given)
    assert all(torch.equal(given[name], x) for name, x in before.items())


def test_vectors_that_overlap_are_refused():
    both = torch.zeros(12)
    with pytest.raises(ValueError, match="grad and m share memory"):
        csrc.adamw_accumulate_(torch.zeros(8), both[:8], both[4:], torch.zeros(8), 1, 1e-3)
    with pytest.raises(ValueError, match="grad and eta share memory"):
        csrc.adamw_accumulate_(torch.zeros(8), both[:8], torch.zeros(8), torch.zeros(8), 1, 1e-3, torch.zeros(8), both[3])


@pytest.mark.parametrize("message, updates, weights", [
    ("updates is empty", [], []),
    ("weights must be 2 numbers", [torch.zeros(8), torch.zeros(8)], [1.0]),
    (r"updates\[1\] has 9 elements", [torch.zeros(8), torch.zeros(9)], [0.5, 0.5]),
    (r"updates\[0\] must be float32", [torch.zeros(8).half()], [1.0]),
    (r"updates\[0\] must be a contiguous vector", [torch.zeros(2, 4)], [1.0]),
])
def test_aggregates_that_are_refused(message, updates, weights):
    with pytest.raises(ValueError, match=message):
        csrc.aggregate(torch.zeros(8), updates, weights)


@pytest.mark.parametrize("message, masks, small, log_base", [
    ("masks must be bool, uint8, int64 or float32", torch.zeros(2, 4, 4).double(), torch.ones(2), 100),
    (r"masks must be \(B, 1, H, W\) or \(B, H, W\)", torch.zeros(2, 3, 4, 4), torch.ones(2), 100),
    (r"masks must be \(B, 1, H, W\) or \(B, H, W\)", torch.zeros(4, 4), torch.ones(4), 100),
    (r"small must be \(2,\)", torch.zeros(2, 4, 4), torch.ones(3), 100),
    ("small is on meta", torch.zeros(2, 4, 4), torch.ones(2, device="meta"), 100),
    ("masks is on meta", torch.zeros(2, 4, 4, device="meta"), torch.ones(2, device="meta"), 100),
    ("log_base must be above 1", torch.zeros(2, 4, 4), torch.ones(2), 1.0),
])
def test_masks_that_are_refused(message, masks, small, log_base):
    with pytest.raises(ValueError, match=message):
        csrc.mask_difficulty(masks, small, log_base)


# ---------------------------------------------------------------------------------------- in the federation


@on_devices
@pytest.mark.parametrize("method", ["fedgs", "fedavg"])
def test_a_round_is_the_same_on_either_path(device, method, generator):
    config = fedgs.Config(method=method, local_epochs=2, batch_size=2, lr=1e-3, image_size=32, width=2)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 10:13, 10:14] = 1
    client = data.Images(1, ["a", "b", "c", "d"], images, masks, torch.full((4,), 1024 / 12), torch.tensor([True, False] * 2), torch.ones(4, 2))
    kernels, _ = fedgs.choose_kernels("auto", torch.device(device))
    assert kernels.name == {"cpu": "cpp", "cuda": "cuda"}[device] and kernels.mask_difficulty is csrc.mask_difficulty
    states = []
    for path in (kernels, fedgs.PYTORCH):
        flat = fedgs.FlatNetwork(fedgs.build_network(config).to(device))
        server = fedgs.Server(flat, path)
        update = fedgs.train_client(flat, server, client.to(device), config, 1, path)
        start = server.state[0].clone()
        server.apply([update], config, 1)
        states.append((server.state[0] - start, server.state[1]))
    for compiled, plain in zip(*states):
        assert (compiled - plain).norm() < 1e-3 * plain.norm() and plain.norm() > 0


def test_kernels_that_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(fedgs.RunError, match="--kernels cuda: not for device cpu, choose cpp, torch or auto"):
        fedgs.choose_kernels("cuda", cpu)
    monkeypatch.setitem(sys.modules, "csrc", None)  # as where the import fails
    kernels, why = fedgs.choose_kernels("auto", cpu)
    assert kernels is fedgs.PYTORCH and "csrc is not compiled" in why
    with pytest.raises(fedgs.RunError, match="--kernels cpp: csrc is not compiled"):
        fedgs.choose_kernels("cpp", cpu)


def test_kernels_that_were_not_compiled_for_the_device(monkeypatch):
    monkeypatch.delattr(csrc._kernels, "cuda_problem", raising=False)
    kernels, why = fedgs.choose_kernels("auto", torch.device("cuda"))
    assert kernels is fedgs.PYTORCH and "compiled without CUDA" in why
    with pytest.raises(ValueError, match="theta is on cuda:0, but csrc was compiled without CUDA"):
        csrc.on_cpu(SimpleNamespace(device=torch.device("cuda:0")), "theta")


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("device", DEVICES[1:])
def test_graph_replay(device, generator):
    """The launches are capturable, and each replay computes from what the tensors then hold."""
    masks, small = random_masks((4, 1, 200, 201), torch.uint8, 1, generator, device)
    theta, grad, m, v, delta, other = torch.randn(6, 100_001, generator=generator).to(device)
    v.abs_()
    start = [x.clone() for x in (theta, m, v, delta)]

    def everything():
        area, _, eta = csrc.mask_difficulty(masks, small, 100.0)
        csrc.adamw_accumulate_(theta, grad, m, v, 3, 1e-3, delta, eta)
        return area, eta, csrc.aggregate(theta, [delta, other], [0.5, 0.5])[0]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for _ in range(3):
        masks.copy_(random_masks((4, 1, 200, 201), torch.uint8, 1, generator, device)[0])
        for x, value in zip((theta, m, v, delta), start):
            x.copy_(value)
        graph.replay()
        replayed = [x.clone() for x in (*captured, theta, m, v, delta)]
        for x, value in zip((theta, m, v, delta), start):
            x.copy_(value)
        assert all(torch.equal(a, b) for a, b in zip(replayed, [*everything(), theta, m, v, delta], strict=True))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_streams_do_not_share_a_counter(device, generator):
    cases = [random_masks((3, 1, 512, 511), torch.uint8, 1, generator, device) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for (masks, small), stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                results.append(csrc.mask_difficulty(masks, small, 100.0))
    torch.cuda.synchronize()
    for result, (masks, small) in zip(results, itertools.cycle(cases)):
        assert torch.equal(result[0], fedgs.mask_difficulty(masks, small, 100.0)[0])


@pytest.mark.parametrize("device", DEVICES[1:])
def test_mask_difficulty_is_one_launch(device, generator):
    masks, small = random_masks((4, 1, 512, 512), torch.int64, 1, generator, device)
    csrc.mask_difficulty(masks, small, 100.0)  # the stream's counter is zeroed once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        csrc.mask_difficulty(masks, small, 100.0)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "mask_difficulty" in launched[0]
