"""The segmentation network: UTNet, a U-Net whose deep levels attend to the whole image.

    from models import UTNet
    network = UTNet(in_channels=3, classes=2)       # 14,418,788 parameters
    logits = network(torch.rand(1, 3, 256, 256))    # (1, 2, 256, 256)

Gao, Zhou and Metaxas, "UTNet: A Hybrid Transformer Architecture for Medical Image Segmentation",
MICCAI 2021. The file builds it bottom-up: convolution blocks, attention on a reduced key/value grid,
the two transformer blocks, the levels, the network. Module names are the published ones, so
`network.load_state_dict(published, strict=True)` works.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

GRID = 8  # keys and values live on an 8 x 8 grid, so attention costs HW x 64 instead of HW x HW


def conv(in_channels, out_channels, kernel=1, bias=False):
    """A size-preserving convolution; no bias by default, since batch norm follows or precedes it."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)


def resize(x, size):
    """Bilinear, corners aligned: (B, C, H, W) -> (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class BasicBlock(nn.Module):
    """Pre-activation residual block: twice (BN, ReLU, 3x3 conv), plus the shortcut."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel=3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel=3)
        self.shortcut = nn.Sequential()  # identity, unless the number of channels changes
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), conv(in_channels, out_channels))

    def forward(self, x):                          # (B, in, H, W)
        out = self.conv1(F.relu(self.bn1(x)))      # (B, out, H, W)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class DepthwiseSeparable(nn.Module):
    """3x3 convolution of each channel alone, then a 1x1 convolution across channels."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = conv(in_channels, out_channels)

    def forward(self, x):                          # (B, in, H, W) -> (B, out, H, W)
        return self.pointwise(self.depthwise(x))


class RelativePosition(nn.Module):
    """A learned bias for every offset between two cells of the 8 x 8 grid, one column a head."""

    def __init__(self, heads):
        super().__init__()
        span = 2 * GRID - 1  # offsets run from -7 to 7
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(span * span, heads))
        row, column = torch.arange(GRID * GRID) // GRID, torch.arange(GRID * GRID) % GRID
        down = row[:, None] - row[None, :] + GRID - 1
        right = column[:, None] - column[None, :] + GRID - 1
        self.register_buffer("relative_position_index", down * span + right)  # (64, 64) int64

    def forward(self, height, width):
        """-> (heads, height*width, 64): every query pixel uses the row of the grid cell it falls in."""
        rows = torch.arange(height, device=self.relative_position_index.device) * GRID // height
        columns = torch.arange(width, device=self.relative_position_index.device) * GRID // width
        cell = (rows[:, None] * GRID + columns[None, :]).flatten()                            # (HW,)
        return self.relative_position_bias_table[self.relative_position_index[cell]].permute(2, 0, 1)


def attend(q, k, v, heads, position):
    """Multi-head attention of every pixel of q to the 64 cells of k and v.

    q is (B, C, H, W); k and v are (B, C, h, w) and are resized to the grid. Channel c belongs to head
    c mod heads. The position bias is scaled together with the dot products. -> (B, C, H, W)
    """
    batch, channels, height, width = q.shape
    if k.shape[-2:] != (GRID, GRID):
        k, v = resize(k, (GRID, GRID)), resize(v, (GRID, GRID))

    def split(x):                                  # (B, C, h, w) -> (B, heads, hw, C / heads)
        return x.reshape(batch, channels // heads, heads, -1).permute(0, 2, 3, 1)

    scale = (channels // heads) ** -0.5
    bias = position(height, width) * scale         # (heads, HW, 64)
    out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=bias, scale=scale)
    return out.permute(0, 3, 1, 2).reshape(batch, channels, height, width)


class SelfAttention(nn.Module):
    """Queries, keys and values from one map."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = DepthwiseSeparable(channels, 3 * channels)
        self.to_out = DepthwiseSeparable(channels, channels)
        self.relative_position_encoding = RelativePosition(heads)

    def forward(self, x):                          # (B, C, H, W) -> (B, C, H, W)
        q, k, v = self.to_qkv(x).chunk(3, dim=1)
        return self.to_out(attend(q, k, v, self.heads, self.relative_position_encoding))


class CrossAttention(nn.Module):
    """Queries from the fine map, keys and values from the coarse one."""

    def __init__(self, coarse_channels, channels, heads):
        super().__init__()
        self.heads = heads
        self.to_kv = DepthwiseSeparable(coarse_channels, 2 * channels)
        self.to_q = DepthwiseSeparable(channels, channels)
        self.to_out = DepthwiseSeparable(channels, channels)
        self.relative_position_encoding = RelativePosition(heads)

    def forward(self, fine, coarse):               # (B, C, H, W), (B, 2C, H/2, W/2) -> (B, C, H, W)
        k, v = self.to_kv(coarse).chunk(2, dim=1)
        return self.to_out(attend(self.to_q(fine), k, v, self.heads, self.relative_position_encoding))


