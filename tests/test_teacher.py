"""The frozen teacher: torchvision's, a student's file, an exported one; its cache; bad files."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models

import kd_losses
import train
import voc_data
from kd_losses import LEVELS, Teacher, load_student, load_teacher
from voc_data import DataError, UsageError

CPU = torch.device("cpu")
FCN_FILE = "hub/checkpoints/fcn_resnet50_coco-1167a1af.pth"


def save_student(file, seed=5, **changes):
    torch.manual_seed(seed)
    network = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    content = {"model_state_dict": network.state_dict(), "model": "ultracompact", "eval_size": 65,
               "kd_mode": "none", "num_classes": 21, "settings": {}}  # fmt: skip
    torch.save(content | changes, file)
    return file


def images(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


class Strided(nn.Module):
    """Features of 3x3 convolutions of stride 2; its logits are its input's colours."""

    def __init__(self, classes=21, levels=True, average=False):
        super().__init__()
        torch.manual_seed(1)
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(4))
        self.classes, self.levels = classes, LEVELS if levels else ()
        for convolution in self.convolutions if average else ():  # the mean of 3x3 px
            convolution.weight.data = torch.eye(3)[:, :, None, None] * torch.ones(3, 3) / 9
            convolution.bias.data.zero_()

    def forward(self, image):
        features = [image]
        for convolution in self.convolutions:
            features.append(convolution(features[-1]))
        outputs = {"out": image.repeat(1, 7, 1, 1)[:, : self.classes]}
        return outputs | dict(zip(self.levels, features[2:]))


def export(file, network, dynamic=True):
    sizes = ({axis: torch.export.Dim.AUTO for axis in (0, 2, 3)},) if dynamic else None
    images = torch.zeros(2, 3, 64, 96)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=sizes), file)
    return str(file)


def loader_of(items, teacher, folder, *more):
    """The DataLoader that train.py builds, with the teacher's cache in `folder`."""
    flags = ["--kd_mode", "response", "--cache_dir", folder, "--batch_size", 1, "--workers", 0]
    args = train.get_args_parser().parse_args([str(flag) for flag in [*flags, *more]])
    train.check_flags(args)
    return train.build_loader(args, voc_data.VOCDataset(items), teacher, CPU)


@pytest.fixture(scope="module")
def fcn_teacher(fake_torch_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(fake_torch_home))
        return load_teacher("fcn_resnet50", None, CPU)


def test_fcn_gives_layers_1_2_and_4_thinned_to_the_strides(fcn_teacher, fake_torch_home):
    network = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True)
    network.load_state_dict(torch.load(fake_torch_home / FCN_FILE, weights_only=True))
    x = images(1, 3, 65, 97)
    with torch.no_grad():
        expected, body = {"out": network.eval()(x)["out"]}, network.backbone
        y = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        expected["low"] = body.layer1(y)
        expected["mid"] = body.layer2(expected["low"])
        expected["high"] = body.layer4(body.layer3(expected["mid"]))[..., ::2, ::2]  # stride 8
    outputs = fcn_teacher(x)
    sizes = {"out": (21, 65, 97), "low": (256, 17, 25), "mid": (512, 9, 13), "high": (2048, 5, 7)}
    assert {key: tuple(value.shape[1:]) for key, value in outputs.items()} == sizes
    for key, value in expected.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-4, atol=1e-4 * value.abs().max())


def test_teacher_is_frozen_in_eval_mode_and_gives_no_gradients(fcn_teacher, tmp_path):
    for teacher in (fcn_teacher, load_teacher(str(save_student(tmp_path / "a.pth")), None, CPU)):
        assert not any(module.training for module in teacher.network.modules())
        assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
        before = copy.deepcopy(teacher.network.state_dict())
        outputs = teacher(images(2, 3, 65, 65).requires_grad_())
        assert not any(value.requires_grad for value in outputs.values())
        assert all(map(torch.equal, before.values(), teacher.network.state_dict().values()))


def test_mobilenet_teachers_have_features_at_strides_4_8_and_16(tmp_path):
    name = "lraspp_mobilenet_v3_large"
    state = models.get_model(name, weights=None, weights_backbone=None).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    for content in (state, {"model": state}, {"state_dict": wrapped, "epoch": 3}):
        torch.save(content, tmp_path / "weights.pth")
        teacher = load_teacher(name, tmp_path / "weights.pth", CPU)
        outputs, key = teacher(images(1, 3, 64, 64)), "classifier.high_classifier.weight"
        assert [outputs[level].shape[-1] for level in LEVELS] == [16, 8, 4]
        assert torch.equal(teacher.network.state_dict()[key], state[key])


