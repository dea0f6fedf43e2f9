"""Knowledge distillation for segmentation: the losses, the adapters, and the frozen teacher.

A small student learns from the ground truth and from a large teacher at once. Two ways to listen:

response  Every pixel of the teacher's output is a distribution over the classes. The student is
          pulled towards it with a Kullback-Leibler divergence, both sides softened by a
          temperature T, so that the teacher's second and third guesses are heard too:

          L = alpha * CE(y, z_s) + beta * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))

          Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
          https://arxiv.org/abs/1503.02531

feature   The student's intermediate features are pulled towards the teacher's. The two have
          different numbers of channels, so a 1x1 convolution A_l translates at each level l; the
          cosine compares directions only, because the scales of two networks mean nothing to each
          other:

          L = alpha * CE(y, z_s) + beta * mean_l (1 - cos(A_l f_s, f_t))

          Romero et al. 2015, FitNets: Hints for Thin Deep Nets, https://arxiv.org/abs/1412.6550

Three quarters of VOC's pixels are background, and mIoU counts every class alike. So the pixels of
rare classes weigh more, in the cross-entropy by their label and in the response loss by what the
teacher expects them to be (`balanced_class_weights`).

The adapters A_l are trained with the student and thrown away after it: they are neither counted nor
saved with the weights. The teacher never trains: it stays in eval mode, under no_grad, and is never
saved.
"""

import contextlib
import math
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass
from torchvision import models
from tqdm import tqdm

from model_standard import StandardSegmentationModel
from model_ultracompact import UltraCompactSegmentationModel
from voc_data import (
    CACHE_VERSION, NUM_CLASSES, UNLABELLED, VOID, ArrayStore, ArrayStoreWriter, DataError,
    UsageError, cached, fingerprint, has_room, image_size, normalise, out_of_memory, read_item,
    resize_longest,
)  # fmt: skip

KD_MODES = ("none", "response", "feature")
LEVELS = ("low", "mid", "high")  # strides 4, 8 and 16 of a student
TEACHER_SIZE = 513  # longest side in pixels at which networks trained for VOC are at their best
STUDENTS = {
    "ultracompact": UltraCompactSegmentationModel,
    "standard": StandardSegmentationModel,
}

# ------------------------------------------------------------------------------------- the losses


def cross_entropy(logits, labels, class_weights=None):
    """CE(y, z): cross-entropy, times the weight of the label, averaged over the labelled pixels.

    Args:
        logits: (N, C, H, W), raw.
        labels: (N, H, W) of 0..C-1; VOID and UNLABELLED pixels count for nothing.
        class_weights: (C,), from `balanced_class_weights`, or None for 1 each.

    Returns:
        a scalar, divided by the number of pixels and not by their weights, which are 1 on average;
        0 (with a gradient of 0) where no pixel is labelled.
    """
    target = labels.long().masked_fill(labels == UNLABELLED, VOID)
    total = F.cross_entropy(
        logits.float(), target, class_weights, ignore_index=VOID, reduction="sum"
    )
    return total / (target != VOID).sum().clamp(min=1)


def balanced_class_weights(pixel_counts, power):
    """Weights of the classes that lift rare ones: w_c = f_c^-power / sum_k f_k^(1-power).

    f_c is the share of class c in the labelled pixels. Three quarters of VOC are background, and
    mIoU counts every class alike. At power 0 all weights are 1; at 1 all classes count the same;
    0.5 is a compromise. The mean weight of a labelled pixel is 1, so that alpha keeps its meaning.

    Args:
        pixel_counts: (C,), pixels of each class in the training masks. A class with less than one
            pixel in a thousand weighs as if it had that.
        power: 0..1.

    Returns:
        (C,) float32.
    """
    share = pixel_counts.double() / pixel_counts.sum().clamp(min=1)
    weights = share.clamp(min=1e-3) ** -power
    mean = (share * weights).sum() if share.any() else weights.mean()
    return (weights / mean).float()


