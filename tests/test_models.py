"""UTNet and SD-UTNet: published names and shapes, every block against its formula, any size divisible by 16."""

import json

import pytest
import torch
import torch.nn.functional as F

from metrics import disentangled_loss
from models import GRID, AdaIN, RelativePosition, SDUTNet, UTNet, attend, resize


@pytest.mark.parametrize("file, build, channels", [
    ("utnet_rgb.json", UTNet, 3), ("utnet_ct.json", UTNet, 1),
    ("sd_utnet_rgb_512.json", SDUTNet, 3), ("sd_utnet_ct_512.json", SDUTNet, 1),
])
def test_published_names_and_shapes(published, file, build, channels):
    expected = json.loads((published / file).read_text())
    network = build(in_channels=channels)
    assert {name: list(x.shape) for name, x in network.state_dict().items()} == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["parameters"]


def test_number_of_parameters():
    assert sum(p.numel() for p in UTNet().parameters()) == 14_418_788
    assert sum(p.numel() for p in SDUTNet().parameters()) == 18_836_223


@pytest.mark.parametrize("height, width", [(16, 16), (32, 32), (48, 80), (128, 64), (16, 144)])
def test_any_size_divisible_by_16(height, width):
    network = UTNet(width=4).eval()
    assert network(torch.rand(2, 3, height, width)).shape == (2, 2, height, width)


