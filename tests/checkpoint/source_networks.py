"""CCNet written anew in the module tree of other code bases, in plain PyTorch, with random weights.

They are the other side of the converters' tests: nothing of the package is used. What they compute is described in
public code: networks/ccnet.py of the official repository, ResNetV1c, CCHead and FCNHead of mmsegmentation.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class InPlaceABN(nn.Module):
    """Batch norm whose scale is |weight| + eps, then leaky ReLU or nothing; it counts no batches."""

    def __init__(self, channels: int, activated: bool = True) -> None:
        super().__init__()
        self.activated = activated
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.abs() + EPS) / (self.running_var + EPS).sqrt()
        x = (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return torch.where(x < 0, 0.01 * x, x) if self.activated else x


def plain_abn(channels: int) -> InPlaceABN:
    return InPlaceABN(channels, activated=False)


class Block(nn.Module):
    """Bottleneck with its stride in the 3x3."""

    def __init__(self, c_in: int, width: int, stride: int, dilation: int, norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)
        if stride != 1 or c_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, 4 * width, 1, stride, bias=False), norm(4 * width)
            )
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def stage(c_in: int, width: int, blocks: int, stride: int, dilations: Sequence[int], norm) -> nn.Sequential:
    first, rest = dilations
    layers = [Block(c_in, width, stride, first, norm)]
    layers += [Block(4 * width, width, 1, rest, norm) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


class Gamma(nn.Module):
    """mmsegmentation's scale: a parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))