def test_student_teaches_at_its_own_size_with_its_features(tmp_path):
    file = save_student(tmp_path / "student.pth", eval_size=160)
    teacher, (student, _) = load_teacher(str(file), None, CPU), load_student(file)
    with torch.no_grad():
        logits, features = student(images(2, 3, 65, 65), return_features=True)
    outputs = teacher(images(2, 3, 65, 65))
    assert teacher.size == 160 and outputs.keys() == {"out", *LEVELS}
    torch.testing.assert_close(outputs, {"out": logits, **features})
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(images(1, 3, 65, 65))["out"].dtype == torch.bfloat16
    content = torch.load(file, weights_only=True)
    torch.save({key: content[key] for key in content.keys() - {"eval_size"}}, file)
    assert load_teacher(str(file), None, CPU).size == kd_losses.TEACHER_SIZE
    with pytest.raises(UsageError, match="--teacher_weights"):
        load_teacher(str(file), file, CPU)
    content["model_state_dict"]["classifier.1.bias"] *= torch.nan
    torch.save(content, file)
    with pytest.raises(DataError, match="student.pth.*classifier.1.bias"):
        load_teacher(str(file), None, CPU)


def test_exported_teacher_gives_what_the_network_gave(tmp_path):
    network = Strided()
    teacher = load_teacher(export(tmp_path / "teacher.pt2", network), None, CPU)
    assert teacher.channels == {"out": 21, "low": 3, "mid": 3, "high": 3}
    assert teacher.parameters == sum(p.numel() for p in network.parameters())
    for x in (images(2, 3, 65, 65), images(1, 3, 97, 64)):
        torch.testing.assert_close(teacher(x), network(x))


def test_features_have_the_sizes_of_the_student():
    """Of a teacher that pads more than the student, and returns things of its own."""

    class Padded(Strided):
        def forward(self, image):
            outputs = super().forward(image)
            padded = {level: F.pad(outputs[level], (0, 1, 0, 1)) for level in LEVELS}
            return outputs | padded | {"aux": None}

    student = kd_losses.STUDENTS["ultracompact"](pretrained=False).eval()
    for teacher in (Teacher(Padded(), "padded.pt2", 65, CPU), Teacher(Strided(), "a", 65, CPU)):
        for x in (images(1, 3, 64, 96), images(1, 3, 90, 50)):
            both = student(x, return_features=True)[1], teacher(x)
            shapes = [[features[level].shape[2:] for level in LEVELS] for features in both]
            assert shapes[0] == shapes[1]


def test_teachers_that_cannot_teach_are_refused(tiny_voc, tmp_path):
    with pytest.raises(DataError, match="21 classes"):
        Teacher(Strided(classes=5), "five.pt2", 65, CPU)
    swapped = Strided()
    swapped.levels = ("mid", "low", "high")
    with pytest.raises(DataError, match="swapped.pt2 has stride 8 at 'low'"):
        Teacher(swapped, "swapped.pt2", 65, CPU)
    teacher = Teacher(Strided(levels=False), "logits.pt2", 65, CPU)
    items = voc_data.list_items(tiny_voc, "val")
    with pytest.raises(UsageError, match="logits.pt2 has no features.*mid"):
        loader_of(items, teacher, tmp_path, "--kd_mode", "feature", "--kd_levels", "mid")
    export(tmp_path / "fixed.pt2", Strided(), dynamic=False)  # for 64 x 96 px alone
    (tmp_path / "text.pt2").write_text("no file of torch.export")
    for name in ("text.pt2", "absent.pt2", "absent.pth", "fixed.pt2"):
        with pytest.raises(DataError, match=name):
            load_teacher(str(tmp_path / name), None, CPU)