@pytest.mark.parametrize("size", [(100, 96), (96, 8)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="divisible by 16"):
        UTNet(width=4)(torch.rand(1, 3, *size))


def test_index_covers_every_offset():
    index = RelativePosition(heads=2).relative_position_index
    for query, key in ((0, 0), (0, 63), (63, 0), (17, 42)):
        down, right = query // 8 - key // 8, query % 8 - key % 8
        assert index[query, key] == (down + 7) * 15 + right + 7
    assert index.unique().numel() == 15 * 15


@pytest.mark.parametrize("height, width", [(16, 16), (6, 10), (3, 20), (1, 1)])
def test_a_query_uses_the_row_of_its_cell(height, width):
    position = RelativePosition(heads=3)
    bias = position(height, width)
    assert bias.shape == (3, height * width, 64)
    for row in range(height):
        for column in range(width):
            cell = (row * GRID // height) * GRID + column * GRID // width
            expected = position.relative_position_bias_table[position.relative_position_index[cell]]  # (64, heads)
            assert torch.equal(bias[:, row * width + column], expected.T)


@pytest.mark.parametrize("height, width", [(16, 16), (8, 8), (6, 10)])
def test_attention_is_its_formula(generator, height, width):
    heads, depth = 4, 6
    q, k, v = torch.randn(3, 2, heads * depth, height, width, generator=generator)
    position = RelativePosition(heads)
    out = attend(q, k, v, heads, position)
    k, v, bias = resize(k, (8, 8)), resize(v, (8, 8)), position(height, width)
    for head in range(heads):  # channel c belongs to head c mod heads; the bias is scaled with the product
        qh, kh, vh = (x[:, head::heads].flatten(2) for x in (q, k, v))  # (B, depth, HW or 64)
        weights = torch.softmax((qh.transpose(1, 2) @ kh + bias[head]) * depth**-0.5, dim=-1)
        expected = (weights @ vh.transpose(1, 2)).transpose(1, 2).reshape(2, depth, height, width)
        torch.testing.assert_close(out[:, head::heads], expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_their_formulas(generator):
    """The residual paths and the order of channels, written out with the blocks' own convolutions and norms."""
    torch.manual_seed(0)
    network = UTNet(width=4).eval()
    for module in network.modules():  # norms that do something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.normal_(generator=generator)
    x = torch.randn(1, 16, 24, 24, generator=generator)
    skip, coarse = torch.randn(1, 16, 32, 32, generator=generator), torch.randn(1, 32, 16, 16, generator=generator)
    relu = torch.relu

    block = network.down3.blocks[1]  # 16 to 32 channels
    bn, _, to_channels = block.shortcut
    expected = block.conv2(relu(block.bn2(block.conv1(relu(block.bn1(x)))))) + to_channels(relu(bn(x)))
    torch.testing.assert_close(block(x), expected)

    block = network.down2.blocks[2]  # a transformer on 16 channels
    q, k, v = block.attn.to_qkv(block.bn1(x)).split(16, dim=1)
    y = x + block.attn.to_out(attend(q, k, v, 2, block.attn.relative_position_encoding))
    torch.testing.assert_close(block(x), y + block.mlp(relu(block.bn2(y))))

    def upsample(z):
        return torch.nn.functional.interpolate(z, size=(32, 32), mode="bilinear", align_corners=True)

    block = network.up2.attn_decoder
    k, v = block.attn.to_kv(block.bn_l(coarse)).split(16, dim=1)
    q = block.attn.to_q(block.bn_h(skip))
    y = upsample(block.conv_ch(coarse)) + block.attn.to_out(attend(q, k, v, 4, block.attn.relative_position_encoding))
    y = y + block.mlp(relu(block.bn2(y)))
    torch.testing.assert_close(network.up2(coarse, skip), network.up2.blocks(torch.cat([y, skip], dim=1)))

    fine, low = torch.randn(1, 4, 32, 32, generator=generator), torch.randn(1, 8, 16, 16, generator=generator)
    joined = torch.cat([fine, network.up4.conv_ch(upsample(low))], dim=1)
    torch.testing.assert_close(network.up4(low, fine), network.up4.conv(joined))


def test_initial_weights():
    torch.manual_seed(0)
    state = UTNet(width=16).state_dict()
    weight = state["down3.blocks.1.conv2.weight"]  # 128 x 128 x 3 x 3: fan in = fan out = 1152
    assert weight.std().item() == pytest.approx((2 / (2 * 1152)) ** 0.5, rel=0.02)
    assert weight.mean().abs() < 1e-3
    assert all((x == 0).all() for name, x in state.items() if name.endswith("bias"))
    assert all((x == 1).all() for name, x in state.items() if name.endswith(("bn1.weight", "running_var")))


def test_every_parameter_learns(generator):
    network = UTNet(width=4)
    network(torch.rand(2, 3, 64, 64, generator=generator)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# -------------------------------------------------------------------------------------------- SD-UTNet


def small_sdutnet(size=32, width=4):
    """A small SD-UTNet in float64 whose biases and norms do something, as they do after training."""
    torch.manual_seed(0)
    network = SDUTNet(width=width, size=size).double()
    for name, x in network.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif name.endswith(("bias", "running_mean")):
            x.normal_(0, 0.3)
    return network


def batch(generator, count=2, size=32):
    """Images (B, 3, size, size) and noise (2, B, 8) in float64."""
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randn(2, count, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels, classes, width, size", [(1, 2, 2, 16), (3, 2, 4, 32), (3, 3, 8, 48), (1, 2, 6, 80)])
def test_sdutnet_of_any_size_and_width(channels, classes, width, size):
    network = SDUTNet(channels, classes, width, size)
    parts = network.decompose(torch.rand(2, channels, size, size), torch.randn(2, 2, 8))
    assert parts.anatomy.shape == (2, 8, size, size) and parts.anatomy.abs().max() <= 1
    assert parts.probabilities.shape == (2, classes, size, size) and parts.probabilities.min() >= 0
    torch.testing.assert_close(parts.probabilities.sum(1), torch.ones(2, size, size))
    assert parts.reconstruction.shape == (2, channels, size, size) and parts.reconstruction.abs().max() <= 1
    assert [x.shape for x in parts[3:]] == [(2, 8)] * 4
    assert network.m_encoder.fc.weight.shape == (width, 4 * width * size * size // 256)


@pytest.mark.parametrize("size", [100, 8, 0, -16])
def test_sdutnet_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"size {size} must be divisible by 16"):
        SDUTNet(width=2, size=size)


@pytest.mark.parametrize("height, width", [(48, 48), (64, 16)])  # 64 x 16 has as many pixels as 32 x 32
def test_sdutnet_refuses_images_of_another_size(height, width):
    with pytest.raises(ValueError, match=f"32x32, not of {height}x{width}"):
        SDUTNet(width=2, size=32).decompose(torch.rand(2, 3, height, width), torch.zeros(2, 2, 8))


def test_segmentation_draws_nothing(generator):
    network = small_sdutnet().eval()
    images, noise = batch(generator)
    before = torch.get_rng_state()
    probabilities = network(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network(images), probabilities)
    assert torch.equal(network.decompose(images, noise).probabilities, probabilities)
    assert torch.equal(network.decompose(images, -noise).probabilities, probabilities)


def test_noise_moves_the_codes(generator):
    network = small_sdutnet().eval()
    images, noise = batch(generator)
    parts = network.decompose(images, noise)
    mu, log_variance = network.m_encoder(images)
    assert torch.equal(parts.anatomy, network.a_encoder(images))
    assert torch.equal(parts.mu, mu) and torch.equal(parts.log_variance, log_variance)
    torch.testing.assert_close(parts.z, mu + noise[0] * log_variance.exp().sqrt())
    assert torch.equal(parts.reconstruction, network.reconstruct(parts.anatomy, parts.z))
    mu, log_variance = network.m_encoder(parts.reconstruction)
    torch.testing.assert_close(parts.z_again, mu + noise[1] * log_variance.exp().sqrt())
    assert torch.equal(network.decompose(images, 0 * noise).z, parts.mu)


def test_sdutnet_blocks_are_their_formulas(generator):
    """The two encoders and the segmentor, written out from the weights by name."""
    network = small_sdutnet().eval()
    w = network.state_dict()
    images, _ = batch(generator)

    def norm(x, name):  # with running statistics; x (B, C, ...)
        mean, variance, scale, shift = (w[f"{name}.{key}"].view(-1, *[1] * (x.ndim - 2))
                                        for key in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def convolve(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    x = images
    for block in ("m_encoder.block1", "m_encoder.block2", "m_encoder.block3", "m_encoder.block4"):
        x = norm(convolve(x, f"{block}.0", stride=2, padding=1), f"{block}.1")
        x = torch.where(x > 0, x, 0.2 * x)
    x = norm(x.reshape(2, -1) @ w["m_encoder.fc.weight"].T + w["m_encoder.fc.bias"], "m_encoder.norm")
    x = torch.where(x > 0, x, 0.03 * x)
    mu, log_variance = network.m_encoder(images)
    torch.testing.assert_close(mu, x @ w["m_encoder.mu.weight"].T + w["m_encoder.mu.bias"])
    torch.testing.assert_close(log_variance, x @ w["m_encoder.logvar.weight"].T + w["m_encoder.logvar.bias"])

    anatomy = network.a_encoder(images)
    torch.testing.assert_close(anatomy, torch.tanh(network.a_encoder.utnet(images)))
    x = norm(convolve(anatomy, "segmentor.conv1.0", padding=1), "segmentor.conv1.1").clamp(min=0)
    x = norm(convolve(x, "segmentor.conv2.0", padding=1), "segmentor.conv2.1").clamp(min=0)
    x = convolve(x, "segmentor.pred").exp()
    torch.testing.assert_close(network(images), x / x.sum(1, keepdim=True))


def adain(x, shift, scale):
    """The formula, an image and a channel at a time."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            mean = x[b, c].sum() / x[b, c].numel()
            variance = (x[b, c] - mean).square().sum() / x[b, c].numel()
            out[b, c] = (x[b, c] - mean) / (variance + 1e-5) ** 0.5 * scale[b, c] + shift[b, c]
    return out


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # of the second, the variance is smaller than epsilon
def test_adain_is_its_formula(generator, spread):
    x = 3 + spread * torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)
    shift, scale = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    layer = AdaIN(5).double()
    for training in (True, False):  # it normalises by the image itself, in evaluation too, and keeps no statistics
        torch.testing.assert_close(layer.train(training)(x, shift, scale), adain(x, shift, scale))
    assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()


def test_decoder_is_its_formula(generator):
    network = small_sdutnet()
    w = network.state_dict()
    anatomy = torch.rand(3, 8, 32, 32, generator=generator, dtype=torch.float64)
    z = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    style = z
    for layer in ("fc1", "fc2", "fc3"):
        raw = style @ w[f"decoder.decoder.mlp.{layer}.weight"].T + w[f"decoder.decoder.mlp.{layer}.bias"]
        style = raw.clamp(min=0)
    assert raw.shape == (3, 48) and (raw < 0).any()  # so the last ReLU does something
    x = anatomy
    for i in range(3):
        name = f"decoder.decoder.dec.conv{i + 1}"
        x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
        x = adain(x, shift=style[:, 16 * i:16 * i + 8], scale=style[:, 16 * i + 8:16 * i + 16])
    x = F.conv2d(x, w["decoder.decoder.dec.conv4.weight"], w["decoder.decoder.dec.conv4.bias"], padding=1)
    torch.testing.assert_close(network.reconstruct(anatomy, z), torch.tanh(x))


def test_one_image_is_enough_for_evaluation_but_not_for_training(generator):
    network = small_sdutnet()
    images, noise = batch(generator, count=3)
    with pytest.raises(ValueError, match="two images or more"):
        network.decompose(images[:1], noise[:, :1])
    network.eval()
    alone, together = network.decompose(images[:1], noise[:, :1]), network.decompose(images, noise)
    for one, three in zip(alone, together):
        torch.testing.assert_close(one, three[:1])


def test_sdutnet_initial_weights():
    torch.manual_seed(0)
    state = SDUTNet(width=16, size=64).state_dict()
    assert state["m_encoder.fc.weight"].std().item() == pytest.approx((2 / (1024 + 16)) ** 0.5, rel=0.02)
    assert state["decoder.decoder.mlp.fc2.weight"].std().item() == pytest.approx((2 / (128 + 128)) ** 0.5, rel=0.02)
    assert state["segmentor.conv2.0.weight"].std().item() == pytest.approx((2 / (2 * 32 * 9)) ** 0.5, rel=0.02)
    assert all((x == 0).all() for name, x in state.items() if name.endswith("bias"))


SHIFTED_AWAY = {  # biases whose every path leads into a norm over the batch or the image, which takes the mean away
    *(f"a_encoder.utnet.{level}.conv_ch.bias" for level in ("up1.attn_decoder", "up2.attn_decoder", "up3", "up4")),
    *(f"segmentor.conv{i}.0.bias" for i in (1, 2)),
    *(f"m_encoder.block{i}.0.bias" for i in (1, 2, 3, 4)), "m_encoder.fc.bias",
    *(f"decoder.decoder.dec.conv{i}.bias" for i in (1, 2, 3)),
}


def test_every_parameter_of_sdutnet_learns(generator):
    network = small_sdutnet()
    images, noise = batch(generator, count=4)
    masks = torch.rand(4, 1, 32, 32, generator=generator) < 0.3
    total, _ = disentangled_loss(network.decompose(images, noise), images, masks)
    total.backward()
    largest = {name: p.grad.abs().max().item() for name, p in network.named_parameters()}
    assert {name for name, gradient in largest.items() if gradient < 1e-12} == SHIFTED_AWAY  # float64 rounding


def test_reconstruction_teaches_the_anatomy_encoder(generator):
    network = small_sdutnet()
    images, noise = batch(generator)
    (network.decompose(images, noise).reconstruction - images).abs().mean().backward()
    assert network.a_encoder.utnet.outc.weight.grad.abs().sum() > 0
    assert network.m_encoder.mu.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.segmentor.parameters())
