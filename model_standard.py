"""StandardSegmentationModel: MobileNetV3-Small with a DeepLabV3+ head, 1.04 million parameters.

    image (N, 3, H, W)
      |  MobileNetV3-Small, dilated to stay at stride 16         [Howard et al. 2019]
      +--> low   (N, 16, H/4,  W/4)    edges and textures
      +--> mid   (N, 24, H/8,  W/8)    parts of objects
      +--> (N, 96, H/16, W/16)
              |  ASPP: separable branches, concatenated          [Chen et al. 2017, 2018]
              +--> high (N, 128, H/16, W/16)  objects and their context
                     |  x2, concat 1x1(mid), separable 3x3       [Chen et al. 2018]
                     |  x2, concat 1x1(low), separable 3x3
                     |  dropout, 1x1 classifier -> (N, 21, H/4, W/4)
                   logits (N, 21, H, W), bilinear

Beyond the ultra-compact model: the last three blocks of the backbone, which hold most of its
weights, one pointwise convolution per ASPP branch, and skips that are concatenated. These blocks
end at stride 32 in the classifier; dilated by 2, the same weights work at stride 16.

References:
    Howard et al. 2019, Searching for MobileNetV3, https://arxiv.org/abs/1905.02244
    Chen et al. 2017, Rethinking Atrous Convolution (ASPP), https://arxiv.org/abs/1706.05587
    Chen et al. 2018, DeepLabV3+ (decoder, separable ASPP), https://arxiv.org/abs/1802.02611
"""

import pickle

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small
from torchvision.ops import Conv2dNormActivation


class Backbone(nn.Module):
    """MobileNetV3-Small up to stride 16: (N, 3, H, W) -> features at strides 4, 8 and 16."""

    def __init__(self, pretrained):
        super().__init__()
        weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1
        try:
            network = mobilenet_v3_small(weights=weights if pretrained else None, dilated=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise OSError(
                f"no ImageNet weights in {torch.hub.get_dir()}/checkpoints ({error}): delete a "
                f"damaged file there, download {weights.url} into that folder, or start from "
                "random weights with --no_pretrained (pretrained=False)"
            ) from error
        blocks = network.features  # without the last, a 1x1 that feeds the classifier
        self.to_low, self.to_mid, self.to_high = blocks[:2], blocks[2:4], blocks[4:12]

    def forward(self, image):
        low = self.to_low(image)  # (N, 16, H/4, W/4)
        mid = self.to_mid(low)  # (N, 24, H/8, W/8)
        return low, mid, self.to_high(mid)  # (N, 96, H/16, W/16)


def separable_conv(in_channels, out_channels, dilation=1):
    """A depthwise 3x3 and a 1x1, each with BatchNorm and ReLU."""
    return nn.Sequential(
        Conv2dNormActivation(in_channels, in_channels, 3, dilation=dilation, groups=in_channels),
        Conv2dNormActivation(in_channels, out_channels, 1),
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three separable 3x3 and image pooling, projected."""

    def __init__(self, in_channels, out_channels, rates=(3, 6, 9)):
        super().__init__()
        self.local = Conv2dNormActivation(in_channels, out_channels, 1)
        self.atrous = nn.ModuleList(
            separable_conv(in_channels, out_channels, dilation=rate) for rate in rates
        )
        # No BatchNorm on the pooled branch: in a batch of one image its variance would be 0.
        self.pool = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU(inplace=True))
        self.project = Conv2dNormActivation(out_channels * (2 + len(rates)), out_channels, 1)

    def forward(self, x):
        context = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (N, out_channels, 1, 1)
        scales = [self.local(x)] + [branch(x) for branch in self.atrous]
        return self.project(torch.cat([*scales, context.expand_as(scales[0])], dim=1))


class SkipFusion(nn.Module):
    """Upsample x to the size of a skip, concatenate the skip after a 1x1, then a separable 3x3."""

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.skip = Conv2dNormActivation(skip_channels, skip_channels, 1)
        self.fuse = separable_conv(in_channels + skip_channels, out_channels)

    def forward(self, x, skip):
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        return self.fuse(torch.cat([x, self.skip(skip)], dim=1))


class StandardSegmentationModel(nn.Module):
    """MobileNetV3-Small at stride 16, a separable ASPP and a decoder with two concatenated skips.

    `pretrained` starts the backbone from torchvision's ImageNet weights, downloaded on first use;
    an OSError says what to do where they cannot be loaded.
    """

    feature_channels = {"low": 16, "mid": 24, "high": 128}

    def __init__(self, num_classes=21, pretrained=True):
        super().__init__()
        self.backbone = Backbone(pretrained)
        self.aspp = ASPP(in_channels=96, out_channels=128)
        self.fuse_mid = SkipFusion(in_channels=128, skip_channels=24, out_channels=64)
        self.fuse_low = SkipFusion(in_channels=64, skip_channels=16, out_channels=64)
        # Whole channels, because neighbouring pixels are alike (https://arxiv.org/abs/1411.4280).
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(64, num_classes, 1))

    def forward(self, image, return_features=False, upsample=True):
        """image: float (N, 3, H, W), ImageNet-normalised, H and W from 33 up, odd sizes too.

        Returns logits (N, num_classes, H, W), at stride 4 with `upsample=False`; with
        `return_features=True` (logits, {"low", "mid", "high"}), features at strides 4, 8 and 16.
        """
        low, mid, top = self.backbone(image)
        high = self.aspp(top)  # (N, 128, H/16, W/16)
        x = self.fuse_mid(high, mid)  # (N, 64, H/8, W/8)
        x = self.fuse_low(x, low)  # (N, 64, H/4, W/4)
        logits = self.classifier(x)  # (N, num_classes, H/4, W/4)
        if upsample:
            logits = F.interpolate(logits.contiguous(), size=image.shape[-2:], mode="bilinear")
        return (logits, {"low": low, "mid": mid, "high": high}) if return_features else logits


if __name__ == "__main__":
    model = StandardSegmentationModel(pretrained=False).eval()
    image = torch.zeros(1, 3, 256, 256)
    with torch.no_grad(), FlopCounterMode(depth=2):  # prints its table; 1 MAC is 2 FLOPs
        logits, features = model(image, return_features=True)
    for name, value in {"image": image, **features, "logits": logits}.items():
        print(f"{name:<12} {tuple(value.shape)}")
    for name, part in [*model.named_children(), ("total", model)]:
        print(f"{name:<12} {sum(p.numel() for p in part.parameters()):>10,} parameters")
