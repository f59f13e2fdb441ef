"""UTNet and SD-UTNet: every block against its formula, published names and shapes, any size."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from metrics import disentangled_loss
from models import GRID, AdaIN, RelativePosition, SDUTNet, UTNet, attend, resize

# ------------------------------------------------------------- convolution blocks, attention


def test_index_covers_every_offset():
    index = RelativePosition(heads=2).relative_position_index
    for query, key in ((0, 0), (0, 63), (63, 0), (17, 42)):
        down = query // 8 - key // 8
        right = query % 8 - key % 8
        assert index[query, key] == (down + 7) * 15 + right + 7
    assert index.unique().numel() == 15 * 15


@pytest.mark.parametrize("height, width", [(16, 16), (6, 10), (3, 20), (1, 1)])
def test_a_query_uses_the_row_of_its_cell(height, width):
    position = RelativePosition(heads=3)
    bias = position(height, width)
    assert bias.shape == (3, height * width, 64)

    table = position.relative_position_bias_table
    for row in range(height):
        for column in range(width):
            cell = (row * GRID // height) * GRID + column * GRID // width
            expected = table[position.relative_position_index[cell]]  # (64, heads)
            assert torch.equal(bias[:, row * width + column], expected.T)


@pytest.mark.parametrize("height, width", [(16, 16), (8, 8), (6, 10)])
def test_attention_is_its_formula(generator, height, width):
    heads = 4
    depth = 6
    q, k, v = torch.randn(3, 2, heads * depth, height, width, generator=generator)
    position = RelativePosition(heads)
    out = attend(q, k, v, heads, position)

    bias = position(height, width)
    k = resize(k, (8, 8))
    v = resize(v, (8, 8))
    for head in range(heads):  # channel c belongs to head c mod heads
        queries = q[:, head::heads].flatten(2)  # (B, depth, HW)
        keys = k[:, head::heads].flatten(2)  # (B, depth, 64)
        values = v[:, head::heads].flatten(2)

        # The bias is scaled with the product.
        logits = (queries.transpose(1, 2) @ keys + bias[head]) * depth**-0.5
        found = torch.softmax(logits, dim=-1) @ values.transpose(1, 2)
        expected = found.transpose(1, 2).reshape(2, depth, height, width)
        torch.testing.assert_close(out[:, head::heads], expected, rtol=1e-5, atol=1e-5)


def test_attention_keeps_the_layout_of_its_queries(generator):
    q, k, v = torch.randn(3, 2, 8, 16, 16, generator=generator)
    position = RelativePosition(heads=2)
    out = attend(q, k, v, 2, position)
    assert out.is_contiguous()

    last = attend(q.contiguous(memory_format=torch.channels_last), k, v, 2, position)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)


# ------------------------------------------------------------------------- blocks of UTNet


@pytest.fixture
def network(generator) -> UTNet:
    """A small UTNet in eval mode, whose batch norms do something."""
    torch.manual_seed(0)
    network = UTNet(width=4).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.normal_(generator=generator)
    return network


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=True)


def test_basic_block_is_its_formula(network, generator):
    x = torch.randn(1, 16, 24, 24, generator=generator)
    block = network.down3.blocks[1]  # 16 to 32 channels
    norm, _, to_channels = block.shortcut
    expected = block.conv1(torch.relu(block.bn1(x)))
    expected = block.conv2(torch.relu(block.bn2(expected)))
    expected = expected + to_channels(torch.relu(norm(x)))
    torch.testing.assert_close(block(x), expected)


def test_encoder_transformer_is_its_formula(network, generator):
    x = torch.randn(1, 16, 24, 24, generator=generator)
    block = network.down2.blocks[2]  # on 16 channels
    q, k, v = block.attn.to_qkv(block.bn1(x)).split(16, dim=1)
    seen = attend(q, k, v, 2, block.attn.relative_position_encoding)
    expected = x + block.attn.to_out(seen)
    expected = expected + block.mlp(torch.relu(block.bn2(expected)))
    torch.testing.assert_close(block(x), expected)


def test_decoder_transformer_is_its_formula(network, generator):
    skip = torch.randn(1, 16, 32, 32, generator=generator)
    coarse = torch.randn(1, 32, 16, 16, generator=generator)
    block = network.up2.attn_decoder
    k, v = block.attn.to_kv(block.bn_l(coarse)).split(16, dim=1)
    q = block.attn.to_q(block.bn_h(skip))
    seen = attend(q, k, v, 4, block.attn.relative_position_encoding)
    out = upsample(block.conv_ch(coarse)) + block.attn.to_out(seen)
    out = out + block.mlp(torch.relu(block.bn2(out)))

    # Channels of the upsampled map first, then those of the skip connection.
    expected = network.up2.blocks(torch.cat([out, skip], dim=1))
    torch.testing.assert_close(network.up2(coarse, skip), expected)


def test_up_is_its_formula(network, generator):
    skip = torch.randn(1, 4, 32, 32, generator=generator)
    coarse = torch.randn(1, 8, 16, 16, generator=generator)

    # Here the skip connection comes first.
    joined = torch.cat([skip, network.up4.conv_ch(upsample(coarse))], dim=1)
    torch.testing.assert_close(network.up4(coarse, skip), network.up4.conv(joined))


# ---------------------------------------------------------------------------------- UTNet


def check_names_and_shapes(network: nn.Module, expected: dict) -> None:
    shapes = {name: list(x.shape) for name, x in network.state_dict().items()}
    assert shapes == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["parameters"]


@pytest.mark.parametrize("file, channels", [("utnet_rgb.json", 3), ("utnet_ct.json", 1)])
def test_utnet_has_published_names_and_shapes(published, file, channels):
    expected = json.loads((published / file).read_text())
    check_names_and_shapes(UTNet(channels), expected)


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


def test_initial_weights():
    torch.manual_seed(0)
    state = UTNet(width=16).state_dict()
    weight = state["down3.blocks.1.conv2.weight"]  # 128 x 128 x 3 x 3: fan in = fan out = 1152
    assert weight.std().item() == pytest.approx((2 / (2 * 1152)) ** 0.5, rel=0.02)
    assert weight.mean().abs() < 1e-3
    for name, x in state.items():
        if name.endswith("bias"):
            assert (x == 0).all(), name
        if name.endswith(("bn1.weight", "running_var")):
            assert (x == 1).all(), name


def test_every_parameter_learns(generator):
    network = UTNet(width=4)
    network(torch.rand(2, 3, 64, 64, generator=generator)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# -------------------------------------------------------------------- the parts of SD-UTNet


def small_sdutnet(size: int = 32, width: int = 4) -> SDUTNet:
    """A small SD-UTNet in float64 whose biases and norms do something, as they do when trained."""
    torch.manual_seed(0)
    network = SDUTNet(width=width, size=size).double()
    for name, x in network.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif name.endswith(("bias", "running_mean")):
            x.normal_(0, 0.3)
    return network


def draw_batch(generator, count: int = 2, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (B, 3, size, size) and noise (2, B, 8) in float64."""
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randn(2, count, 8, generator=generator, dtype=torch.float64)