def response_based_kd_loss(
    student_logits, teacher_logits, labels, temperature, class_weights=None
):
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), Hinton et al. 2015.

    Summed over the classes, averaged over the non-void pixels of the batch: not over the batch
    alone (`reduction="batchmean"` would be H*W too large) and not over classes too (`"mean"` would
    be C too small). T^2 undoes the 1/T^2 that the softening puts on the gradient, so that beta
    means the same at every temperature.

    Args:
        student_logits, teacher_logits: (N, C, h, w), raw.
        labels: (N, h, w); VOID pixels are left out, UNLABELLED ones count.
        temperature: T > 0; 1 leaves the distributions as they are.
        class_weights: (C,), from `balanced_class_weights`, or None for 1 each. A pixel weighs what
            the teacher expects, sum_c softmax(z_t)_c w_c, the same at every temperature.

    Returns:
        a float32 scalar; 0 where every pixel is void.

    Raises:
        UsageError: the temperature is not positive.
    """
    if temperature <= 0:
        raise UsageError(f"the temperature must be positive, not {temperature}")
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    soft = teacher.exp()
    # As F.kl_div(student, teacher, log_target=True) gives it; one exp less here, one in backward.
    divergence = (soft * (teacher - student)).sum(dim=1)  # (N, h, w)
    if class_weights is not None:
        expected = soft if temperature == 1 else F.softmax(teacher_logits.float(), dim=1)
        divergence = divergence * (expected * class_weights.view(-1, 1, 1)).sum(dim=1)
    return temperature**2 * masked_mean(divergence, labels != VOID)


def feature_based_kd_loss(student_features, teacher_features, labels=None):
    """mean over levels of 1 - cos(f_s, f_t), in 0..2; after Romero et al. 2015.

    The cosine runs over the channels at each position, then positions are averaged.

    Args:
        student_features: {level: (N, C_l, h, w)}, already through their adapters.
        teacher_features: {level: (N, C_l, h', w')}, resized to the student's h and w if need be.
        labels: (N, H, W), to leave out the positions that are VOID there (padding); None takes all.

    Returns:
        a float32 scalar; 0 where every position is void.
    """
    distances = []
    for level, student in student_features.items():
        teacher = teacher_features[level].float()
        if teacher.shape[-2:] != student.shape[-2:]:
            teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear")
        distance = 1 - F.cosine_similarity(student.float(), teacher, dim=1)  # (N, h, w)
        real = torch.ones_like(distance, dtype=torch.bool)
        if labels is not None:
            real = labels_at(labels, distance.shape[-2:]) != VOID
        distances.append(masked_mean(distance, real))
    return torch.stack(distances).mean()


def masked_mean(values, mask):
    """Mean of `values` where `mask` is True; 0, not NaN, where it is True nowhere."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def labels_at(labels, size):
    """Labels (N, H, W) at another resolution: of the pixel nearest to the centre of each cell."""
    rows, columns = (
        ((torch.arange(new, device=labels.device) + 0.5) * (old / new)).long()
        for old, new in zip(labels.shape[-2:], size)
    )
    return labels[:, rows[:, None], columns]


def make_adapters(student_channels, teacher_channels):
    """The 1x1 convolutions A_l from the student's channels to the teacher's, by level."""
    return nn.ModuleDict(
        {
            level: nn.Conv2d(student_channels[level], channels, kernel_size=1)
            for level, channels in teacher_channels.items()
        }
    )


def feature_channels(student):
    """{level: channels} of a student's features."""
    parameter = next(student.parameters())
    was_training = student.training
    with torch.no_grad():
        image = torch.zeros(1, 3, 64, 64, device=parameter.device)
        features = student.eval()(image, return_features=True)[1]
    student.train(was_training)
    return {level: feature.shape[1] for level, feature in features.items()}


# --------------------------------------------------------------------- a student from its file


