"""UTNet: published names and shapes, attention against its formula, any size divisible by 16."""

import json

import pytest
import torch

from models import GRID, RelativePosition, UTNet, attend, resize


@pytest.mark.parametrize("file, channels", [("utnet_rgb.json", 3), ("utnet_ct.json", 1)])
def test_published_names_and_shapes(published, file, channels):
    expected = json.loads((published / file).read_text())
    network = UTNet(in_channels=channels)
    assert {name: list(x.shape) for name, x in network.state_dict().items()} == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["parameters"]


def test_number_of_parameters():
    assert sum(p.numel() for p in UTNet().parameters()) == 14_418_788


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
