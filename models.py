"""The two networks: UTNet, a U-Net whose deep levels attend to the whole image, and SD-UTNet, around it.

    from models import SDUTNet, UTNet
    logits = UTNet(in_channels=3, classes=2)(torch.rand(1, 3, 256, 256))                     # (1, 2, 256, 256)
    probabilities = SDUTNet(in_channels=3, classes=2, size=256)(torch.rand(2, 3, 256, 256))  # (2, 2, 256, 256)

UTNet (14,418,788 parameters) is Gao, Zhou and Metaxas, "UTNet: A Hybrid Transformer Architecture for Medical
Image Segmentation", MICCAI 2021. SD-UTNet (18,836,223 at 512 x 512) is the disentangled network of the published
FedGS implementation: a UTNet draws what is in the image (anatomy), a short vector says how it looks (modality),
and the lesion is found from the anatomy alone. The file builds both bottom-up: convolution blocks, attention on
a reduced key/value grid, the two transformer blocks, the levels, UTNet; then SD-UTNet's two encoders, segmentor and
decoder, SD-UTNet. Module names are the published ones, so `network.load_state_dict(published, strict=True)`
works.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

GRID = 8  # keys and values live on an 8 x 8 grid, so attention costs HW x 64 instead of HW x HW
ANATOMY = 8  # channels of SD-UTNet's anatomy
CODE = 8  # length of SD-UTNet's modality code


def conv(in_channels, out_channels, kernel=1, bias=False):
    """A size-preserving convolution; no bias by default, since batch norm follows or precedes it."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)


def relu(x):
    """ReLU in place, for what batch norm returns: its gradient needs its input only, so a map less is kept for backward."""
    return F.relu(x, inplace=True)


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
            self.shortcut = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv(in_channels, out_channels))

    def forward(self, x):                          # (B, in, H, W)
        out = self.conv1(relu(self.bn1(x)))        # (B, out, H, W)
        out = self.conv2(relu(self.bn2(out)))
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
    c mod heads. The position bias is scaled together with the dot products. -> (B, C, H, W), in memory as q is
    """
    batch, channels, height, width = q.shape
    if k.shape[-2:] != (GRID, GRID):
        k, v = resize(k, (GRID, GRID)), resize(v, (GRID, GRID))

    def adjacent(x):                               # as fused attention wants its rows on a GPU
        return x.contiguous() if x.is_cuda else x

    def split(x):                                  # (B, C, h, w) -> (B, heads, hw, C / heads)
        return adjacent(x.reshape(batch, channels // heads, heads, -1).permute(0, 2, 3, 1))

    scale = (channels // heads) ** -0.5
    bias = adjacent(position(height, width) * scale)  # (heads, HW, 64)
    out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=bias, scale=scale)
    if q.stride(1) == 1:                           # channels-last
        return out.permute(0, 2, 3, 1).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
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
        return x + self.mlp(relu(self.bn2(x)))


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
        return out + self.mlp(relu(self.bn2(out)))


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


class AnatomyEncoder(nn.Module):
    """What is in the image, and where: a UTNet whose eight outputs are squashed to [-1, 1]."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.utnet = UTNet(in_channels, ANATOMY, width)

    def forward(self, images):                     # (B, in, H, W) -> (B, 8, H, W)
        return torch.tanh(self.utnet(images))


class Segmentor(nn.Module):
    """Lesion from anatomy: twice (3x3 conv, BN, ReLU), then a 1x1 convolution to probabilities."""

    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Sequential(conv(ANATOMY, channels, 3, bias=True), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv(channels, channels, 3, bias=True), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.pred = conv(channels, classes, bias=True)

    def forward(self, anatomy):                    # (B, 8, H, W)
        x = self.conv2(self.conv1(anatomy))        # (B, 2w, H, W)
        x = self.pred(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # where the convolutions computed in bfloat16
        return x.softmax(dim=1)                    # (B, classes, H, W)


class ModalityEncoder(nn.Module):
    """How the image looks, as a normal distribution over codes: its mean and the logarithm of its variance.

    Raises ValueError for images that are not size x size, since a linear layer reads every position of the last map.
    """

    def __init__(self, in_channels, width, size):
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
    def halve(in_channels, out_channels):
        """(B, in, H, W) -> (B, out, H/2, W/2)"""
        strided = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        return nn.Sequential(strided, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2))

    def forward(self, images):                     # (B, in, size, size)
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            raise ValueError(f"this SD-UTNet encodes images of {self.size}x{self.size}, not of {height}x{width}")
        x = self.block2(self.block1(images))       # (B,  w, size/4,  size/4)
        x = self.block4(self.block3(x))            # (B, 4w, size/16, size/16)
        x = self.norm(self.fc(x.flatten(1)))       # (B,  w)
        x = F.leaky_relu(x, 0.03)
        return self.mu(x), self.logvar(x)          # (B, 8) each


class AdaIN(nn.Module):
    """Adaptive instance normalisation: every channel of every image to mean 0, variance 1, then the given ones."""

    def __init__(self, channels):
        super().__init__()
        # Constants that nothing reads: instance normalisation keeps no statistics, but published checkpoints name them.
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x, shift, scale):            # (B, C, H, W), (B, C), (B, C) -> (B, C, H, W)
        return scale[:, :, None, None] * F.instance_norm(x, eps=1e-5) + shift[:, :, None, None]


