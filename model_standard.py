"""StandardSegmentationModel: the whole of MobileNetV3-Small under a DeepLabV3+ head.

    image (N, 3, H, W)
      |
      |  MobileNetV3-Small, dilated so that it stays at stride 16    [Howard et al. 2019]
      +--> low   (N, 16, H/4,  W/4)    edges and textures
      +--> mid   (N, 24, H/8,  W/8)    parts
      +--> (N, 96, H/16, W/16)
              |
              |  ASPP: separable atrous convolutions + image pooling [Chen et al. 2017, 2018]
              +--> high (N, 128, H/16, W/16)
                     |  x2, concat 1x1(mid), separable 3x3           [Chen et al. 2018]
                     |  x2, concat 1x1(low), separable 3x3
                     |  dropout, 1x1 classifier
                   logits (N, 21, H/4, W/4)  -- bilinear -->  (N, 21, H, W)

What it spends over the ultra-compact model: the last three blocks of the backbone, which hold most
of its weights, one pointwise convolution for each scale of the ASPP and a learned projection over
all of them, and a decoder that concatenates its skips. In the classifier the first of those blocks
has a stride of 2; here it has none, and the kernels of all three are dilated by 2 instead, so that
the map stays at stride 16 with the same weights (torchvision's `dilated=True`).

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

# Blocks of torchvision's `mobilenet_v3_small().features` that end at strides 4, 8 and 16; the last
# one (a 1x1 to 576 channels that feeds the classifier) is left out.
LOW_BLOCKS, MID_BLOCKS, HIGH_BLOCKS = slice(0, 2), slice(2, 4), slice(4, 12)
LOW_CHANNELS, MID_CHANNELS, HIGH_CHANNELS = 16, 24, 96
ASPP_CHANNELS, DECODER_CHANNELS = 128, 64
ASPP_RATES = (3, 6, 9)  # in cells of the stride-16 map: a 3x3 that spans 112, 208 and 304 px


def separable_conv(in_channels, out_channels, dilation=1):
    """A depthwise 3x3 (`dilation` cells between its taps), then a 1x1, each with norm and ReLU."""
    return nn.Sequential(
        Conv2dNormActivation(in_channels, in_channels, 3, dilation=dilation, groups=in_channels),
        Conv2dNormActivation(in_channels, out_channels, 1),
    )


class Backbone(nn.Module):
    """MobileNetV3-Small at output stride 16, with taps where the resolution halves.

    `(N, 3, H, W) -> (N, 16, H/4, W/4), (N, 24, H/8, W/8), (N, 96, H/16, W/16)`.
    """

    def __init__(self, pretrained):
        super().__init__()
        blocks = load_mobilenet_v3_small(pretrained, dilated=True).features
        self.to_low, self.to_mid = blocks[LOW_BLOCKS], blocks[MID_BLOCKS]
        self.to_high = blocks[HIGH_BLOCKS]

    def forward(self, image):
        low = self.to_low(image)
        mid = self.to_mid(low)
        return low, mid, self.to_high(mid)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLabV3+: five views of the map, projected to one.

    A 1x1, three separable 3x3 at growing rates, and the mean of the image, concatenated.
    `(N, in, h, w) -> (N, out, h, w)`, any h and w from 1 up.
    """

    def __init__(self, in_channels, out_channels, rates):
        super().__init__()
        self.local = Conv2dNormActivation(in_channels, out_channels, 1)
        self.atrous = nn.ModuleList(
            separable_conv(in_channels, out_channels, dilation=rate) for rate in rates
        )
        # No BatchNorm on the pooled branch: it holds one value a channel and image, and a batch of
        # one would have no variance.
        self.pool = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU(inplace=True))
        self.project = Conv2dNormActivation(out_channels * (2 + len(rates)), out_channels, 1)

    def forward(self, x):
        context = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (N, out, 1, 1)
        views = [self.local(x)] + [branch(x) for branch in self.atrous]
        views.append(context.expand(-1, -1, *x.shape[-2:]))
        return self.project(torch.cat(views, dim=1))


class SkipConcat(nn.Module):
    """Upsample to the size of a skip, concatenate the skip through a 1x1, separable 3x3.

    `(N, in, h, w), (N, skip, H, W) -> (N, out, H, W)`.
    """

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.skip = Conv2dNormActivation(skip_channels, skip_channels, 1)
        self.fuse = separable_conv(in_channels + skip_channels, out_channels)

    def forward(self, x, skip):
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        return self.fuse(torch.cat([x, self.skip(skip)], dim=1))


