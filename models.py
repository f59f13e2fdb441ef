"""The two networks: UTNet, a U-Net whose deep levels attend to the whole image, and SD-UTNet.

    from models import SDUTNet, UTNet

    images = torch.rand(2, 3, 256, 256)
    logits = UTNet(in_channels=3, classes=2)(images)                      # (2, 2, 256, 256)
    probabilities = SDUTNet(in_channels=3, classes=2, size=256)(images)   # (2, 2, 256, 256)

UTNet (14,418,788 parameters) is Gao, Zhou and Metaxas, "UTNet: A Hybrid Transformer Architecture
for Medical Image Segmentation", MICCAI 2021. SD-UTNet (18,836,223 at 512 x 512) is the disentangled
network of the published FedGS implementation: a UTNet draws what is in the image (anatomy), a short
vector says how it looks (modality), and the lesion is found from the anatomy alone.

The file builds both from the bottom up: convolution blocks, attention on a reduced key/value grid,
the two transformer blocks, the levels, UTNet; then SD-UTNet's two encoders, segmentor and decoder,
SD-UTNet. Module names are the published ones, so that
`network.load_state_dict(published, strict=True)` works.

In the comments on shapes, B is the batch, C a number of channels, w the width of the network.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

GRID = 8  # keys and values live on an 8 x 8 grid, so attention costs HW x 64 instead of HW x HW
ANATOMY = 8  # channels of SD-UTNet's anatomy
CODE = 8  # length of SD-UTNet's modality code


# ---------------------------------------------------------------------------- convolution blocks


def conv(in_channels: int, out_channels: int, kernel: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size. No bias by default: batch norm follows or precedes it."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)


def relu(x: Tensor) -> Tensor:
    """ReLU in place, on what batch norm returns.

    Batch norm's gradient needs its input and not its output, so backward keeps one map less.
    """
    return F.relu(x, inplace=True)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned: (B, C, H, W) -> (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class BasicBlock(nn.Module):
    """Pre-activation residual block: twice (BN, ReLU, 3x3 conv), plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel=3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel=3)

        self.shortcut = nn.Sequential()  # identity, unless the number of channels changes
        if in_channels != out_channels:
            norm = nn.BatchNorm2d(in_channels)
            to_channels = conv(in_channels, out_channels)
            self.shortcut = nn.Sequential(norm, nn.ReLU(inplace=True), to_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        out = self.conv1(relu(self.bn1(x)))
        out = self.conv2(relu(self.bn2(out)))
        return out + self.shortcut(x)


class DepthwiseSeparable(nn.Module):
    """3x3 convolution of each channel alone, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        return self.pointwise(self.depthwise(x))


# ------------------------------------------------------------------------------------- attention


class RelativePosition(nn.Module):
    """A learned bias for every offset between two cells of the 8 x 8 grid, one column a head."""

    def __init__(self, heads: int):
        super().__init__()
        span = 2 * GRID - 1  # offsets run from -7 to 7
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(span * span, heads))

        # For every pair of cells, the row of the table that belongs to their offset.
        cell = torch.arange(GRID * GRID)
        row = cell // GRID
        column = cell % GRID
        down = row[:, None] - row[None, :] + GRID - 1
        right = column[:, None] - column[None, :] + GRID - 1
        self.register_buffer("relative_position_index", down * span + right)  # (64, 64) int64

    def forward(self, height: int, width: int) -> Tensor:
        """-> (heads, height * width, 64): a pixel uses the row of the grid cell it falls in."""
        device = self.relative_position_index.device
        rows = torch.arange(height, device=device) * GRID // height
        columns = torch.arange(width, device=device) * GRID // width
        cell = (rows[:, None] * GRID + columns[None, :]).flatten()  # (HW,)

        index = self.relative_position_index[cell]  # (HW, 64)
        return self.relative_position_bias_table[index].permute(2, 0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, position: RelativePosition) -> Tensor:
    """Multi-head attention of every pixel of q to the 64 cells of k and v.

    q is (B, C, H, W); k and v are (B, C, h, w) and are resized to the grid. Channel c belongs to
    head c mod heads. The position bias is scaled together with the dot products.
    -> (B, C, H, W), laid out in memory as q is
    """
    batch, channels, height, width = q.shape
    if k.shape[-2:] != (GRID, GRID):
        k = resize(k, (GRID, GRID))
        v = resize(v, (GRID, GRID))

    scale = (channels // heads) ** -0.5
    bias = for_fused_attention(position(height, width) * scale)  # (heads, HW, 64)
    out = F.scaled_dot_product_attention(
        split_heads(q, heads),
        split_heads(k, heads),
        split_heads(v, heads),
        attn_mask=bias,
        scale=scale,
    )  # (B, heads, HW, C / heads)

    # Back to a map, without a copy in either layout: channels-last, or one channel after another.
    if q.stride(1) == 1:
        out = out.permute(0, 2, 3, 1).reshape(batch, height, width, channels)
        return out.permute(0, 3, 1, 2)
    return out.permute(0, 3, 1, 2).reshape(batch, channels, height, width)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, h, w) -> (B, heads, hw, C / heads)"""
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels // heads, heads, -1)
    return for_fused_attention(x.permute(0, 2, 3, 1))


def for_fused_attention(x: Tensor) -> Tensor:
    """A GPU's fused attention wants rows whose numbers lie side by side; a CPU needs no copy."""
    return x.contiguous() if x.is_cuda else x


class SelfAttention(nn.Module):
    """Queries, keys and values from one map."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = DepthwiseSeparable(channels, 3 * channels)
        self.to_out = DepthwiseSeparable(channels, channels)
        self.relative_position_encoding = RelativePosition(heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        q, k, v = self.to_qkv(x).chunk(3, dim=1)
        return self.to_out(attend(q, k, v, self.heads, self.relative_position_encoding))


class CrossAttention(nn.Module):
    """Queries from the fine map, keys and values from the coarse one."""

    def __init__(self, coarse_channels: int, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_kv = DepthwiseSeparable(coarse_channels, 2 * channels)
        self.to_q = DepthwiseSeparable(channels, channels)
        self.to_out = DepthwiseSeparable(channels, channels)
        self.relative_position_encoding = RelativePosition(heads)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, C, H, W), (B, 2C, H/2, W/2) -> (B, C, H, W)"""
        k, v = self.to_kv(coarse).chunk(2, dim=1)
        q = self.to_q(fine)
        return self.to_out(attend(q, k, v, self.heads, self.relative_position_encoding))


# ---------------------------------------------------------------------------- transformer blocks


class EncoderTransformer(nn.Module):
    """Attention, then a 1x1 convolution; both pre-activated, both residual."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.attn = SelfAttention(channels, heads)
        self.bn2 = nn.BatchNorm2d(channels)
        self.mlp = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        x = x + self.attn(self.bn1(x))
        return x + self.mlp(relu(self.bn2(x)))


class DecoderTransformer(nn.Module):
    """The upsampled coarse map, refined by what the fine map asks of it."""

    def __init__(self, coarse_channels: int, channels: int, heads: int):
        super().__init__()
        self.bn_l = nn.BatchNorm2d(coarse_channels)  # l: low resolution
        self.bn_h = nn.BatchNorm2d(channels)  # h: high resolution
        self.conv_ch = conv(coarse_channels, channels, bias=True)
        self.attn = CrossAttention(coarse_channels, channels, heads)
        self.bn2 = nn.BatchNorm2d(channels)
        self.mlp = conv(channels, channels)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)"""
        upsampled = resize(self.conv_ch(coarse), fine.shape[-2:])
        out = upsampled + self.attn(self.bn_h(fine), self.bn_l(coarse))
        return out + self.mlp(relu(self.bn2(out)))


# ------------------------------------------------------------------------------ levels and UTNet


class Down(nn.Module):
    """Halve the map, then two basic blocks."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        first = BasicBlock(in_channels, out_channels)
        second = BasicBlock(out_channels, out_channels)
        self.conv = nn.Sequential(nn.MaxPool2d(2), first, second)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H/2, W/2)"""
        return self.conv(x)


class DownTransformer(nn.Module):
    """Halve the map, one basic block, then `depth` transformer blocks."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, heads: int):
        super().__init__()
        # Made before the block that they follow: the order of random draws is part of a seed.
        transformers = [EncoderTransformer(out_channels, heads) for _ in range(depth)]
        block = BasicBlock(in_channels, out_channels)
        self.blocks = nn.Sequential(nn.MaxPool2d(2), block, *transformers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H/2, W/2)"""
        return self.blocks(x)


class Up(nn.Module):
    """Double the coarse map, join it with the skip connection, then two basic blocks."""

    def __init__(self, coarse_channels: int, channels: int):
        super().__init__()
        self.conv_ch = conv(coarse_channels, channels, bias=True)
        first = BasicBlock(2 * channels, channels)
        second = BasicBlock(channels, channels)
        self.conv = nn.Sequential(first, second)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """(B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)"""
        upsampled = self.conv_ch(resize(coarse, skip.shape[-2:]))
        return self.conv(torch.cat([skip, upsampled], dim=1))


class UpTransformer(nn.Module):
    """Upsample by attention, join with the skip connection, then one basic block."""

    def __init__(self, coarse_channels: int, channels: int, heads: int):
        super().__init__()
        self.attn_decoder = DecoderTransformer(coarse_channels, channels, heads)
        self.blocks = nn.Sequential(BasicBlock(2 * channels, channels))

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """(B, 2C, H/2, W/2), (B, C, H, W) -> (B, C, H, W)"""
        upsampled = self.attn_decoder(coarse, skip)
        return self.blocks(torch.cat([upsampled, skip], dim=1))


class UTNet(nn.Module):
    """UTNet: logits (B, classes, H, W) of images (B, in_channels, H, W), H and W divisible by 16.

    Five levels of width, 2, 4, 8, 16 x width channels. The three deepest levels of the encoder
    carry 1, 2 and 4 transformer blocks of 2, 4 and 8 heads; the decoder attends on its two deepest
    levels. Raises ValueError for another image size.
    """

    def __init__(self, in_channels: int = 3, classes: int = 2, width: int = 32):
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

    def forward(self, images: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, classes, H, W)"""
        height, width = images.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(
                f"UTNet halves its input four times: image size {height}x{width} must be "
                "divisible by 16"
            )

        # Down: half the size and twice the channels a level.
        x1 = self.inc(images)  # (B, w, H, W)
        x2 = self.down1(x1)  # (B, 2w, H/2, W/2)
        x3 = self.down2(x2)  # (B, 4w, H/4, W/4)
        x4 = self.down3(x3)  # (B, 8w, H/8, W/8)
        x = self.down4(x4)  # (B, 16w, H/16, W/16)

        # And up again, each time joined by the map of that size.
        x = self.up1(x, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.outc(x)


# ------------------------------------------------------------------------- the parts of SD-UTNet


class AnatomyEncoder(nn.Module):
    """What is in the image, and where: a UTNet whose eight outputs are squashed to [-1, 1]."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.utnet = UTNet(in_channels, ANATOMY, width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, 8, H, W)"""
        return torch.tanh(self.utnet(images))


class Segmentor(nn.Module):
    """Lesion from anatomy: twice (3x3 conv, BN, ReLU), then a 1x1 convolution to probabilities."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1 = self.block(ANATOMY, channels)
        self.conv2 = self.block(channels, channels)
        self.pred = conv(channels, classes, bias=True)

    @staticmethod
    def block(in_channels: int, out_channels: int) -> nn.Sequential:
        """(B, in, H, W) -> (B, out, H, W)"""
        convolution = conv(in_channels, out_channels, kernel=3, bias=True)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def forward(self, anatomy: Tensor) -> Tensor:
        """(B, 8, H, W) -> (B, classes, H, W)"""
        x = self.conv2(self.conv1(anatomy))  # (B, 2w, H, W)
        x = self.pred(x)

        # Where the convolutions computed in bfloat16, the softmax still is float32.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.softmax(dim=1)


class ModalityEncoder(nn.Module):
    """How the image looks: mean and log variance of a normal distribution over codes.

    Raises ValueError for images that are not size x size, since a linear layer reads every position
    of the last map.
    """

    def __init__(self, in_channels: int, width: int, size: int):
        super().__init__()
        self.size = size
        self.block1 = self.halve(in_channels, width // 2)
        self.block2 = self.halve(width // 2, width)
        self.block3 = self.halve(width, 2 * width)
        self.block4 = self.halve(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width * (size // 16) ** 2, width)
        self.norm = nn.BatchNorm1d(width)
        self.mu = nn.Linear(width, CODE)
        self.logvar = nn.Linear(width, CODE)

    @staticmethod
    def halve(in_channels: int, out_channels: int) -> nn.Sequential:
        """(B, in, H, W) -> (B, out, H/2, W/2)"""
        strided = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        return nn.Sequential(strided, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in, size, size) -> mu (B, 8), log variance (B, 8)"""
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            raise ValueError(
                f"this SD-UTNet encodes images of {self.size}x{self.size}, not of {height}x{width}"
            )

        x = self.block2(self.block1(images))  # (B, w, size/4, size/4)
        x = self.block4(self.block3(x))  # (B, 4w, size/16, size/16)
        x = self.norm(self.fc(x.flatten(1)))  # (B, w)
        x = F.leaky_relu(x, 0.03)
        return self.mu(x), self.logvar(x)


class AdaIN(nn.Module):
    """Adaptive instance normalisation: every channel of every image gets a given mean and spread.

    Each is first brought to mean 0 and variance 1, then scaled and shifted.
    """

    def __init__(self, channels: int):
        super().__init__()
        # Constants that nothing reads: instance normalisation keeps no statistics, but published
        # checkpoints name them.
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(B, C, H, W), (B, C), (B, C) -> (B, C, H, W)"""
        shift = shift[:, :, None, None]
        scale = scale[:, :, None, None]
        return scale * F.instance_norm(x, eps=1e-5) + shift


class StyleLayers(nn.Module):
    """The shifts and scales of AdaIN from a modality code.

    ReLU follows the last layer too, so none of them is negative.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(CODE, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 3 * 2 * ANATOMY)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 8) -> (B, 3, 2, 8): for each of three layers 8 shifts, then 8 scales"""
        x = F.relu(self.fc1(z))  # (B, 8w)
        x = F.relu(self.fc2(x))  # (B, 8w)
        x = F.relu(self.fc3(x))  # (B, 48)
        return x.view(-1, 3, 2, ANATOMY)


class PaintLayers(nn.Module):
    """An image from anatomy: four 3x3 convolutions, AdaIN after the first three, then tanh."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv1 = conv(ANATOMY, ANATOMY, kernel=3, bias=True)
        self.adain1 = AdaIN(ANATOMY)
        self.conv2 = conv(ANATOMY, ANATOMY, kernel=3, bias=True)
        self.adain2 = AdaIN(ANATOMY)
        self.conv3 = conv(ANATOMY, ANATOMY, kernel=3, bias=True)
        self.adain3 = AdaIN(ANATOMY)
        self.conv4 = conv(ANATOMY, out_channels, kernel=3, bias=True)

    def forward(self, anatomy: Tensor, style: Tensor) -> Tensor:
        """(B, 8, H, W), (B, 3, 2, 8) -> (B, out, H, W) in [-1, 1]"""
        shift1, scale1 = style[:, 0].unbind(1)
        shift2, scale2 = style[:, 1].unbind(1)
        shift3, scale3 = style[:, 2].unbind(1)

        x = self.adain1(self.conv1(anatomy), shift1, scale1)
        x = self.adain2(self.conv2(x), shift2, scale2)
        x = self.adain3(self.conv3(x), shift3, scale3)
        return torch.tanh(self.conv4(x))


