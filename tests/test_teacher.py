"""The teacher: frozen, with real features, from torchvision, a checkpoint or a .pt2 file."""

import io
import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import kd_losses
import voc_data
from conftest import FCN_FILE
from kd_losses import LEVELS, load_student, load_teacher
from voc_data import DataError, UsageError


def save_student(path, name="standard", num_classes=21, **changes):
    """The checkpoint of a student with random weights; BatchNorm statistics too."""
    torch.manual_seed(5)
    student = kd_losses.STUDENTS[name](num_classes, pretrained=False)
    for key, value in student.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape))
    content = {
        "model_state_dict": student.state_dict(), "model": name, "kd_mode": "none",
        "num_classes": num_classes, "eval_size": 0, "miou": 0.5, "parameters": 1, "settings": {},
    }  # fmt: skip
    torch.save(content | changes, path)
    return path


@pytest.fixture(scope="module")
def student_file(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student") / "best_model_standard_none.pth")


@pytest.fixture(scope="module")
def fcn(fake_torch_home):
    """The random FCN-ResNet50 of the fake cache, with its auxiliary head, in eval mode."""
    network = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True)
    file = fake_torch_home / "hub" / "checkpoints" / FCN_FILE
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def fcn_teacher(fake_torch_home):
    return load_teacher("fcn_resnet50", fake_torch_home / "hub" / "checkpoints" / FCN_FILE)


def images(size=(2, 3, 65, 65)):
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def network_of(teacher):
    return teacher._network[0]


# ----------------------------------------------------------------------------- it never changes


@pytest.fixture(params=["student", "fcn"])
def teacher(request, student_file):
    if request.param == "fcn":
        return request.getfixturevalue("fcn_teacher")
    return load_teacher(student_file)


def test_teacher_never_changes_and_never_gets_gradients(teacher):
    """A step of training against it, with everything asked to train, leaves each tensor alone."""
    network = network_of(teacher)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    adapters = kd_losses.make_adapters({"high": 3}, {"high": teacher.channels["high"]})
    both = nn.ModuleDict({"teacher": teacher, "adapters": adapters})
    both.train().requires_grad_(True)
    pictures = images().requires_grad_()
    for _ in range(2):
        taught = teacher(pictures)
        assert not any(value.requires_grad for value in taught.values())
        mine = {"high": adapters["high"](F.adaptive_avg_pool2d(pictures, 5))}
        kd_losses.feature_based_kd_loss(mine, taught).backward()
    assert adapters["high"].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert any(key.endswith("running_mean") for key in before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_teacher_stays_in_eval_mode_whatever_is_asked(teacher):
    expected = teacher(images())
    nn.Sequential(teacher).train()
    teacher.train(True)
    assert not any(module.training for module in network_of(teacher).modules())
    again = teacher(images())
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_teacher_has_nothing_to_train_or_to_save(teacher):
    assert list(teacher.parameters()) == [] and teacher.state_dict() == {}
    assert teacher.parameter_count == sum(p.numel() for p in network_of(teacher).parameters()) > 0


# ------------------------------------------------------------------------------- its four kinds


def test_student_checkpoint_teaches_with_its_logits_and_features(student_file):
    student, _ = load_student(student_file)
    with torch.no_grad():
        logits, features = student(images(), return_features=True)
    teacher = load_teacher(student_file)
    out = teacher(images())
    assert torch.equal(out["out"], logits)
    assert list(out) == ["out", *LEVELS]
    assert all(torch.equal(out[level], features[level]) for level in LEVELS)
    assert teacher.channels == {"out": 21} | {k: v.shape[1] for k, v in features.items()}
    teacher.require(LEVELS)


class Exported(nn.Module):
    """A small network with the output that a .pt2 teacher must have."""

    def __init__(self, classes=21, levels=True, cast=False):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 5, 4, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.mid, self.high = nn.Conv2d(6, 7, 3, 2, 1), nn.Conv2d(7, 8, 3, 2, 1)
        self.head, self.levels, self.cast = nn.Conv2d(8, classes, 1), levels, cast

    def forward(self, image):
        low = self.low(image)
        low = low.float() if self.cast else low
        mid = self.mid(low)
        high = self.high(mid)
        out = {"out": F.interpolate(self.head(high), size=image.shape[-2:], mode="bilinear")}
        return out | {"low": low, "mid": mid, "high": high} if self.levels else out


def export(folder, any_size=True, **options):
    """Save an `Exported` as .pt2, for any batch and size; returns the network and the path."""
    torch.manual_seed(1)
    network = Exported(**options).eval()
    anything = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    shapes = (anything,) if any_size else None
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=shapes)
    torch.export.save(program, folder / "teacher.pt2")
    return network, folder / "teacher.pt2"


