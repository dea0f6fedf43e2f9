"""Knowledge distillation for segmentation: three losses, adapters, and the frozen teacher.

With ground truth y, logits z and features f, s for the student and t for the teacher:

none      L = alpha * CE
response  L = alpha * CE + beta * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))
          Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
feature   L = alpha * CE + beta * mean over levels l of (1 - cos(A_l f_s, f_t))
          after Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550

CE and KL are weighted means over pixels i, because three quarters of VOC's pixels are background
and mIoU counts every class alike. With f_c the share of class c in the training masks:

          w_c = max(f_c, 0.001)^-P                                P: --class_balance
          CE = sum_i w_(y_i) * -log softmax(z_s)_(y_i) / sum_i w_(y_i)
          KL = sum_i v_i * KL_i / sum_i v_i                       v_i = sum_c softmax(z_t)_c w_c

so the weights average 1 over the pixels that are summed, on labelled and on unlabelled images.
Void pixels are left out everywhere; unlabelled pixels count in KL and in the features.

The adapters A_l are 1x1 convolutions from the student's channels to the teacher's. They are trained
with the student, and neither counted nor saved with its weights.
"""

import math
import pickle
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from model_standard import StandardSegmentationModel
from model_ultracompact import UltraCompactSegmentationModel
from voc_data import (
    NUM_CLASSES, STRIDES, UNLABELLED, VOID, DataError, UsageError, cached_arrays, network_input,
)  # fmt: skip

KD_MODES, LEVELS = ("none", "response", "feature"), ("low", "mid", "high")
STUDENTS = {"ultracompact": UltraCompactSegmentationModel, "standard": StandardSegmentationModel}
TEACHER_SIZE = 513  # px, longest side at which networks trained on VOC do best


def weighted_mean(values, weights):
    """sum(w * v) / sum(w); 0 where all weights are 0."""
    return (weights * values).sum() / weights.sum().clamp(min=1e-6)


def labels_at(labels, size):
    """Labels (N, H, W) at another resolution (h, w), by nearest neighbour."""
    return F.interpolate(labels[:, None], size, mode="nearest-exact")[:, 0]


def class_weights(pixels, power):
    """w_c = max(f_c, 0.001)^-power, (C,) float32, from the training masks' pixels per class."""
    share = pixels.double() / pixels.sum()
    return (share.clamp(min=1e-3) ** -power).float()


def cross_entropy(logits, labels, weights):
    """CE of the module's docstring, a float32 scalar; 0 where no pixel is labelled.

    Args:
        logits: (N, C, h, w). weights: (C,), of `class_weights`.
        labels: (N, H, W) uint8, taken at the size of the logits, without VOID and UNLABELLED.
    """
    labels = labels_at(labels, logits.shape[-2:]).long()
    labelled = labels < UNLABELLED
    labels = labels.where(labelled, 0)
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return weighted_mean(loss, weights[labels] * labelled)


def response_based_kd_loss(student_logits, teacher_logits, labels, weights, temperature=1.0):
    """T^2 * KL of the module's docstring, a float32 scalar; 0 where all pixels are void.

    Summed over classes, averaged over pixels: `reduction="batchmean"` would be H * W times too
    large. T^2 undoes the 1 / T^2 that softening puts on the gradient. The v_i are taken at T = 1.

    Args:
        student_logits: (N, C, h, w). teacher_logits: (N, C, h', w'), resized to h, w.
        labels: (N, H, W) uint8, of which VOID is left out. weights: (C,), of `class_weights`.
    """
    size = student_logits.shape[-2:]
    teacher_logits = F.interpolate(teacher_logits.float(), size, mode="bilinear")
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    kl = (teacher.exp() * (teacher - student)).sum(dim=1)  # (N, h, w)
    expected = (teacher_logits.softmax(dim=1) * weights.view(-1, 1, 1)).sum(dim=1)
    return temperature**2 * weighted_mean(kl, expected * (labels_at(labels, size) != VOID))