class StandardSegmentationModel(nn.Module):
    """MobileNetV3-Small at stride 16, separable ASPP and two concatenated skips.

    Args:
        num_classes: channels of the logits.
        pretrained: start the backbone from torchvision's ImageNet weights (downloaded on first use
            into `$TORCH_HOME`); False starts it at random.

    Raises:
        OSError: the ImageNet weights are wanted, but the file is missing, damaged or unreachable.
    """

    def __init__(self, num_classes=21, pretrained=True):
        super().__init__()
        self.backbone = Backbone(pretrained)
        self.aspp = ASPP(HIGH_CHANNELS, ASPP_CHANNELS, ASPP_RATES)
        self.fuse_mid = SkipConcat(ASPP_CHANNELS, MID_CHANNELS, DECODER_CHANNELS)
        self.fuse_low = SkipConcat(DECODER_CHANNELS, LOW_CHANNELS, DECODER_CHANNELS)
        # Whole channels are dropped: neighbouring pixels are so alike that dropping single ones
        # takes little away (Tompson et al. 2015, https://arxiv.org/abs/1411.4280).
        self.classifier = nn.Sequential(
            nn.Dropout2d(0.1), nn.Conv2d(DECODER_CHANNELS, num_classes, 1)
        )

    def forward(self, image, return_features=False, output_size=None):
        """Segment a batch.

        Args:
            image: float (N, 3, H, W), normalised with ImageNet's mean and standard deviation;
                H and W from 33 up, odd sizes too.
            return_features: also return the features that distillation compares.
            output_size: (height, width) of the logits, in place of the image's.

        Returns:
            logits (N, num_classes, H, W), or of `output_size`; with `return_features`, `(logits,
            features)`, features being a dict of "low" (N, 16, H/4, W/4), "mid" (N, 24, H/8, W/8)
            and "high", the output of the ASPP (N, 128, H/16, W/16), sizes rounded up.
        """
        low, mid, top = self.backbone(image)  # (N, 16, H/4, W/4), (N, 24, H/8, W/8), H/16
        high = self.aspp(top)  # (N, 128, H/16, W/16)
        x = self.fuse_mid(high, mid)  # (N, 64, H/8, W/8)
        x = self.fuse_low(x, low)  # (N, 64, H/4, W/4)
        size = output_size or image.shape[-2:]
        logits = F.interpolate(self.classifier(x), size=size, mode="bilinear")
        if return_features:
            return logits, {"low": low, "mid": mid, "high": high}
        return logits


def load_mobilenet_v3_small(pretrained, **kwargs):
    """torchvision's MobileNetV3-Small, with its ImageNet weights or at random.

    Raises:
        OSError: the weights could not be read or downloaded; the message says what to do.
    """
    if not pretrained:
        return mobilenet_v3_small(weights=None, **kwargs)
    weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1
    try:
        return mobilenet_v3_small(weights=weights, **kwargs)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise OSError(
            f"the ImageNet weights of MobileNetV3-Small could not be loaded from {folder} "
            f"({error}). Delete the file there if it is damaged, download {weights.url} into that "
            "folder, or start from random weights with --no_pretrained (pretrained=False)."
        ) from error


def describe(model, size=256):
    """Print output and feature shapes, and parameters and MACs of each part, for one image."""
    model.eval()
    image = torch.zeros(1, 3, size, size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        logits, features = model(image, return_features=True)
    name = type(model).__name__
    print(f"{name}: image {tuple(image.shape)} -> logits {tuple(logits.shape)}")
    for key, feature in features.items():
        print(f"  feature {key:<5} {tuple(feature.shape)}")
    flops = counter.get_flop_counts()
    print(f"\n{'part':<12} {'parameters':>12} {'million MACs':>14}")
    for part, module in model.named_children():
        print_cost(part, module, flops[f"{name}.{part}"])
    print_cost("total", model, flops["Global"])


def print_cost(label, module, flops):
    """One line of the table of `describe`; a multiply-accumulate (MAC) is two FLOPs."""
    parameters = sum(p.numel() for p in module.parameters())
    print(f"{label:<12} {parameters:>12,} {sum(flops.values()) / 2e6:>14.1f}")


if __name__ == "__main__":
    describe(StandardSegmentationModel(pretrained=False))
