"""UltraCompactSegmentationModel: semantic segmentation in a fifth of a million parameters.

    image (N, 3, H, W)
      |
      |  MobileNetV3-Small, its first blocks only          [Howard et al. 2019]
      +--> low   (N, 16, H/4,  W/4)    edges and textures
      +--> mid   (N, 24, H/8,  W/8)    parts
      +--> (N, 48, H/16, W/16)
              |
              |  ASPP: the same map seen at four scales    [Chen et al. 2017]
              +--> high (N, 64, H/16, W/16)   what is where, roughly
                     |  x2, + 1x1(mid), 3x3                [Chen et al. 2018]
                     |  x2, + 1x1(low), 3x3
                     |  dropout, 1x1 classifier
                   logits (N, 21, H/4, W/4)  -- bilinear -->  (N, 21, H, W)

Where the parameters go, and why. Most weights of a MobileNetV3 block are in its 1x1 convolutions
and grow with the square of the channels, so the last three blocks (96 channels) hold 3.6 times the
weights of all the others together; the network stops before them. The atrous convolutions of the
ASPP are depthwise (nine weights a channel) and share one pointwise projection, so three more scales
cost almost nothing. The decoder adds its skips instead of concatenating them, which halves the
convolution that follows.

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

# Blocks of torchvision's `mobilenet_v3_small().features` that end at strides 4, 8 and 16.
LOW_BLOCKS, MID_BLOCKS, HIGH_BLOCKS = slice(0, 2), slice(2, 4), slice(4, 9)
LOW_CHANNELS, MID_CHANNELS, HIGH_CHANNELS = 16, 24, 48
ASPP_CHANNELS, DECODER_CHANNELS = 64, 32
ASPP_RATES = (3, 6, 9)  # in cells of the stride-16 map: a 3x3 that spans 112, 208 and 304 px


class Backbone(nn.Module):
    """The first blocks of MobileNetV3-Small, cut where the resolution halves.

    `(N, 3, H, W) -> (N, 16, H/4, W/4), (N, 24, H/8, W/8), (N, 48, H/16, W/16)`.
    """

    def __init__(self, pretrained):
        super().__init__()
        blocks = load_mobilenet_v3_small(pretrained).features
        self.to_low, self.to_mid = blocks[LOW_BLOCKS], blocks[MID_BLOCKS]
        self.to_high = blocks[HIGH_BLOCKS]

    def forward(self, image):
        low = self.to_low(image)
        mid = self.to_mid(low)
        return low, mid, self.to_high(mid)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with depthwise branches and one shared projection.

    Each branch sees the map through a 3x3 kernel whose taps lie `rate` cells apart; one more branch
    sees the mean of the whole image. `(N, in, h, w) -> (N, out, h, w)`, any h and w from 1 up.
    """

    def __init__(self, in_channels, out_channels, rates):
        super().__init__()
        self.atrous = nn.ModuleList(
            Conv2dNormActivation(in_channels, in_channels, 3, dilation=rate, groups=in_channels)
            for rate in rates
        )
        # No BatchNorm on the pooled branch: it holds one value a channel and image, and a batch of
        # one would have no variance.
        self.pool = nn.Conv2d(in_channels, out_channels, 1)
        self.project = nn.Conv2d(in_channels * (1 + len(rates)), out_channels, 1, bias=False)
        self.norm_act = nn.Sequential(nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def forward(self, x):
        scales = torch.cat([x] + [branch(x) for branch in self.atrous], dim=1)
        image_context = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (N, out, 1, 1)
        return self.norm_act(self.project(scales) + image_context)


class SkipFusion(nn.Module):
    """Upsample to the size of a skip, add the skip through a 1x1, smooth with a separable 3x3.

    `(N, in, h, w), (N, skip, H, W) -> (N, out, H, W)`.
    """

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
        # The 1x1 runs before the upsampling: the two commute, and this way it sees 4x fewer cells.
        x = F.interpolate(self.reduce(x), size=skip.shape[-2:], mode="bilinear")
        return self.smooth(F.relu(x + self.skip(skip)))


class UltraCompactSegmentationModel(nn.Module):
    """The first nine blocks of MobileNetV3-Small, a depthwise ASPP and two additive skips.

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
        self.fuse_mid = SkipFusion(ASPP_CHANNELS, MID_CHANNELS, ASPP_CHANNELS)
        self.fuse_low = SkipFusion(ASPP_CHANNELS, LOW_CHANNELS, DECODER_CHANNELS)
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
            and "high", the output of the ASPP (N, 64, H/16, W/16), sizes rounded up.
        """
        low, mid, top = self.backbone(image)  # (N, 16, H/4, W/4), (N, 24, H/8, W/8), H/16
        high = self.aspp(top)  # (N, 64, H/16, W/16)
        x = self.fuse_mid(high, mid)  # (N, 64, H/8, W/8)
        x = self.fuse_low(x, low)  # (N, 32, H/4, W/4)
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
    describe(UltraCompactSegmentationModel(pretrained=False))