class EncoderTransformer(nn.Module):
    """Attention, then a 1x1 convolution; both pre-activated, both residual."""

    def __init__(self, channels, heads):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.attn = SelfAttention(channels, heads)
        self.bn2 = nn.BatchNorm2d(channels)
        self.mlp = conv(channels, channels)

    def forward(self, x):                          # (B, C, H, W) -> (B, C, H, W)
        x = x + self.attn(self.bn1(x))
        return x + self.mlp(F.relu(self.bn2(x)))


class DecoderTransformer(nn.Module):
    """The upsampled coarse map, refined by what the fine map asks of it."""

    def __init__(self, coarse_channels, channels, heads):
        super().__init__()
        self.bn_l = nn.BatchNorm2d(coarse_channels)  # l: low resolution
        self.bn_h = nn.BatchNorm2d(channels)         # h: high resolution
        self.conv_ch = conv(coarse_channels, channels, bias=True)
        self.attn = CrossAttention(coarse_channels, channels, heads)
        self.bn2 = nn.BatchNorm2d(channels)
        self.mlp = conv(channels, channels)

    def forward(self, coarse, fine):               # (B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)
        upsampled = resize(self.conv_ch(coarse), fine.shape[-2:])
        out = upsampled + self.attn(self.bn_h(fine), self.bn_l(coarse))
        return out + self.mlp(F.relu(self.bn2(out)))


class Down(nn.Module):
    """Halve the map, then two basic blocks."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        blocks = BasicBlock(in_channels, out_channels), BasicBlock(out_channels, out_channels)
        self.conv = nn.Sequential(nn.MaxPool2d(2), *blocks)

    def forward(self, x):                          # (B, in, H, W) -> (B, out, H/2, W/2)
        return self.conv(x)


class DownTransformer(nn.Module):
    """Halve the map, one basic block, then `depth` transformer blocks."""

    def __init__(self, in_channels, out_channels, depth, heads):
        super().__init__()
        transformers = [EncoderTransformer(out_channels, heads) for _ in range(depth)]
        self.blocks = nn.Sequential(nn.MaxPool2d(2), BasicBlock(in_channels, out_channels), *transformers)

    def forward(self, x):                          # (B, in, H, W) -> (B, out, H/2, W/2)
        return self.blocks(x)


class Up(nn.Module):
    """Double the coarse map, join it with the skip connection, then two basic blocks."""

    def __init__(self, coarse_channels, channels):
        super().__init__()
        self.conv_ch = conv(coarse_channels, channels, bias=True)
        self.conv = nn.Sequential(BasicBlock(2 * channels, channels), BasicBlock(channels, channels))

    def forward(self, coarse, skip):               # (B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)
        up = self.conv_ch(resize(coarse, skip.shape[-2:]))
        return self.conv(torch.cat([skip, up], dim=1))


class UpTransformer(nn.Module):
    """Upsample by attention, join with the skip connection, then one basic block."""

    def __init__(self, coarse_channels, channels, heads):
        super().__init__()
        self.attn_decoder = DecoderTransformer(coarse_channels, channels, heads)
        self.blocks = nn.Sequential(BasicBlock(2 * channels, channels))

    def forward(self, coarse, skip):               # (B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)
        return self.blocks(torch.cat([self.attn_decoder(coarse, skip), skip], dim=1))


class UTNet(nn.Module):
    """UTNet: logits (B, classes, H, W) of images (B, in_channels, H, W), H and W divisible by 16.

    Five levels of width, 2, 4, 8, 16 x width channels. The three deepest levels of the encoder carry
    1, 2 and 4 transformer blocks of 2, 4 and 8 heads; the decoder attends on its two deepest levels.
    Raises ValueError for another image size.
    """

    def __init__(self, in_channels=3, classes=2, width=32):
        super().__init__()
        self.inc = nn.Sequential(BasicBlock(in_channels, width), BasicBlock(width, width))
        self.down1 = Down(width, 2 * width)
        self.down2 = DownTransformer(2 * width, 4 * width, depth=1, heads=2)
        self.down3 = DownTransformer(4 * width, 8 * width, depth=2, heads=4)
        self.down4 = DownTransformer(8 * width, 16 * width, depth=4, heads=8)
        self.up1 = UpTransformer(16 * width, 8 * width, heads=8)
        self.up2 = UpTransformer(8 * width, 4 * width, heads=4)
        self.up3 = Up(4 * width, 2 * width)
        self.up4 = Up(2 * width, width)
        self.outc = conv(width, classes, bias=True)
        self.apply(initialise)

    def forward(self, images):
        height, width = images.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(f"UTNet halves its input four times: image size {height}x{width} must be divisible by 16")
        x1 = self.inc(images)                      # (B,   w, H,    W)
        x2 = self.down1(x1)                        # (B,  2w, H/2,  W/2)
        x3 = self.down2(x2)                        # (B,  4w, H/4,  W/4)
        x4 = self.down3(x3)                        # (B,  8w, H/8,  W/8)
        x = self.down4(x4)                         # (B, 16w, H/16, W/16)
        x = self.up1(x, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.outc(x)


def initialise(module):
    """Xavier-normal convolution and linear weights, zero biases (batch norm starts at 1 and 0 by itself)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