class Formulas:
    """The layers of a network, written out from its weights by name."""

    def __init__(self, network: nn.Module):
        self.weights = network.state_dict()

    def convolve(self, x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Batch norm with running statistics of x (B, C, …)."""
        shape = (-1, *[1] * (x.ndim - 2))
        mean = self.weights[f"{name}.running_mean"].view(shape)
        variance = self.weights[f"{name}.running_var"].view(shape)
        scale = self.weights[f"{name}.weight"].view(shape)
        shift = self.weights[f"{name}.bias"].view(shape)
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def test_segmentor_is_its_formula(generator):
    network = small_sdutnet().eval()
    formulas = Formulas(network)
    images, _ = draw_batch(generator)

    anatomy = network.a_encoder(images)
    torch.testing.assert_close(anatomy, torch.tanh(network.a_encoder.utnet(images)))

    x = formulas.convolve(anatomy, "segmentor.conv1.0", padding=1)
    x = formulas.norm(x, "segmentor.conv1.1").clamp(min=0)
    x = formulas.convolve(x, "segmentor.conv2.0", padding=1)
    x = formulas.norm(x, "segmentor.conv2.1").clamp(min=0)
    x = formulas.convolve(x, "segmentor.pred").exp()
    torch.testing.assert_close(network(images), x / x.sum(1, keepdim=True))


def test_modality_encoder_is_its_formula(generator):
    network = small_sdutnet().eval()
    formulas = Formulas(network)
    images, _ = draw_batch(generator)

    x = images
    for i in (1, 2, 3, 4):
        x = formulas.convolve(x, f"m_encoder.block{i}.0", stride=2, padding=1)
        x = formulas.norm(x, f"m_encoder.block{i}.1")
        x = torch.where(x > 0, x, 0.2 * x)
    x = formulas.linear(x.reshape(2, -1), "m_encoder.fc")
    x = formulas.norm(x, "m_encoder.norm")
    x = torch.where(x > 0, x, 0.03 * x)

    mu, log_variance = network.m_encoder(images)
    torch.testing.assert_close(mu, formulas.linear(x, "m_encoder.mu"))
    torch.testing.assert_close(log_variance, formulas.linear(x, "m_encoder.logvar"))


def adain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The formula, an image and a channel at a time."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            mean = x[b, c].sum() / x[b, c].numel()
            variance = (x[b, c] - mean).square().sum() / x[b, c].numel()
            normal = (x[b, c] - mean) / (variance + 1e-5) ** 0.5
            out[b, c] = normal * scale[b, c] + shift[b, c]
    return out


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # with the second, epsilon outweighs the variance
def test_adain_is_its_formula(generator, spread):
    x = 3 + spread * torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)
    shift, scale = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    layer = AdaIN(5).double()

    # It normalises by the image itself, in evaluation too, and keeps no statistics.
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(x, shift, scale), adain(x, shift, scale))
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()


def test_decoder_is_its_formula(generator):
    network = small_sdutnet()
    formulas = Formulas(network)
    anatomy = torch.rand(3, 8, 32, 32, generator=generator, dtype=torch.float64)
    z = torch.randn(3, 8, generator=generator, dtype=torch.float64)

    style = z
    for layer in ("fc1", "fc2", "fc3"):
        raw = formulas.linear(style, f"decoder.decoder.mlp.{layer}")
        style = raw.clamp(min=0)
    assert raw.shape == (3, 48)
    assert (raw < 0).any()  # so the last ReLU does something

    x = anatomy
    for i in range(3):
        shift = style[:, 16 * i : 16 * i + 8]
        scale = style[:, 16 * i + 8 : 16 * i + 16]
        x = formulas.convolve(x, f"decoder.decoder.dec.conv{i + 1}", padding=1)
        x = adain(x, shift, scale)
    x = formulas.convolve(x, "decoder.decoder.dec.conv4", padding=1)
    torch.testing.assert_close(network.reconstruct(anatomy, z), torch.tanh(x))


# ------------------------------------------------------------------------------- SD-UTNet


@pytest.mark.parametrize(
    "file, channels", [("sd_utnet_rgb_512.json", 3), ("sd_utnet_ct_512.json", 1)]
)
def test_sdutnet_has_published_names_and_shapes(published, file, channels):
    expected = json.loads((published / file).read_text())
    check_names_and_shapes(SDUTNet(channels), expected)


@pytest.mark.parametrize(
    "channels, classes, width, size", [(1, 2, 2, 16), (3, 2, 4, 32), (3, 3, 8, 48), (1, 2, 6, 80)]
)
def test_sdutnet_of_any_size_and_width(channels, classes, width, size):
    network = SDUTNet(channels, classes, width, size)
    parts = network.decompose(torch.rand(2, channels, size, size), torch.randn(2, 2, 8))

    assert parts.anatomy.shape == (2, 8, size, size)
    assert parts.anatomy.abs().max() <= 1
    assert parts.probabilities.shape == (2, classes, size, size)
    assert parts.probabilities.min() >= 0
    torch.testing.assert_close(parts.probabilities.sum(1), torch.ones(2, size, size))
    assert parts.reconstruction.shape == (2, channels, size, size)
    assert parts.reconstruction.abs().max() <= 1
    for code in parts[3:]:
        assert code.shape == (2, 8)
    assert network.m_encoder.fc.weight.shape == (width, 4 * width * size * size // 256)


@pytest.mark.parametrize("size", [100, 8, 0, -16])
def test_sdutnet_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"size {size} must be divisible by 16"):
        SDUTNet(width=2, size=size)


@pytest.mark.parametrize(
    "height, width", [(48, 48), (64, 16)]
)  # 64 x 16: as many pixels as 32 x 32
def test_sdutnet_refuses_images_of_another_size(height, width):
    network = SDUTNet(width=2, size=32)
    with pytest.raises(ValueError, match=f"32x32, not of {height}x{width}"):
        network.decompose(torch.rand(2, 3, height, width), torch.zeros(2, 2, 8))


def test_segmentation_draws_nothing(generator):
    network = small_sdutnet().eval()
    images, noise = draw_batch(generator)
    before = torch.get_rng_state()
    probabilities = network(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network(images), probabilities)
    assert torch.equal(network.decompose(images, noise).probabilities, probabilities)
    assert torch.equal(network.decompose(images, -noise).probabilities, probabilities)


def test_noise_moves_the_codes(generator):
    network = small_sdutnet().eval()
    images, noise = draw_batch(generator)
    parts = network.decompose(images, noise)

    mu, log_variance = network.m_encoder(images)
    assert torch.equal(parts.anatomy, network.a_encoder(images))
    assert torch.equal(parts.mu, mu)
    assert torch.equal(parts.log_variance, log_variance)
    torch.testing.assert_close(parts.z, mu + noise[0] * log_variance.exp().sqrt())

    assert torch.equal(parts.reconstruction, network.reconstruct(parts.anatomy, parts.z))
    mu, log_variance = network.m_encoder(parts.reconstruction)
    torch.testing.assert_close(parts.z_again, mu + noise[1] * log_variance.exp().sqrt())

    assert torch.equal(network.decompose(images, 0 * noise).z, parts.mu)


def test_one_image_is_enough_for_evaluation_but_not_for_training(generator):
    network = small_sdutnet()
    images, noise = draw_batch(generator, count=3)
    with pytest.raises(ValueError, match="two images or more"):
        network.decompose(images[:1], noise[:, :1])

    network.eval()
    alone = network.decompose(images[:1], noise[:, :1])
    together = network.decompose(images, noise)
    for one, three in zip(alone, together, strict=True):
        torch.testing.assert_close(one, three[:1])


def test_sdutnet_initial_weights():
    torch.manual_seed(0)
    state = SDUTNet(width=16, size=64).state_dict()
    fans = {  # fan in + fan out
        "m_encoder.fc": 1024 + 16,
        "decoder.decoder.mlp.fc2": 128 + 128,
        "segmentor.conv2.0": 2 * 32 * 9,
    }
    for name, fan in fans.items():
        spread = state[f"{name}.weight"].std().item()
        assert spread == pytest.approx((2 / fan) ** 0.5, rel=0.02), name
    for name, x in state.items():
        if name.endswith("bias"):
            assert (x == 0).all(), name


SHIFTED_AWAY = {
    # Biases whose every path leads into a norm over the batch or the image, which takes the mean
    # away, so that they have no gradient.
    "a_encoder.utnet.up1.attn_decoder.conv_ch.bias",
    "a_encoder.utnet.up2.attn_decoder.conv_ch.bias",
    "a_encoder.utnet.up3.conv_ch.bias",
    "a_encoder.utnet.up4.conv_ch.bias",
    "segmentor.conv1.0.bias",
    "segmentor.conv2.0.bias",
    "m_encoder.block1.0.bias",
    "m_encoder.block2.0.bias",
    "m_encoder.block3.0.bias",
    "m_encoder.block4.0.bias",
    "m_encoder.fc.bias",
    "decoder.decoder.dec.conv1.bias",
    "decoder.decoder.dec.conv2.bias",
    "decoder.decoder.dec.conv3.bias",
}


def test_every_parameter_of_sdutnet_learns(generator):
    network = small_sdutnet()
    images, noise = draw_batch(generator, count=4)
    masks = torch.rand(4, 1, 32, 32, generator=generator) < 0.3
    total, _ = disentangled_loss(network.decompose(images, noise), images, masks)
    total.backward()

    without = set()
    for name, parameter in network.named_parameters():
        if parameter.grad.abs().max() < 1e-12:  # float64 rounding
            without.add(name)
    assert without == SHIFTED_AWAY


def test_reconstruction_teaches_the_anatomy_encoder(generator):
    network = small_sdutnet()
    images, noise = draw_batch(generator)
    reconstruction = network.decompose(images, noise).reconstruction
    (reconstruction - images).abs().mean().backward()

    assert network.a_encoder.utnet.outc.weight.grad.abs().sum() > 0
    assert network.m_encoder.mu.weight.grad.abs().sum() > 0
    for parameter in network.segmentor.parameters():
        assert parameter.grad is None