class CrissCross(nn.Module):
    """Attention over the row and the column of each pixel, which itself counts once, in the row."""

    def __init__(self, channels: int, gamma: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        out = torch.empty_like(value)
        own_row = torch.eye(height, dtype=torch.bool)
        # Column by column: all pixels of one column against that column, and against their rows.
        for j in range(width):
            q = query[..., j].transpose(1, 2)  # (B, H, C')
            down = (q @ key[..., j]).masked_fill(own_row, -torch.inf)  # (B, H, H)
            across = torch.einsum("bhc,bchw->bhw", q, key)
            weights = torch.cat([down, across], dim=-1).softmax(dim=-1)
            from_column = weights[..., :height] @ value[..., j].transpose(1, 2)
            from_row = torch.einsum("bhw,bchw->bhc", weights[..., height:], value)
            out[..., j] = (from_column + from_row).transpose(1, 2)
        gamma = self.gamma.scale if isinstance(self.gamma, nn.Module) else self.gamma
        return gamma * out + x


class OfficialHead(nn.Module):
    def __init__(self, classes: int, channels: int, recurrence: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.conva = nn.Sequential(nn.Conv2d(2048, channels, 3, padding=1, bias=False), InPlaceABN(channels))
        self.cca = CrissCross(channels, nn.Parameter(torch.zeros(1)))
        self.convb = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), InPlaceABN(channels)
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(2048 + channels, channels, 3, padding=1, bias=False),
            InPlaceABN(channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conva(x)
        for _ in range(self.recurrence):
            y = self.cca(y)
        return self.bottleneck(torch.cat([x, self.convb(y)], dim=1))


class OfficialCCNet(nn.Module):
    """The official network: logits, and the auxiliary ones, at an eighth of the size."""

    def __init__(
        self, blocks=(3, 4, 23, 3), classes: int = 19, channels: int = 512, recurrence: int = 2
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False), plain_abn(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False), plain_abn(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 3, 1, 1, bias=False), plain_abn(128)
        self.layer1 = stage(128, 64, blocks[0], 1, (1, 1), plain_abn)
        self.layer2 = stage(256, 128, blocks[1], 2, (1, 1), plain_abn)
        self.layer3 = stage(512, 256, blocks[2], 1, (2, 2), plain_abn)
        self.layer4 = stage(1024, 512, blocks[3], 1, (4, 4), plain_abn)
        self.head = OfficialHead(classes, channels, recurrence)
        self.dsn = nn.Sequential(
            nn.Conv2d(1024, channels, 3, padding=1),  # with a bias, before a norm
            InPlaceABN(channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        res4 = self.layer3(self.layer2(self.layer1(x)))
        return self.head(self.layer4(res4)), self.dsn(res4)

    def logits(self, rgb: Tensor) -> Tensor:
        """(3, H, W) RGB image, 0-255 -> (K, H, W): BGR less the mean, upsampled with aligned corners."""
        mean = torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]
        out, _ = self((rgb.flip(0).float() - mean)[None])
        return F.interpolate(out, rgb.shape[-2:], mode="bilinear", align_corners=True)[0]


class ConvModule(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ResNetV1c(nn.Module):
    """Deep stem of 32, 32, 64; the first block of res4 has dilation 1, that of res5 dilation 2."""

    def __init__(self, blocks=(3, 4, 6, 3)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.layer1 = stage(64, 64, blocks[0], 1, (1, 1), nn.BatchNorm2d)
        self.layer2 = stage(256, 128, blocks[1], 2, (1, 1), nn.BatchNorm2d)
        self.layer3 = stage(512, 256, blocks[2], 1, (1, 2), nn.BatchNorm2d)
        self.layer4 = stage(1024, 512, blocks[3], 1, (2, 4), nn.BatchNorm2d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        res4 = self.layer3(self.layer2(self.layer1(x)))
        return res4, self.layer4(res4)


class CCHead(nn.Module):
    def __init__(self, classes: int, channels: int, in_channels: int = 2048) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.convs = nn.Sequential(ConvModule(in_channels, channels), ConvModule(channels, channels))
        self.conv_cat = ConvModule(in_channels + channels, channels)
        self.cca = CrissCross(channels, Gamma())

    def forward(self, x: Tensor) -> Tensor:
        y = self.cca(self.cca(self.convs[0](x)))
        return self.conv_seg(self.conv_cat(torch.cat([x, self.convs[1](y)], dim=1)))


class FCNHead(nn.Module):
    def __init__(self, classes: int, channels: int, in_channels: int = 1024) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.convs = nn.Sequential(ConvModule(in_channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.convs(x))


class MMSegCCNet(nn.Module):
    """mmsegmentation's network: logits, and the auxiliary ones, at an eighth of the size."""

    def __init__(self, blocks=(3, 4, 6, 3), classes: int = 19, channels: int = 512, aux: int = 256) -> None:
        super().__init__()
        self.backbone = ResNetV1c(blocks)
        self.decode_head = CCHead(classes, channels)
        self.auxiliary_head = FCNHead(classes, aux)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        res4, res5 = self.backbone(x)
        return self.decode_head(res5), self.auxiliary_head(res4)

    def logits(self, rgb: Tensor, align_corners: bool = False) -> Tensor:
        """(3, H, W) RGB image, 0-255 -> (K, H, W)."""
        mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        out, _ = self(((rgb.float() - mean) / std)[None])
        return F.interpolate(out, rgb.shape[-2:], mode="bilinear", align_corners=align_corners)[0]


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which signals neither die nor explode, in evaluation mode; norms of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
                )
                if module.bias is not None:
                    uniform(module.bias, -0.5, 0.5)
            elif isinstance(module, InPlaceABN | nn.BatchNorm2d):
                last = name.endswith(("bn3", "downsample.1")) and "layer" in name
                uniform(module.weight, 0.1 if last else 0.5, 0.4 if last else 1.0)
                signs = torch.rand(module.weight.shape, generator=generator) < 0.2
                module.weight[signs] *= -1
                uniform(module.bias, -0.2, 0.2)
                uniform(module.running_mean, -0.2, 0.2)
                uniform(module.running_var, 0.5, 2.0)
            elif isinstance(module, CrissCross):
                (module.gamma.scale if isinstance(module.gamma, Gamma) else module.gamma).fill_(0.7)
    return net.eval()