def feature_based_kd_loss(student_features, teacher_features, labels):
    """Mean over levels and positions of 1 - cos over the channels, a float32 scalar in 0..2.

    The cosine compares directions: the scales of two networks' features have nothing in common.

    Args:
        student_features: {level: (N, C, h, w)}, adapted. teacher_features: the same shapes.
        labels: (N, H, W) uint8; VOID positions (padding) are left out, 0 if there are no others.
    """
    distances = []
    for level, student in student_features.items():
        cosine = F.cosine_similarity(student.float(), teacher_features[level].float(), dim=1)
        real = labels_at(labels, cosine.shape[-2:]) != VOID
        distances.append(weighted_mean(1 - cosine, real.float()))
    return torch.stack(distances).mean()


def make_adapters(student, teacher, levels):
    """The 1x1 convolutions A_l, by level, from {level: channels} of both networks."""
    return nn.ModuleDict({l: nn.Conv2d(student[l], teacher[l], 1) for l in levels})


# -------------------------------------------------------------------------- checkpoints of students

def read_checkpoint(file):
    """What torch.save wrote to a file; code in it is never run. DataError where it is broken."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{file} holds no plain weights (code in it is not run)") from error
    except Exception as error:  # torch.load raises many kinds for a broken file
        raise DataError(f"{file} cannot be read ({first_line(error)}): is it whole?") from error


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def score(miou, parameters):
    return 4 * miou / (1 + parameters / 1e6)  # mIoU in 0..1


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_weights(network, state, file):
    """Load the state dict of a file; a DataError names the first keys that do not fit."""
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise DataError(f"{file} holds no state dict")
    shapes, found = ({k: v.shape for k, v in s.items()} for s in (network.state_dict(), state))
    wrong = sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k))
    wrong += [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if wrong:
        raise DataError(f"{file} does not fit {type(network).__name__}: {len(wrong)} tensors are "
                        f"missing, unexpected, misshapen or NaN, {wrong[0]} first")  # fmt: skip
    network.load_state_dict(state)


def load_student(file):
    """(student in eval mode, its checkpoint), from a best_model_*.pth of train.py."""
    checkpoint = read_checkpoint(file)
    fields = checkpoint if isinstance(checkpoint, dict) else {}
    known = fields.get("model") in list(STUDENTS) and fields.get("kd_mode") in KD_MODES
    if not known or fields.get("num_classes") != NUM_CLASSES:
        raise DataError(f"{file} is no checkpoint of this project: name a best_model_*.pth")
    student = STUDENTS[fields["model"]](NUM_CLASSES, pretrained=False)
    load_weights(student, checkpoint.get("model_state_dict"), file)
    return student.eval(), checkpoint


# -------------------------------------------------------------------------------------- the teacher

class Teacher:
    """A frozen network in eval mode: teacher(images) -> {"out", and "low", "mid", "high"}.

    Args:
        network: maps (N, 3, H, W) normalised images to a dict of logits "out" (N, 21, H, W) and, at
            strides 4, 8 and 16 or less, features. A network without them serves response mode.
        size: longest side of its input in px, when it sees whole images.
    """

    def __init__(self, network, name, size, device):
        self.network, self.name, self.size, self.device = network, Path(name).name, size, device
        network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.parameters, self.steps = count_parameters(network), {}
        try:
            outputs = self(torch.zeros(2, 3, 64, 64, device=device))
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # of a fixed size
            raise DataError(f"the teacher {name} cannot run: {first_line(error)}") from error
        self.channels = {key: outputs[key].shape[1] for key in STRIDES if key in outputs}
        if self.channels.get("out") != NUM_CLASSES:
            raise DataError(f"the teacher {name} does not return {NUM_CLASSES} classes as 'out'")
        for key in self.channels.keys() & {*LEVELS}:
            stride = 2 ** round(math.log2(64 / outputs[key].shape[-1]))  # padding may add a value
            self.steps[key], rest = divmod(STRIDES[key], stride)
            if rest:
                raise DataError(f"the teacher {name} has stride {stride} at '{key}': too large")

    @torch.no_grad()
    def __call__(self, images):
        """Features are cut and thinned out to the student's: every second value of stride 8."""
        outputs = dict(self.network(images))
        for key, step in self.steps.items():
            height, width = (-(-side // STRIDES[key] * step) for side in images.shape[-2:])
            outputs[key] = outputs[key][..., :height:step, :width:step]
        return outputs

    def cached_maps(self, images, keys, cache_dir, source):
        """{key: ArrayFile of (C, h, w) float16} for the whole images of a VOCDataset.

        Logits are resized to stride 8. `source`: what tells this teacher from others.
        """

        def maps(key):
            for index in range(len(images)):
                value = self(network_input(images[index][None], self.size, self.device))[key]
                if key == "out":
                    cells = [-(-side // 8) for side in value.shape[-2:]]
                    value = F.interpolate(value, cells, mode="bilinear")  # as in the loss
                yield value[0].half().cpu().numpy()

        arguments = cache_dir, images.items, "float16", (self.name, self.size, source)
        return {key: cached_arrays(f"teacher-{key}", *arguments, maps(key)) for key in keys}


class StudentWithDict(nn.Module):  # with the outputs of a teacher
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, images):
        logits, features = self.student(images, return_features=True)
        return {"out": logits, **features}


def load_teacher(name, weights_file, device):
    """A Teacher: a torchvision segmentation model, with its COCO_WITH_VOC_LABELS_V1 weights or
    those of a file; the .pth of a student; or the .pt2 of torch.export.

    Raises UsageError for an unknown name, DataError for a file that is missing or does not fit.
    """
    if weights_file and name.endswith((".pth", ".pt2")):
        raise UsageError(f"--teacher {name} has its own weights: leave --teacher_weights out")
    if name.endswith(".pth"):
        student, checkpoint = load_student(name)
        network = StudentWithDict(student).eval().to(device)
        return Teacher(network, name, checkpoint.get("eval_size") or TEACHER_SIZE, device)
    if name.endswith(".pt2"):
        return Teacher(load_exported(name, device), name, TEACHER_SIZE, device)
    if name not in (known := models.list_models(models.segmentation)):
        raise UsageError(f"--teacher {name} is no .pth or .pt2 file and none of {known}")
    if weights_file:
        network = models.get_model(name, weights_backbone=None)
        state = read_checkpoint(weights_file)
        for key in ("model", "state_dict"):
            state = state.get(key, state) if isinstance(state, dict) else state
        if isinstance(state, dict):
            state = {str(key).removeprefix("module."): value for key, value in state.items()}
            state = {key: state[key] for key in state if not key.startswith("aux_")}
        load_weights(network, state, weights_file)
    else:
        weights = models.get_model_weights(name).COCO_WITH_VOC_LABELS_V1
        try:
            network = models.get_model(name, weights=weights)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise DataError(f"no weights of {name} in {torch.hub.get_dir()} ({first_line(error)}): "
                            f"delete a damaged file there, or download {weights.url} and name it "
                            "with --teacher_weights") from error  # fmt: skip
    network.eval().aux_classifier = None  # used in training only
    layers = ("layer1", "layer2", "layer4") if "layer4" in network.backbone else ("3", "6", "16")
    nodes = dict(zip([f"backbone.{layer}" for layer in layers], LEVELS))
    nodes[get_graph_node_names(network)[1][-1]] = "out"
    return Teacher(create_feature_extractor(network, nodes).to(device), name, TEACHER_SIZE, device)


def load_exported(file, device):
    """The module of a .pt2 file of torch.export, frozen as it was exported."""
    if not zipfile.is_zipfile(file):
        raise DataError(f"--teacher {file} does not exist or is no file of torch.export.save")
    try:
        return move_to_device_pass(torch.export.load(file), str(device)).module()
    except Exception as error:  # torch.export raises many kinds for a file that is not its own
        raise DataError(f"--teacher {file} cannot be loaded ({first_line(error)})") from error