def test_cached_maps_are_what_the_teacher_says_of_the_whole_image(tiny_voc, tmp_path):
    teacher = load_teacher(str(save_student(tmp_path / "a.pth")), None, CPU)
    items = voc_data.list_items(tiny_voc, "val")[:3]
    maps = teacher.cached_maps(voc_data.VOCDataset(items), ["out", *LEVELS], tmp_path, "any")
    for index, item in enumerate(items):
        image = torch.from_numpy(voc_data.read_image(item.image)).permute(2, 0, 1)
        size = [round(side * 65 / max(image.shape)) for side in image.shape[1:]]
        live = teacher(voc_data.normalise(voc_data.TF.resize(image, size)[None]))
        size = [-(-side // 8) for side in size]
        live["out"] = F.interpolate(live["out"], size, mode="bilinear")
        for key, value in live.items():
            assert np.array_equal(maps[key][index], value[0].half()), key


def test_cache_is_made_once_and_anew_for_another_file_of_one_name(tiny_voc, tmp_path, monkeypatch):
    """Other weights under the same path have the same number of bytes."""
    asked, call, file = [], Teacher.__call__, tmp_path / "teacher.pth"
    monkeypatch.setattr(Teacher, "__call__", lambda *args: asked.append(1) or call(*args))
    items, samples = voc_data.list_items(tiny_voc, "val"), []
    for seed, questions in ((1, 8), (1, 0), (2, 8)):
        if questions:
            save_student(file, seed)
        teacher = load_teacher(str(file), None, CPU)
        asked.clear()
        loader = loader_of(items, teacher, tmp_path / "cache", "--teacher", file)
        assert len(asked) == questions
        samples.append(loader.dataset[0, 0]["out"])
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def one_item(folder, pixels):
    files = folder / "image.png", folder / "mask.png"
    for file, array in zip(files, (pixels, np.ones_like(pixels[..., 0]))):
        Image.fromarray(array).save(file)
    return [voc_data.Item("a", *files)]


@pytest.mark.parametrize("shape", [(65, 97, 3), (97, 65, 3)])
def test_cached_and_live_features_agree_where_the_strides_meet(shape, tmp_path):
    """Crops of 65 px, unscaled, from multiples of 16 px on, as they are and mirrored."""
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    items, (network, mirrored) = one_item(tmp_path, pixels), (Strided(), Strided())
    flags = ["--kd_mode", "feature", "--kd_levels", *LEVELS, "--crop_size", 65, "--eval_size", 97]
    flags, teacher = [*flags, "--scale", 1, 1], Teacher(network, "strided", 97, CPU)
    dataset = loader_of(items, teacher, tmp_path, *flags).dataset
    for convolution in mirrored.convolutions:
        convolution.weight.data = convolution.weight.data.flip(-1)
    found, windows = set(), {}
    for start in (0, 16, 32):
        crop = pixels[start : start + 65] if shape[0] > 65 else pixels[:, start : start + 65]
        windows |= {crop.tobytes(): network, crop[:, ::-1].tobytes(): mirrored}
    for seed in range(500):
        sample = dataset[0, seed]
        crop = sample["image"].permute(1, 2, 0).numpy().tobytes()
        if crop in windows:
            found.add(crop)
            live = windows[crop](voc_data.normalise(sample["image"][None]))
            for level in LEVELS:  # but for the border, which has other pixels around it
                kept, seen = (values[..., 1:-1, 1:-1] for values in (sample[level], live[level][0]))
                torch.testing.assert_close(kept.float(), seen, rtol=2e-3, atol=2e-3)
    assert len(found) == 6


@pytest.mark.parametrize("crop", [64, 65])
@pytest.mark.parametrize("mode, keys", [("response", 1), ("feature", 3)])
def test_cached_and_live_maps_lie_at_the_same_places_at_any_scale(crop, mode, keys, tmp_path):
    """The image is a ramp, one grey level a pixel: a mean of it says where it was taken."""
    y, x = np.mgrid[:194, :194]
    items = one_item(tmp_path, np.stack([y, x, 0 * x], axis=-1).astype(np.uint8))
    teacher = Teacher(Strided(average=True), "mean", 130, CPU)
    flags = ["--kd_mode", mode, "--kd_levels", *LEVELS, "--crop_size", crop, "--eval_size", 160]
    dataset = loader_of(items, teacher, tmp_path, *flags).dataset
    for seed in range(12):
        sample = dataset[0, seed]
        live = teacher(voc_data.normalise(sample["image"][None]))
        assert len(sample.keys() & live.keys()) == keys
        for key in sample.keys() & live.keys():
            kept, seen = sample[key][None, :2].float(), live[key][:, :2]
            seen = F.interpolate(seen, kept.shape[-2:], mode="bilinear")
            off = 255 * 0.226 * (kept - seen)[0, :, 1:-1, 1:-1].abs()  # in px of the image
            assert off.flatten(1).median(dim=1).values.max() < 0.5, (key, seed)
