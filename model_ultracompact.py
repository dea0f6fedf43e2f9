"""UltraCompactSegmentationModel: semantic segmentation with 0.22 million parameters.

    image (N, 3, H, W)
      |  MobileNetV3-Small, its first nine blocks                [Howard et al. 2019]
      +--> low   (N, 16, H/4,  W/4)    edges and textures
      +--> mid   (N, 24, H/8,  W/8)    parts of objects
      +--> (N, 48, H/16, W/16)
              |  ASPP: depthwise, one shared projection          [Chen et al. 2017]
              +--> high (N, 64, H/16, W/16)   objects and their context
                     |  x2, add 1x1(mid), separable 3x3          [Chen et al. 2018]
                     |  x2, add 1x1(low), separable 3x3
                     |  dropout, 1x1 classifier -> (N, 21, H/4, W/4)
                   logits (N, 21, H, W), bilinear

Where parameters are saved: the backbone stops before the last three blocks (96 channels), which
hold 3.6 times the weights of all the others. The atrous convolutions are depthwise and share one
projection, so three more scales cost little. The decoder adds its skips instead of concatenating.

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
            blocks = mobilenet_v3_small(weights=weights if pretrained else None).features
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise OSError(
                f"no ImageNet weights in {torch.hub.get_dir()}/checkpoints ({error}): delete a "
                f"damaged file there, download {weights.url} into that folder, or start from "
                "random weights with --no_pretrained (pretrained=False)"
            ) from error
        self.to_low, self.to_mid, self.to_high = blocks[:2], blocks[2:4], blocks[4:9]

    def forward(self, image):
        low = self.to_low(image)  # (N, 16, H/4, W/4)
        mid = self.to_mid(low)  # (N, 24, H/8, W/8)
        return low, mid, self.to_high(mid)  # (N, 48, H/16, W/16)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: depthwise branches, one shared projection, image pooling."""

    def __init__(self, in_channels, out_channels, rates=(3, 6, 9)):
        super().__init__()
        self.atrous = nn.ModuleList(
            Conv2dNormActivation(in_channels, in_channels, 3, dilation=rate, groups=in_channels)
            for rate in rates
        )
        # No BatchNorm on the pooled branch: in a batch of one image its variance would be 0.
        self.pool = nn.Conv2d(in_channels, out_channels, 1)
        self.project = nn.Conv2d(in_channels * (1 + len(rates)), out_channels, 1, bias=False)
        self.norm_act = nn.Sequential(nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def forward(self, x):
        scales = torch.cat([x] + [branch(x) for branch in self.atrous], dim=1)
        context = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (N, out_channels, 1, 1)
        return self.norm_act(self.project(scales) + context)


class SkipFusion(nn.Module):
    """Upsample x to the size of a skip, add the skip after a 1x1, then a separable 3x3."""

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.skip = Conv2dNormActivation(skip_channels, out_channels, 1, activation_layer=None)
        self.smooth = nn.Sequential(
            Conv2dNormActivation(
                out_channels, out_channels, 3, groups=out_channels, activation_layer=None
            ),
            Conv2dNormActivation(out_channels, out_channels, 1),
        )

    def forward(self, x, skip):
        # The 1x1 commutes with the upsampling; done first, it runs on a quarter of the positions.
        x = F.interpolate(self.reduce(x), size=skip.shape[-2:], mode="bilinear")
        return self.smooth(F.relu(x + self.skip(skip)))


class UltraCompactSegmentationModel(nn.Module):
    """Nine blocks of MobileNetV3-Small, a depthwise ASPP and a decoder with two additive skips.

    `pretrained` starts the backbone from torchvision's ImageNet weights, downloaded on first use;
    an OSError says what to do where they cannot be loaded.
    """

    feature_channels = {"low": 16, "mid": 24, "high": 64}

    def __init__(self, num_classes=21, pretrained=True):
        super().__init__()
        self.backbone = Backbone(pretrained)
        self.aspp = ASPP(in_channels=48, out_channels=64)
        self.fuse_mid = SkipFusion(in_channels=64, skip_channels=24, out_channels=64)
        self.fuse_low = SkipFusion(in_channels=64, skip_channels=16, out_channels=32)
        # Whole channels, because neighbouring pixels are alike (https://arxiv.org/abs/1411.4280).
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(32, num_classes, 1))

    def forward(self, image, return_features=False, upsample=True):
        """image: float (N, 3, H, W), ImageNet-normalised, H and W from 33 up, odd sizes too.

        Returns logits (N, num_classes, H, W), at stride 4 with `upsample=False`; with
        `return_features=True` (logits, {"low", "mid", "high"}), features at strides 4, 8 and 16.
        """
        low, mid, top = self.backbone(image)
        high = self.aspp(top)  # (N, 64, H/16, W/16)
        x = self.fuse_mid(high, mid)  # (N, 64, H/8, W/8)
        x = self.fuse_low(x, low)  # (N, 32, H/4, W/4)
        logits = self.classifier(x)  # (N, num_classes, H/4, W/4)
        if upsample:
            logits = F.interpolate(logits.contiguous(), size=image.shape[-2:], mode="bilinear")
        return (logits, {"low": low, "mid": mid, "high": high}) if return_features else logits


if __name__ == "__main__":
    model = UltraCompactSegmentationModel(pretrained=False).eval()
    image = torch.zeros(1, 3, 256, 256)
    with torch.no_grad(), FlopCounterMode(depth=2):  # prints its table; 1 MAC is 2 FLOPs
        logits, features = model(image, return_features=True)
    for name, value in {"image": image, **features, "logits": logits}.items():
        print(f"{name:<12} {tuple(value.shape)}")
    for name, part in [*model.named_children(), ("total", model)]:
        print(f"{name:<12} {sum(p.numel() for p in part.parameters()):>10,} parameters")
