"""The method: difficulty, step, aggregation, client and server against the paper's formulas."""

import copy
import dataclasses
import functools
import math
import weakref

import pytest
import torch

import data
import fedgs
from fedgs import PYTORCH, FlatNetwork, RunError, Server, Update, adamw_accumulate_, aggregate, mask_difficulty, train_client
from models import UTNet

# ------------------------------------------------------------------------------------------ difficulty


def masks_of(areas, height, width, dtype=torch.uint8):
    masks = torch.zeros(len(areas), 1, height, width, dtype=dtype)
    for mask, area in zip(masks, areas):
        mask.view(-1)[:area] = 1
    return masks


def test_worked_values():
    masks, small = masks_of([21, 1900], 64, 128), torch.ones(2, dtype=torch.bool)
    for log_base, expected in ((100, [0.9326720054, 0.1003519069]), (1000, [0.6327675588, 0.0447216258])):
        area, delta, eta = mask_difficulty(masks, small, log_base)
        assert area.tolist() == [21, 1900] and area.dtype == torch.int64
        assert delta.tolist() == pytest.approx(expected, rel=1e-6)
        assert eta.item() == pytest.approx(1 + sum(expected), rel=1e-6)
    _, delta, eta = mask_difficulty(masks_of([50], 512, 512), small[:1], 100)
    assert delta.item() == pytest.approx(0.9980215523, rel=1e-6)
    assert eta.item() == pytest.approx(2.9960431045, rel=1e-6)


def test_only_small_lesions_in_view_are_difficult():
    masks = masks_of([3, 3, 0, 64 * 64], 64, 64)
    area, delta, eta = mask_difficulty(masks, torch.tensor([True, False, True, True]), 100)
    assert area.tolist() == [3, 3, 0, 4096]
    assert delta[0] > 0 and delta[1:].tolist() == [0, 0, 0]
    assert eta.item() == pytest.approx(1 + 2 / 4 * delta[0].item())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("value", [1, 255])
def test_any_mask_type(dtype, value):
    masks = (masks_of([5, 77], 16, 32, torch.int64) * value).to(dtype)
    small = torch.tensor([True, True])
    expected = mask_difficulty(masks_of([5, 77], 16, 32), small, 100)
    for given in (masks, masks[:, 0]):  # with and without a channel
        assert all(torch.equal(a, b) for a, b in zip(mask_difficulty(given, small, 100), expected))


def test_no_image_has_scale_one():
    area, delta, eta = mask_difficulty(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.bool), 100)
    assert area.shape == delta.shape == (0,) and eta.item() == 1


# ------------------------------------------------------------------------------------------------ step


def gradients(steps, size, generator):
    scales = torch.logspace(-6, 2, size)  # from tiny to large
    return torch.randn(steps, size, generator=generator) * scales


def test_step_is_adamw(generator):
    start, grads = torch.randn(1000, generator=generator), gradients(20, 1000, generator)
    reference = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([reference], lr=1e-3)  # PyTorch's defaults are the paper's
    theta, (m, v, delta) = start.clone(), torch.zeros(3, 1000)
    for step, grad in enumerate(grads, start=1):
        reference.grad = grad.clone()
        optimiser.step()
        adamw_accumulate_(theta, grad, m, v, step, 1e-3, delta, torch.tensor(1.7))
        torch.testing.assert_close(theta, reference.detach(), rtol=1e-7, atol=1e-7)