def load_student(path):
    """Rebuild a student from its checkpoint: `(model in eval mode, the checkpoint's dict)`.

    Raises:
        DataError: the file is missing, truncated, no checkpoint of this project, or would run code
            (it is read with `weights_only=True`, which never executes any).
    """
    checkpoint = read_checkpoint(path)
    name = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if name not in list(STUDENTS) or "model_state_dict" not in checkpoint:
        raise DataError(
            f"{path} is not a checkpoint of this project: name a best_model_*.pth (or epoch_*.pth) "
            "that train.py wrote"
        )
    classes = checkpoint.get("num_classes", NUM_CLASSES)
    if not isinstance(classes, int) or classes < 1:
        raise DataError(f"{path} names {classes!r} as its number of classes")
    size = checkpoint.get("eval_size", 0)
    if not isinstance(size, int) or size < 0:
        raise DataError(f"{path} names {size!r} as the longest side of an image, its eval_size")
    student = STUDENTS[name](classes, pretrained=False)
    try:
        student.load_state_dict(checkpoint["model_state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"{path} does not fit the model '{name}' it names: {last}") from error
    return student.eval(), checkpoint


def read_checkpoint(path):
    """The content of a file of `torch.save`, on the CPU, without executing anything in it."""
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder: name a .pth file in it")
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is not a file of plain weights (it is no checkpoint, or holds code, which is "
            "never executed)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read; is it truncated? ({first_line(error)})") from error


def first_line(error):
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------- teachers


class Teacher(nn.Module):
    """A frozen network with taps: `teacher(images) -> {"out", and "low", "mid", "high" if it can}`.

    Args:
        network: maps (N, 3, H, W) normalised images to a dict of tensors with "out", the logits.
        name: for reports.
        taps: {level: module of `network`} whose outputs are the features; None where the network
            returns them itself.
        device: where the network is.
        autocast: whether it may run in mixed precision.

    Attributes:
        channels: {"out": classes, level: channels}, seen in a trial run.

    Raises:
        DataError: it returns no logits, or not for the 21 classes of VOC, or takes one size only.
    """

    def __init__(self, network, name, taps=None, device="cpu", autocast=True):
        super().__init__()
        # In a tuple, hidden from parameters(), state_dict() and train(): it must never train, and
        # the modules of torch.export do not even allow train() and eval() to be called.
        self._network = (network.requires_grad_(False),)
        self.name, self.autocast = name, autocast
        self.parameter_count = sum(parameter.numel() for parameter in network.parameters())
        self._tapped, self._has_taps = {}, bool(taps)
        for level, module in (taps or {}).items():
            module.register_forward_hook(self._remember(level))
        try:
            trial = self(torch.zeros(2, 3, 65, 65, device=device))
        except (RuntimeError, AssertionError) as error:  # a program that was exported for one size
            if out_of_memory(error):
                raise
            raise DataError(
                f"the teacher {name} does not take two images of 65x65 ({first_line(error)}). A "
                ".pt2 file must be exported with dynamic_shapes for dimensions 0, 2 and 3"
            ) from error
        self.channels = {key: value.shape[1] for key, value in trial.items()}
        if self.channels.get("out") != NUM_CLASSES:
            raise DataError(
                f"the teacher {name} gives {self.channels.get('out', 'no')} classes; VOC has "
                f"{NUM_CLASSES}"
            )

    def _remember(self, level):
        def hook(module, inputs, output):
            self._tapped[level] = output

        return hook

    @torch.no_grad()
    def forward(self, images, logits=True):
        """Outputs for (N, 3, H, W) normalised images; `logits=False` skips the head if it can."""
        network = self._network[0]
        exact = torch.autocast(images.device.type, enabled=False)
        with contextlib.nullcontext() if self.autocast else exact:
            if not logits and self._has_taps:
                network.backbone(images)
                outputs = {}
            else:
                outputs = network(images)
        if not isinstance(outputs, dict):
            raise DataError(f"the teacher {self.name} does not return a dict with 'out'")
        outputs = {key: outputs[key] for key in ("out", *LEVELS) if key in outputs}
        outputs |= {level: self._tapped.pop(level) for level in LEVELS if level in self._tapped}
        return outputs

    def train(self, mode=True):
        """Stays in eval mode, whatever is asked."""
        return self

    def require(self, levels):
        """Raise a DataError if one of the feature levels is missing."""
        missing = [level for level in levels if level not in self.channels]
        if missing:
            raise DataError(
                f"the teacher {self.name} has no features {', '.join(missing)}, which feature mode "
                "needs; choose another --teacher, other --kd_levels, or --kd_mode response"
            )


class StudentAsTeacher(nn.Module):
    """A student of this project with the interface of a teacher's network."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, images):
        logits, features = self.student(images, return_features=True)
        return {"out": logits} | features


def load_teacher(name="fcn_resnet50", weights_file=None, device="cpu"):
    """A frozen teacher.

    Args:
        name: a torchvision segmentation model (`fcn_resnet50`, `deeplabv3_resnet101`, ...), whose
            COCO_WITH_VOC_LABELS_V1 weights are downloaded on first use; or a file: the `.pth` of a
            student of this project, or the `.pt2` of `torch.export` of a network that returns a
            dict with "out" and, for feature mode, "low", "mid", "high".
        weights_file: a state dict on disk in place of the download.
        device: where it runs.

    Raises:
        UsageError: no such model. DataError: its file is missing, damaged or does not fit.
        OSError: the weights could not be downloaded.
    """
    if str(name).endswith((".pt2", ".pth", ".pt")):
        if weights_file:
            raise UsageError(f"--teacher {name} has its weights; --teacher_weights is for a name")
        label = Path(name).name
        if str(name).endswith(".pt2"):  # an exported program may insist on the dtypes it began with
            return Teacher(read_exported(name, device), label, device=device, autocast=False)
        network = StudentAsTeacher(load_student(name)[0]).to(device).eval()
        return Teacher(network, label, device=device)
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise UsageError(
            f"--teacher {name} is neither a .pth or .pt2 file nor one of {', '.join(known)}"
        )
    network = torchvision_teacher(name, weights_file)
    network = network.to(device, memory_format=torch.channels_last).eval()
    network.aux_classifier = None  # only ever used in training
    label = name if weights_file is None else f"{name} ({Path(weights_file).name})"
    return Teacher(network, label, backbone_taps(network.backbone), device)


def size_made_for(name):
    """Longest side, in pixels, of the whole images that a teacher of `load_teacher` knows best.

    For a student of this project the size of its validation, where 0 is the images' own.
    """
    is_student = str(name).endswith((".pth", ".pt"))
    return load_student(name)[1].get("eval_size", 0) if is_student else TEACHER_SIZE


def torchvision_teacher(name, weights_file):
    """A torchvision segmentation model with its VOC weights, downloaded or from a file."""
    if weights_file is None:
        weights = models.get_model_weights(name).COCO_WITH_VOC_LABELS_V1
        try:
            return models.get_model(name, weights=weights, weights_backbone=None)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise OSError(
                f"the weights of the teacher {name} could not be loaded "
                f"({first_line(error)}). Delete the file in {torch.hub.get_dir()}/checkpoints if "
                f"it is damaged, or download {weights.url} and name it with --teacher_weights."
            ) from error
    state = read_checkpoint(weights_file)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise DataError(f"--teacher_weights {weights_file} is not a state dict")
    aux = {"aux_loss": True} if any(key.startswith("aux_classifier") for key in state) else {}
    network = models.get_model(name, weights=None, weights_backbone=None, **aux)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"--teacher_weights {weights_file} does not fit {name}: {last}") from error
    return network


def backbone_taps(backbone):
    """The modules of a torchvision segmentation backbone that give low, mid and high features."""
    children = dict(backbone.named_children())
    if "layer4" in children:  # a ResNet: strides 4, 8, 8 (dilated)
        return {"low": children["layer1"], "mid": children["layer2"], "high": children["layer4"]}
    # A MobileNet, numbered blocks: the last ones at strides 4 and 8, and the last of all.
    taps, size = {}, 128
    x = torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)
    with torch.no_grad():
        for module in children.values():
            x = module(x)
            level = {4: "low", 8: "mid"}.get(size // x.shape[-1], "high")
            taps[level] = module
    return taps


def read_exported(path, device):
    """The module of a `.pt2` file of `torch.export`, frozen as it was exported, on a device."""
    if not Path(path).is_file():
        raise DataError(f"--teacher {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise DataError(f"--teacher {path} is not a file of torch.export.save; is it truncated?")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch.export raises many kinds for a file that is not its own
        raise DataError(
            f"--teacher {path} is not a file of torch.export.save, or of a later version than "
            f"torch {torch.__version__} ({first_line(error)})"
        ) from error
    return move_to_device_pass(program, str(device)).module()


# ------------------------------------------------------------- the teacher, once for each image

CELLS = {"out": 4, "low": 4, "mid": 8, "high": 16}  # pixels of a crop for one value of each map
KEPT_STRIDES = {"out": 8, "low": 4, "mid": 8, "high": 16}  # on disk: pixels of the teacher's input


def teacher_cache(teacher, items, pixels, cache_dir, size, keys, device, identity=""):
    """Run the teacher once over every whole image, and keep what it said on disk.

    The teacher sees the whole image at its best resolution, not the scaled crops of training, so it
    is more often right; and training pays for it once, not at every step.

    Args:
        items, pixels: the images, and their `pixel_cache` or None.
        size: the longest side that the teacher sees, in pixels; 0: the image's own.
        keys: which of "out", "low", "mid", "high" to keep.
        identity: what tells this teacher from others, besides its name.

    Returns:
        {key: (ArrayStore of (C, h, w) float16, cell)} for `VOCDataset`.

    Raises:
        DataError: the disk has no room for it. (A teacher that is asked live sees crops and says
            other things: that is for the user to choose.)
    """
    identity = (teacher.name, identity, size, tuple(keys), CACHE_VERSION)
    folder = Path(cache_dir) / f"teacher-{fingerprint(items, identity)}"
    needed = 0 if folder.is_dir() else kept_bytes(teacher, items, size, keys)
    if not has_room(cache_dir, needed):
        raise DataError(
            f"the teacher cache needs {needed / 1e9:.1f} GB, and {cache_dir} has less: free some, "
            "name another --cache_dir, or ask the teacher about every crop (--teacher_cache none)"
        )

    def fill(unfinished):
        writers = {key: ArrayStoreWriter(unfinished, key, np.float16) for key in keys}
        for index in tqdm(
            range(len(items)), f"asking {teacher.name}", unit="img", leave=False, disable=None
        ):
            image = pixels[0][index] if pixels else read_item(items[index])[0]
            image = torch.from_numpy(image).permute(2, 0, 1).to(device)
            for key, value in whole_image_maps(teacher, image, size, keys).items():
                writers[key].append(value.numpy())
        for writer in writers.values():
            writer.close()

    cached(folder, fill)
    return {key: (ArrayStore(folder, key), CELLS[key]) for key in keys}


def whole_image_maps(teacher, image, size, keys):
    """{key: (C, h, w) float16 on the CPU} for a (3, H, W) uint8 image, at `KEPT_STRIDES`."""
    image = resize_longest(image, size)
    outputs = teacher(normalise(image[None]), logits="out" in keys)
    maps = {}
    for key in keys:
        value = outputs[key].float()
        if value.device.type == "mps":  # pools only where the sizes divide
            value = value.cpu()
        cells = kept_size(image.shape[-2:], key)
        if value.shape[-2] > cells[0] or value.shape[-1] > cells[1]:  # down, never blown up
            value = F.interpolate(value, size=cells, mode="area")
        maps[key] = value[0].half().cpu()
    return maps


def kept_bytes(teacher, items, size, keys):
    """What `teacher_cache` takes on disk, at most: as if all images were square."""
    sides = Counter(size or max(image_size(item)) for item in items)
    return sum(
        2 * teacher.channels[key] * math.prod(kept_size((side, side), key)) * number
        for side, number in sides.items() for key in keys
    )  # fmt: skip


def kept_size(size, key):
    """(height, width) in cells of the kept map of an image of `size`, in pixels.

    Rounded up, as a network with strided convolutions does: a map that has the stride already is
    kept as it is, not averaged from 33 cells into 32.
    """
    return tuple(math.ceil(side / KEPT_STRIDES[key]) for side in size)