class Decoder(nn.Module):
    """The image again, from its anatomy and a modality code."""

    def __init__(self, out_channels: int, width: int):
        super().__init__()
        paint = PaintLayers(out_channels)
        style = StyleLayers(8 * width)
        self.decoder = nn.ModuleDict({"dec": paint, "mlp": style})

    def forward(self, anatomy: Tensor, z: Tensor) -> Tensor:
        """(B, 8, H, W), (B, 8) -> (B, out, H, W)"""
        style = self.decoder["mlp"](z)  # (B, 3, 2, 8)
        return self.decoder["dec"](anatomy, style)


# -------------------------------------------------------------------------------------- SD-UTNet


class Decomposition(NamedTuple):
    """What SD-UTNet makes of a batch in training."""

    anatomy: Tensor  # (B, 8, H, W) in [-1, 1]
    probabilities: Tensor  # (B, classes, H, W)
    reconstruction: Tensor  # (B, in_channels, H, W) in [-1, 1]
    mu: Tensor  # (B, 8), mean of the modality code
    log_variance: Tensor  # (B, 8), and the logarithm of its variance
    z: Tensor  # (B, 8), the code that was drawn and decoded
    z_again: Tensor  # (B, 8), a code drawn for the reconstruction


class SDUTNet(nn.Module):
    """SD-UTNet: probabilities (B, classes, size, size) of images (B, in_channels, size, size).

    Disentangled: the image is taken apart into anatomy, a map with eight channels, and modality, a
    code of eight numbers that says how such anatomy looks here. Both together must give the image
    back; the segmentor sees the anatomy only. In eval mode, a_encoder(images) is the anatomy and
    m_encoder(images) the code's mean and log variance. Raises ValueError unless size is positive
    and divisible by 16.
    """

    def __init__(self, in_channels: int = 3, classes: int = 2, width: int = 32, size: int = 512):
        super().__init__()
        if size % 16 or size <= 0:
            raise ValueError(
                f"SD-UTNet halves its input four times: image size {size} must be divisible by 16"
            )
        self.a_encoder = AnatomyEncoder(in_channels, width)
        self.segmentor = Segmentor(2 * width, classes)
        self.m_encoder = ModalityEncoder(in_channels, width, size)
        self.decoder = Decoder(in_channels, width)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, classes, H, W): all that evaluation needs, without a random draw"""
        return self.segmentor(self.a_encoder(images))

    def decompose(self, images: Tensor, noise: Tensor) -> Decomposition:
        """Everything that the training loss needs.

        images (B, in_channels, size, size); noise (2, B, 8), standard normal, the caller's draw:
        for the code of the images and for the code of their reconstructions.
        Raises ValueError for one image in training mode: batch norm of a vector needs two to have a
        variance.
        """
        if self.training and len(images) < 2:
            raise ValueError(
                "SD-UTNet trains on two images or more: one vector has no variance for batch norm"
            )

        # Take the images apart.
        anatomy = self.a_encoder(images)
        mu, log_variance = self.m_encoder(images)
        z = draw_code(mu, log_variance, noise[0])

        # Put them together again, and read the code of the result.
        reconstruction = self.reconstruct(anatomy, z)
        mu_again, log_variance_again = self.m_encoder(reconstruction)
        z_again = draw_code(mu_again, log_variance_again, noise[1])

        probabilities = self.segmentor(anatomy)
        return Decomposition(anatomy, probabilities, reconstruction, mu, log_variance, z, z_again)

    def reconstruct(self, anatomy: Tensor, z: Tensor) -> Tensor:
        """The image (B, in_channels, H, W), in [-1, 1], of this anatomy in the look of this code.

        anatomy (B, 8, H, W); z (B, 8).
        """
        return self.decoder(anatomy, z)


def draw_code(mu: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw from N(mu, exp(log_variance)) that gradients pass through: (B, 8) each -> (B, 8)"""
    return mu + noise * torch.exp(log_variance / 2)


def initialise(module: nn.Module) -> None:
    """Xavier-normal convolution and linear weights, zero biases.

    Batch norm starts at 1 and 0 by itself.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