def test_accumulated_update_is_its_closed_form(generator):
    grads, etas, lr = gradients(12, 500, generator), 1 + 2 * torch.rand(12, generator=generator), 1e-3
    theta, m, v, delta = torch.zeros(4, 500)
    for step, (grad, eta) in enumerate(zip(grads, etas), start=1):
        adamw_accumulate_(theta, grad, m, v, step, lr, delta, eta)
    expected, grads = torch.zeros(500, dtype=torch.float64), grads.double()
    for t in range(1, 13):
        powers = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        m_hat = (0.1 * 0.9**powers * grads[:t]).sum(0) / (1 - 0.9**t)
        v_hat = (0.001 * 0.999**powers * grads[:t] ** 2).sum(0) / (1 - 0.999**t)
        expected += etas[t - 1].double() * lr * m_hat / (v_hat.sqrt() + 1e-8)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_scaling_leaves_local_training_untouched(generator):
    grads = gradients(5, 100, generator)
    plain, scaled, plain_m, plain_v, m, v, delta = torch.ones(7, 100) * torch.tensor([1, 1, 0, 0, 0, 0, 0])[:, None]
    for step, grad in enumerate(grads, start=1):
        adamw_accumulate_(plain, grad, plain_m, plain_v, step, 1e-2)
        adamw_accumulate_(scaled, grad, m, v, step, 1e-2, delta, torch.tensor(3.0))
    assert torch.equal(plain, scaled)


# ----------------------------------------------------------------------------------------- aggregation


def test_aggregate(generator):
    theta, *updates = torch.randn(4, 1000, generator=generator)
    weights = [0.5, 0.2, 0.3]
    new, norms, finite = aggregate(theta, updates, weights, server_lr=0.7)
    expected = theta.double() - 0.7 * sum(w * u.double() for w, u in zip(weights, updates))
    torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms, torch.stack([u.double().square().sum() for u in updates]), rtol=1e-12, atol=0)
    assert finite.tolist() == [True, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_aggregate_names_what_is_not_finite(value):
    updates = torch.full((3, 10), 3e38)  # finite, though the square overflows float32
    updates[1, 7] = value
    assert aggregate(torch.zeros(10), list(updates), [1 / 3] * 3)[2].tolist() == [True, False, True]


# ------------------------------------------------------------------------------- networks, clients, server


CONFIG = fedgs.Config(local_epochs=2, batch_size=2, lr=1e-3, image_size=32, width=2, log_base=100)


def client_images(centre, count, generator, small=True):
    masks = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 10:13, 10:14] = 1
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    names = [str(i) for i in range(count)]
    return data.Images(centre, names, images, masks, torch.full((count,), 1024 / 12), torch.full((count,), small), torch.ones(count, 2))


@pytest.fixture
def flat():
    return FlatNetwork(fedgs.build_network(CONFIG))