def test_exported_teacher_gives_what_the_network_gave(tmp_path):
    network, file = export(tmp_path)
    before = file.read_bytes()
    teacher = load_teacher(file)
    teacher.train()
    for size in ((2, 3, 65, 65), (4, 3, 97, 64), (1, 3, 64, 80)):
        with torch.no_grad():
            expected = network(images(size))
        out = teacher(images(size))
        assert list(out) == ["out", *LEVELS]
        assert all(torch.allclose(out[key], expected[key], atol=1e-5) for key in out)
    assert teacher.channels == {"out": 21, "low": 6, "mid": 7, "high": 8}
    assert teacher.parameter_count == sum(p.numel() for p in network.parameters())
    teacher.require(LEVELS)
    assert file.read_bytes() == before


def test_exported_teacher_keeps_its_precision_under_autocast(tmp_path):
    """A `.float()` in it is exported with a check that its input is float32."""
    network, file = export(tmp_path, cast=True)
    teacher = load_teacher(file)
    with torch.autocast("cpu", torch.bfloat16):
        out = teacher(images())["out"]
    with torch.no_grad():
        assert torch.allclose(out, network(images())["out"], atol=1e-5)


def test_teacher_knows_the_size_it_was_made_for(tmp_path):
    student = save_student(tmp_path / "student.pth", "ultracompact")
    content = torch.load(student, weights_only=True)
    for size in (0, 320):
        torch.save(content | {"eval_size": size}, student)
        assert kd_losses.size_made_for(student) == size
    assert kd_losses.size_made_for("fcn_resnet50") == 513
    assert kd_losses.size_made_for(tmp_path / "teacher.pt2") == 513
    torch.save(content | {"eval_size": -1}, student)
    with pytest.raises(DataError, match="names -1 as the longest side"):
        load_teacher(student)


def test_exported_teacher_without_features_is_refused_for_feature_mode_alone(tmp_path):
    network, file = export(tmp_path, levels=False)
    teacher = load_teacher(file)
    with torch.no_grad():
        assert torch.allclose(teacher(images())["out"], network(images())["out"], atol=1e-5)
    with pytest.raises(DataError, match="teacher.pt2 has no features mid, high"):
        teacher.require(["mid", "high"])


def test_exported_teacher_with_other_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="gives 5 classes; VOC has 21"):
        load_teacher(export(tmp_path, classes=5)[1])


def test_teacher_exported_for_one_size_is_refused_with_the_way_to_export_it(tmp_path):
    with pytest.raises(DataError, match="teacher.pt2 does not take .* with dynamic_shapes"):
        load_teacher(export(tmp_path, any_size=False)[1])


def test_student_checkpoint_with_other_classes_is_refused(tmp_path):
    path = save_student(tmp_path / "five.pth", "ultracompact", num_classes=5)
    with pytest.raises(DataError, match="gives 5 classes; VOC has 21"):
        load_teacher(path)