class StyleLayers(nn.Module):
    """The shifts and scales of AdaIN from a modality code; ReLU follows the last layer too, so none is negative."""

    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(CODE, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 3 * 2 * ANATOMY)

    def forward(self, z):                          # (B, 8)
        x = F.relu(self.fc2(F.relu(self.fc1(z))))  # (B, 8w)
        x = F.relu(self.fc3(x))                    # (B, 48): of each layer 8 shifts, then 8 scales
        return x.view(-1, 3, 2, ANATOMY)


class PaintLayers(nn.Module):
    """An image from anatomy: four 3x3 convolutions, AdaIN after the first three and no other activation."""

    def __init__(self, out_channels):
        super().__init__()
        self.conv1, self.adain1 = conv(ANATOMY, ANATOMY, 3, bias=True), AdaIN(ANATOMY)
        self.conv2, self.adain2 = conv(ANATOMY, ANATOMY, 3, bias=True), AdaIN(ANATOMY)
        self.conv3, self.adain3 = conv(ANATOMY, ANATOMY, 3, bias=True), AdaIN(ANATOMY)
        self.conv4 = conv(ANATOMY, out_channels, 3, bias=True)

    def forward(self, anatomy, style):             # (B, 8, H, W), (B, 3, 2, 8)
        (shift1, scale1), (shift2, scale2), (shift3, scale3) = (layer.unbind(1) for layer in style.unbind(1))
        x = self.adain1(self.conv1(anatomy), shift1, scale1)
        x = self.adain2(self.conv2(x), shift2, scale2)
        x = self.adain3(self.conv3(x), shift3, scale3)
        return torch.tanh(self.conv4(x))           # (B, out, H, W)


class Decoder(nn.Module):
    """The image again, from its anatomy and a modality code."""

    def __init__(self, out_channels, width):
        super().__init__()
        self.decoder = nn.ModuleDict({"dec": PaintLayers(out_channels), "mlp": StyleLayers(8 * width)})

    def forward(self, anatomy, z):                 # (B, 8, H, W), (B, 8) -> (B, out, H, W)
        return self.decoder["dec"](anatomy, self.decoder["mlp"](z))


class Decomposition(NamedTuple):
    """What SD-UTNet makes of a batch in training."""

    anatomy: torch.Tensor         # (B, 8, H, W) in [-1, 1]
    probabilities: torch.Tensor   # (B, classes, H, W)
    reconstruction: torch.Tensor  # (B, in_channels, H, W) in [-1, 1]
    mu: torch.Tensor              # (B, 8) mean of the modality code
    log_variance: torch.Tensor    # (B, 8)
    z: torch.Tensor               # (B, 8) the code that was drawn and decoded
    z_again: torch.Tensor         # (B, 8) a code drawn for the reconstruction


class SDUTNet(nn.Module):
    """SD-UTNet: probabilities (B, classes, size, size) of images (B, in_channels, size, size).

    Disentangled: the image is taken apart into anatomy, a map with eight channels, and modality, a code
    of eight numbers that says how such anatomy looks here. Both together must give the image back; the segmentor sees
    the anatomy only. In eval mode, a_encoder(images) is the anatomy and m_encoder(images) the code's mean and log
    variance. Raises ValueError unless size is positive and divisible by 16.
    """

    def __init__(self, in_channels=3, classes=2, width=32, size=512):
        super().__init__()
        if size % 16 or size <= 0:
            raise ValueError(f"SD-UTNet halves its input four times: image size {size} must be divisible by 16")
        self.a_encoder = AnatomyEncoder(in_channels, width)
        self.segmentor = Segmentor(2 * width, classes)
        self.m_encoder = ModalityEncoder(in_channels, width, size)
        self.decoder = Decoder(in_channels, width)
        self.apply(initialise)

    def forward(self, images):                     # (B, in, H, W) -> (B, classes, H, W)
        """The segmentation alone, without a random draw: all that evaluation needs."""
        return self.segmentor(self.a_encoder(images))

    def decompose(self, images, noise):
        """Everything that the training loss needs.

        images (B, in_channels, size, size); noise (2, B, 8), standard normal, the caller's draw: for the code of the
        images and for the code of their reconstructions. -> Decomposition
        Raises ValueError for one image in training mode: batch norm of a vector needs two to have a variance.
        """
        if self.training and len(images) < 2:
            raise ValueError("SD-UTNet trains on two images or more: one vector has no variance for batch norm")
        anatomy = self.a_encoder(images)
        mu, log_variance = self.m_encoder(images)
        z = draw_code(mu, log_variance, noise[0])
        reconstruction = self.reconstruct(anatomy, z)
        z_again = draw_code(*self.m_encoder(reconstruction), noise[1])
        return Decomposition(anatomy, self.segmentor(anatomy), reconstruction, mu, log_variance, z, z_again)

    def reconstruct(self, anatomy, z):
        """The image (B, in_channels, H, W), in [-1, 1], of anatomy (B, 8, H, W) that looks as z (B, 8) says."""
        return self.decoder(anatomy, z)


def draw_code(mu, log_variance, noise):
    """A draw from N(mu, exp(log_variance)) that gradients pass through: (B, 8) each -> (B, 8)"""
    return mu + noise * torch.exp(log_variance / 2)


def initialise(module):
    """Xavier-normal convolution and linear weights, zero biases (batch norm starts at 1 and 0 by itself)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