def test_vectors_are_the_network(flat, generator):
    reference = UTNet(width=2)
    reference.load_state_dict(flat.network.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=generator)
    for network in (flat.network, reference):
        network(images).square().mean().backward()
    grads = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert torch.equal(flat.grad, grads) and torch.equal(flat.parameters, torch.cat([p.detach().flatten() for p in reference.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(flat.network.state_dict().values(), reference.state_dict().values()))
    assert flat.counters.unique().tolist() == [1]
    flat.parameters.zero_()
    assert all((p == 0).all() for p in flat.network.parameters())


def test_scale_one_is_parameter_averaging(flat, generator):
    """FedGS with eta = 1, no weight decay and equal weights is FedAvg of parameters."""
    no_decay = PYTORCH._replace(adamw_accumulate_=functools.partial(adamw_accumulate_, weight_decay=0.0))
    server, updates, trained = Server(flat), [], []
    for centre in (1, 2, 3):
        updates.append(train_client(flat, server, client_images(centre, 4, generator, small=False), CONFIG, 1, no_decay))
        trained.append(flat.parameters.clone())
    assert all(u.eta == u.steps == 4 and u.scaled == 0 for u in updates)
    server.apply(updates, CONFIG, 1)
    mean = torch.stack(trained).double().mean(0)
    torch.testing.assert_close(server.state[0].double(), mean, rtol=1e-6, atol=1e-7)
    assert (server.state[0] - Server(flat).state[0]).abs().max() > 1e-4  # the clients did move


def test_small_lesions_scale_the_report_alone(flat, generator):
    server, images = Server(flat), client_images(1, 4, generator)
    scaled = train_client(flat, server, images, CONFIG, 1)
    local = flat.parameters.clone()
    images.small[:] = False
    plain = train_client(flat, server, images, CONFIG, 1)
    assert torch.equal(flat.parameters, local)
    assert scaled.eta > scaled.steps and scaled.scaled == scaled.steps and scaled.delta.norm() > plain.delta.norm()


def test_difficulty_is_of_what_the_network_sees(flat, generator, monkeypatch):
    """The masks after augmentation, with the flags of the same images, and the configured log base."""
    images = client_images(1, 4, generator)
    for i, mask in enumerate(images.masks):
        mask.zero_()[:, 10 : 12 + 3 * i, 10:16] = 1  # areas tell the images apart
    images.small[:] = torch.tensor([True, False, True, False])
    masks_of_loss, calls = [], []
    loss = fedgs.metrics.soft_dice_loss
    monkeypatch.setattr(fedgs.metrics, "soft_dice_loss", lambda logits, y: masks_of_loss.append(y) or loss(logits, y))
    kernels = PYTORCH._replace(mask_difficulty=lambda *given: calls.append(given) or mask_difficulty(*given))
    monkeypatch.setattr(fedgs.data, "augment", lambda x, y, draws: (x, y.flip(3)))  # areas stay, places do not
    train_client(flat, Server(flat), images, dataclasses.replace(CONFIG, log_base=321.0), 1, kernels)
    assert len(calls) == 4
    for y, (masks, small, log_base) in zip(masks_of_loss, calls, strict=True):
        number = (masks.flatten(1).sum(1) // 6 - 2) // 3  # which images these are
        assert torch.equal(masks, y) and torch.equal(masks, images.masks[number].flip(3))
        assert torch.equal(small, images.small[number]) and log_base == 321.0


def test_a_client_depends_on_seed_round_and_centre_alone(flat, generator):
    server, one, other = Server(flat), client_images(1, 4, generator), client_images(2, 4, generator)
    first = train_client(flat, server, one, CONFIG, 1)
    train_client(flat, server, other, CONFIG, 1)
    torch.rand(5)  # the global generator must not matter
    assert torch.equal(train_client(flat, server, one, CONFIG, 1).delta, first.delta)
    assert not torch.equal(train_client(flat, server, one, CONFIG, 2).delta, first.delta)
    assert not torch.equal(train_client(flat, server, one, dataclasses.replace(CONFIG, seed=1), 1).delta, first.delta)


def update(flat, centre, delta, steps=1, images=1, buffers=0.0, counters=0):
    return Update(centre, torch.full_like(flat.parameters, delta), torch.full_like(flat.buffers, buffers),
                  torch.full_like(flat.counters, counters), steps, images, torch.tensor(0.5), {}, torch.tensor(1.0), torch.tensor(0.0))


@pytest.mark.parametrize("method, share", [("fedgs", 3 / 4), ("fedavg", 1 / 5)])  # T_k against n_k
def test_weights(flat, method, share):
    server = Server(flat)
    before = server.state[0]
    updates = [update(flat, 1, 1.0, steps=3, images=10, buffers=4.0, counters=8), update(flat, 2, 0.0, steps=1, images=40)]
    server.apply(updates, fedgs.Config(method=method), 1)
    torch.testing.assert_close(before - server.state[0], torch.full_like(before, share), rtol=0, atol=1e-6)
    torch.testing.assert_close(server.state[1], torch.full_like(server.state[1], 4 * share))
    assert server.state[2].unique().tolist() == [round(8 * share)] and server.state[2].dtype == torch.int64


def test_fedavg_reports_the_difference_of_parameters(flat, generator):
    server = Server(flat)
    u = train_client(flat, server, client_images(1, 4, generator), dataclasses.replace(CONFIG, method="fedavg"), 1)
    assert torch.equal(u.delta, server.state[0] - flat.parameters) and u.eta == u.steps


def test_index_tables_come_back_as_they_were(flat, generator):
    before = copy.deepcopy(flat.network.state_dict())
    server = Server(flat)
    server.apply([train_client(flat, server, client_images(k, 2 * k, generator), CONFIG, 1) for k in (1, 2, 3)], CONFIG, 1)
    flat.load(server.state)
    after = flat.network.state_dict()
    indices = [name for name in before if name.endswith("relative_position_index")]
    assert len(indices) == 9 and all(torch.equal(before[name], after[name]) for name in indices)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert after["inc.0.bn1.num_batches_tracked"] == 5  # 2, 4, 6 batches, weighted by 2, 4, 6 steps: 56 / 12


def test_server_momentum(flat):
    """buffer <- g, then mu buffer + g, with g = sum_k w_k Delta_k / lr; theta <- theta - lr buffer, times the server's rate."""
    server, config = Server(flat), fedgs.Config(server_momentum=0.9, lr=1e-3, server_lr=0.8)
    theta, buffer = server.state[0].double(), 0.0
    for delta in (0.3, -0.1, 0.2):
        server.apply([update(flat, 1, delta), update(flat, 2, 2 * delta)], config, 1)
        buffer = 0.9 * buffer + 1.5 * delta / 1e-3
        theta = theta - 0.8 * 1e-3 * buffer
        torch.testing.assert_close(server.state[0].double(), theta, rtol=1e-5, atol=1e-5)


def test_server_learning_rate_stretches_the_step(flat):
    server = Server(flat)
    before = server.state[0]
    server.apply([update(flat, 1, 0.5)], fedgs.Config(method="fedavg", server_lr=1.12), 1)
    torch.testing.assert_close(before - server.state[0], torch.full_like(before, 0.56), rtol=0, atol=1e-6)


@pytest.mark.parametrize("field", ["delta", "buffers", "loss"])
def test_a_round_with_a_value_that_is_not_finite_is_refused(flat, field):
    server = Server(flat)
    before = server.state
    bad = update(flat, 4, 0.1)
    getattr(bad, field).view(-1)[0] = math.nan
    with pytest.raises(RunError, match=r"round 7 .* client C4 is not finite"):
        server.apply([update(flat, 1, 0.1), bad], fedgs.Config(), 7)
    assert server.state is before


def test_updates_are_summed_in_groups(flat, generator):
    """Updates that come one after another: never more than a group of them in memory, and the sum that a list gives."""
    alive, most = weakref.WeakSet(), 0

    def numbered(k):
        return update(flat, k, 0.1 * k, steps=k, images=k, buffers=1.0 / k, counters=k)

    def arriving():
        nonlocal most
        for k in range(1, 31):
            u = numbered(k)
            alive.add(u.delta)
            most = max(most, len(alive))
            yield u
            del u

    servers = Server(flat), Server(flat)
    seen = servers[0].apply(arriving(), fedgs.Config(), 1, total=sum(range(1, 31)))
    assert most <= Server.GROUP and [u.centre for u in seen] == list(range(1, 31)) and all(u.delta is None for u in seen)
    servers[1].apply([numbered(k) for k in range(1, 31)], fedgs.Config(), 1)
    assert all(torch.equal(a, b) for a, b in zip(servers[0].state, servers[1].state))
    mean = sum(0.1 * k * k for k in range(1, 31)) / sum(range(1, 31))
    torch.testing.assert_close(Server(flat).state[0] - servers[0].state[0], torch.full_like(flat.parameters, mean), rtol=1e-5, atol=1e-5)


def test_a_group_is_one_aggregation(flat):
    """Up to eight clients give the bits of one call of `aggregate`."""
    server, updates = Server(flat), [update(flat, k, 0.3 / k, images=k) for k in range(1, 9)]
    expected, _, _ = aggregate(server.state[0], [u.delta for u in updates], [k / 36 for k in range(1, 9)])
    server.apply(iter(updates), fedgs.Config(method="fedavg"), 1, total=36)
    assert torch.equal(server.state[0], expected)


def test_a_round_is_refused_for_any_of_its_groups(flat):
    server = Server(flat)
    before, updates = server.state, [update(flat, k, 0.1) for k in range(1, 21)]
    for k in (9, 20):
        updates[k - 1].delta[3] = math.inf
    with pytest.raises(RunError, match="client C9, C20 is not finite"):
        server.apply(iter(updates), fedgs.Config(), 1, total=20)
    assert server.state is before