def test_exported_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_teacher(tmp_path / "absent.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="broken.pt2 is not a file of torch.export"):
        load_teacher(tmp_path / "broken.pt2")


def assert_same_as_fcn(teacher, fcn):
    """Logits and taps are those of the network itself, taps being layer1, layer2 and layer4."""
    seen = {}
    names = {"low": "layer1", "mid": "layer2", "high": "layer4"}
    hooks = [
        fcn.backbone[name].register_forward_hook(
            lambda module, inputs, output, level=level: seen.update({level: output})
        )
        for level, name in names.items()
    ]
    with torch.no_grad():
        seen["out"] = fcn(images())["out"]
    for hook in hooks:
        hook.remove()
    out = teacher(images())
    assert list(out) == ["out", *LEVELS]
    for key, value in seen.items():
        assert torch.allclose(out[key], value, rtol=1e-4, atol=1e-4 * value.abs().max()), key
    assert teacher.channels == {"out": 21, "low": 256, "mid": 512, "high": 2048}
    assert out["low"].shape[-1] == 17 and out["mid"].shape[-1] == out["high"].shape[-1] == 9


def test_torchvision_teacher_with_weights_from_a_file_taps_layers_1_2_and_4(fcn_teacher, fcn):
    assert_same_as_fcn(fcn_teacher, fcn)
    fcn_teacher.require(LEVELS)
    assert "fcn_resnet50" in fcn_teacher.name and FCN_FILE in fcn_teacher.name


def test_default_teacher_is_fcn_resnet50_from_the_torchvision_cache(
    fcn, fake_torch_home, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    teacher = load_teacher()
    assert teacher.name == "fcn_resnet50"
    assert_same_as_fcn(teacher, fcn)


def test_features_without_logits_are_the_same_features(fcn_teacher):
    whole, part = fcn_teacher(images()), fcn_teacher(images(), logits=False)
    assert list(part) == list(LEVELS)
    assert all(torch.equal(part[level], whole[level]) for level in LEVELS)


def test_mobilenet_backbones_of_torchvision_have_taps_at_three_depths(tmp_path):
    name = "lraspp_mobilenet_v3_large"
    network = models.get_model(name, weights=None, weights_backbone=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher(name, tmp_path / "weights.pth")
    out = teacher(images((1, 3, 64, 64)))
    assert list(out) == ["out", *LEVELS]
    assert [out[level].shape[-1] for level in LEVELS] == [16, 8, 4]


def test_teacher_that_cannot_be_downloaded_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def no_route(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    with pytest.raises(OSError) as caught:
        load_teacher()
    message = str(caught.value)
    assert "no route to host" in message and "--teacher_weights" in message
    assert f"download.pytorch.org/models/{FCN_FILE}" in message


def test_unknown_teacher_is_refused_with_the_known_names():
    with pytest.raises(UsageError, match="resnet18.*deeplabv3_resnet101.*fcn_resnet50"):
        load_teacher("resnet18")


@pytest.mark.parametrize("content", [
    {"weight": torch.zeros(3)}, {"model": {"weight": torch.zeros(3)}}, {1: torch.zeros(3)},
    torch.zeros(3), [1, 2], {"backbone.conv1.weight": 5},
])  # fmt: skip
def test_teacher_weights_that_do_not_fit_are_an_error(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(DataError, match="weights.pth"):
        load_teacher("lraspp_mobilenet_v3_large", tmp_path / "weights.pth")


def test_teacher_weights_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(DataError, match="absent.pth does not exist"):
        load_teacher("lraspp_mobilenet_v3_large", tmp_path / "absent.pth")


# ------------------------------------------------------------------------------ teacher's cache


@pytest.fixture(scope="module")
def items(tiny_voc):
    return voc_data.list_items(tiny_voc, "val")[:4]


def cache(teacher, items, folder, keys=("out", *LEVELS), pixels=None, size=96, identity=""):
    return kd_losses.teacher_cache(teacher, items, pixels, folder, size, keys, "cpu", identity)


@pytest.mark.parametrize("longest", [96, 97, 0])  # a multiple of the strides, one more; its own
def test_teacher_cache_is_what_the_teacher_says_of_the_whole_image(
    student_file, items, longest, tmp_path
):
    teacher = load_teacher(student_file)
    kept = cache(teacher, items, tmp_path, size=longest)
    cells_of_crops = {key: cell for key, (_, cell) in kept.items()}
    assert cells_of_crops == {"out": 4, "low": 4, "mid": 8, "high": 16}
    for index, item in enumerate(items):
        image = torch.from_numpy(voc_data.read_item(item)[0]).permute(2, 0, 1)
        factor = longest / max(image.shape) if longest else 1
        size = [round(side * factor) for side in image.shape[1:]]
        image = voc_data.TF.resize(image, size, antialias=True)
        live = teacher(voc_data.normalise(image[None]))
        cells = [math.ceil(side / 8) for side in size]
        live["out"] = F.adaptive_avg_pool2d(live["out"], cells)  # features are kept as they are
        for key, value in live.items():
            store = kept[key][0][index]
            assert store.dtype == np.float16 and store.shape == value.shape[1:]
            assert np.array_equal(store, value[0].half().numpy()), key


def test_teacher_cache_is_asked_once_and_again_for_another_teacher_or_size(
    student_file, items, tmp_path, monkeypatch
):
    teacher = load_teacher(student_file)
    first = cache(teacher, items, tmp_path, ["high"])["high"][0]
    calls = []
    forward = type(teacher).forward
    monkeypatch.setattr(
        type(teacher), "forward", lambda s, *a, **k: calls.append(1) or forward(s, *a, **k)
    )
    again = cache(teacher, items, tmp_path, ["high"])["high"][0]
    assert calls == [] and again.path == first.path
    cache(teacher, items, tmp_path, ["high"], size=64)
    assert len(calls) == len(items)
    cache(teacher, items, tmp_path, ["high"], identity="another file")
    cache(teacher, items[:3], tmp_path, ["high"])
    cache(teacher, items, tmp_path, ["mid"])
    assert len(calls) == 4 * len(items) - 1


def test_teacher_cache_is_the_same_from_cached_pixels(student_file, items, tmp_path):
    teacher = load_teacher(student_file)
    decoded = cache(teacher, items, tmp_path / "a", ["out"])["out"][0]
    pixels = voc_data.pixel_cache(items, tmp_path / "b")
    kept = cache(teacher, items, tmp_path / "b", ["out"], pixels)["out"][0]
    assert all(np.array_equal(decoded[i], kept[i]) for i in range(len(items)))


def test_crop_of_the_cache_is_near_what_the_teacher_says_of_the_crop(tmp_path):
    """The whole way, through a teacher whose logits are the colours around each pixel."""

    class Colours(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, image):
            return {"out": image.repeat(1, 7, 1, 1) * self.one}

    height, width = 160, 200
    y, x = np.mgrid[:height, :width]
    picture = np.stack([y, x, 255 - x], axis=-1).astype(np.uint8)
    voc_data.Image.fromarray(picture).save(tmp_path / "a.png")
    teacher = kd_losses.Teacher(Colours(), "colours")
    items = [voc_data.Item("a", tmp_path / "a.png", None)]
    maps = cache(teacher, items, tmp_path, ["out"], size=200)
    data = voc_data.VOCDataset(items, voc_data.train_transform(64, (0.8, 1.5)), teacher_maps=maps)
    compared = 0
    for seed in range(8):
        sample = data[0, seed]
        live = teacher(voc_data.normalise(sample["image"][None]))["out"]
        live = F.avg_pool2d(live, 4)[0]
        shown = sample["mask"][2::4, 2::4] != voc_data.VOID
        off = (sample["out"].float() - live).abs()[:, shown]
        assert off.quantile(0.98) < 0.15  # 8 grey levels, of the 160 to 255 that the ramps span
        compared += off.shape[1]
    assert compared > 1000


# ------------------------------------------------------------------------ a student from its file


def test_student_is_rebuilt_in_eval_mode_with_every_weight(tmp_path):
    path = save_student(tmp_path / "six.pth", "ultracompact", num_classes=6)
    student, checkpoint = load_student(path)
    assert type(student) is kd_losses.STUDENTS["ultracompact"] and not student.training
    assert checkpoint["num_classes"] == 6 and student(images()).shape == (2, 6, 65, 65)
    state = student.state_dict()
    assert state.keys() == checkpoint["model_state_dict"].keys()
    assert all(torch.equal(state[k], v) for k, v in checkpoint["model_state_dict"].items())


def test_student_file_that_is_missing_cut_off_or_no_checkpoint_is_an_error(student_file, tmp_path):
    with pytest.raises(DataError, match="absent.pth does not exist"):
        load_student(tmp_path / "absent.pth")
    whole = student_file.read_bytes()
    for name, content in (
        ("cut.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("text.pth", b"hello there"),
        ("zip.pth", b"PK\x03\x04" + b"\0" * 100), ("folder.pth", None),
    ):  # fmt: skip
        path = tmp_path / name
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_student(path)


@pytest.mark.parametrize("content", [
    {}, [1, 2], torch.zeros(3), {"model": "ultracompact"}, {"model": "vgg", "model_state_dict": {}},
    {"model_state_dict": {}},
    {"model": {"classifier.weight": torch.zeros(3)}},  # torchvision's references save this way
])  # fmt: skip
def test_file_of_another_project_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(DataError, match="other.pth is not a checkpoint of this project"):
        load_student(tmp_path / "other.pth")


@pytest.mark.parametrize("changes", [
    {"model": "ultracompact"}, {"num_classes": 20}, {"model_state_dict": {}},
    {"model_state_dict": [1]}, {"model_state_dict": {"classifier.1.bias": "text"}},
])  # fmt: skip
def test_checkpoint_that_does_not_fit_its_model_is_an_error(tmp_path, changes):
    path = save_student(tmp_path / "misfit.pth")
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(DataError, match="misfit.pth does not fit"):
        load_student(path)


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_code_inside_a_checkpoint_is_never_executed(tmp_path):
    marker, buffer = tmp_path / "executed", io.BytesIO()
    torch.save({"model": Malicious(marker)}, buffer)
    (tmp_path / "evil.pth").write_bytes(buffer.getvalue())
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert marker.exists()  # it does work, where it is let
    marker.unlink()
    for load in (load_student, load_teacher, kd_losses.read_checkpoint):
        with pytest.raises(DataError, match="evil.pth.*never executed"):
            load(tmp_path / "evil.pth")
    assert not marker.exists()


def test_weights_for_a_teacher_that_is_a_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--teacher_weights is for a name"):
        kd_losses.load_teacher(tmp_path / "teacher.pth", tmp_path / "weights.pth")


def test_teacher_cache_without_room_is_an_error_that_says_what_to_do(
    student_file, items, tmp_path, monkeypatch
):
    """Not a silent change to a live teacher, which sees crops and says other things."""
    monkeypatch.setattr(kd_losses, "has_room", lambda *_: False)
    with pytest.raises(DataError, match="--teacher_cache none"):
        cache(load_teacher(student_file), items, tmp_path, ["out"], size=65)
