"""The two students: size, contracts, ImageNet weights, and their files run as scripts."""

import copy
import re
import runpy
from urllib.error import URLError

import pytest
import torch

import kd_losses
import voc_data
from conftest import MOBILENET_FILE, ROOT
from model_standard import StandardSegmentationModel
from model_ultracompact import UltraCompactSegmentationModel

STUDENTS = {
    "ultracompact": (UltraCompactSegmentationModel, 250_000),
    "standard": (StandardSegmentationModel, 1_750_000),
}
SIZES = [(33, 33), (33, 50), (65, 65), (97, 131), (256, 256), (34, 300)]


@pytest.fixture(scope="module", params=STUDENTS)
def student(request):
    """A student with random weights, in eval mode."""
    torch.manual_seed(0)
    return STUDENTS[request.param][0](pretrained=False).eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_parameters_stay_under_the_ceiling(name):
    model, ceiling = STUDENTS[name]
    student = model(pretrained=False)
    assert sum(p.numel() for p in student.parameters()) <= ceiling
    assert all(p.requires_grad for p in student.parameters())


def test_names_of_the_students_are_those_of_the_flags():
    assert kd_losses.STUDENTS == {name: model for name, (model, _) in STUDENTS.items()}


@pytest.mark.parametrize("height, width", SIZES)
def test_logits_have_the_size_of_the_image_and_features_their_strides(student, height, width):
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, features = student(image, return_features=True)
        assert torch.equal(student(image), logits)
    assert logits.shape == (2, 21, height, width) and logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert list(features) == ["low", "mid", "high"]
    for feature, stride in zip(features.values(), (4, 8, 16)):
        assert feature.shape[-2:] == (-(-height // stride), -(-width // stride))


def test_features_have_the_channels_that_the_adapters_ask_for(student):
    with torch.no_grad():
        features = student(torch.zeros(1, 3, 64, 64), return_features=True)[1]
    channels = {level: feature.shape[1] for level, feature in features.items()}
    assert kd_losses.feature_channels(student) == channels
    adapters = kd_losses.make_adapters(channels, {"mid": 512, "high": 2048})
    assert list(adapters) == ["mid", "high"]
    assert adapters["high"](features["high"]).shape == (1, 2048, 4, 4)


@pytest.mark.parametrize("training", [True, False])
def test_asking_for_the_channels_leaves_the_student_as_it_was(student, training):
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student.train(training)
    kd_losses.feature_channels(student)
    assert all(module.training is training for module in student.modules())
    student.eval()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_output_size_replaces_the_size_of_the_image(student):
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert student(image, output_size=(17, 25)).shape == (1, 21, 17, 25)
        logits, features = student(image, return_features=True, output_size=(130, 70))
    assert logits.shape == (1, 21, 130, 70)
    assert features["low"].shape[-2:] == (17, 25)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("size", [33, 65])
def test_batch_of_one_trains(name, size):
    torch.manual_seed(0)
    student = STUDENTS[name][0](num_classes=4, pretrained=False).train()
    logits = student(torch.randn(1, 3, size, size))
    assert logits.shape == (1, 4, size, size)
    logits.square().mean().backward()
    unused = [key for key, p in student.named_parameters() if p.grad is None]
    assert unused == []
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_image_pooling_brings_the_whole_map_to_every_cell(student):
    """One corner of the ASPP's output depends on the opposite corner, out of reach of its rates."""
    first = next(m for m in student.aspp.modules() if isinstance(m, torch.nn.Conv2d))
    x = torch.randn(1, first.in_channels, 48, 48, requires_grad=True)
    student.aspp(x)[0, :, 0, 0].sum().backward()
    assert x.grad[..., -1, -1].abs().max() > 0
    student.zero_grad()


def test_folding_the_norms_keeps_the_outputs(student):
    student = copy.deepcopy(student)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        before = student(image)
        after = voc_data.fold_batch_norm(student)(image)
    left = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) <= 1, "in one ASPP an addition lies between norm and convolution"
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_dropout_acts_in_training_alone(student):
    image = torch.randn(2, 3, 65, 65)
    kinds = [m for m in student.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    assert kinds and all(module.p > 0 for module in kinds)
    with torch.no_grad():
        assert torch.equal(student(image), student(image))
        for module in kinds:
            module.train()
        assert not torch.equal(student(image), student(image))
    student.eval()


# ------------------------------------------------------------------------------ ImageNet weights


@pytest.mark.parametrize("name", STUDENTS)
def test_every_backbone_tensor_is_loaded_from_the_imagenet_file(name, fake_torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    file = fake_torch_home / "hub" / "checkpoints" / MOBILENET_FILE
    weights = torch.load(file, weights_only=True)
    loaded = set()
    for key, value in STUDENTS[name][0](pretrained=True).backbone.state_dict().items():
        source = "features." + key.split(".", 1)[1]  # to_low.0.0.weight -> features.0.0.weight
        assert torch.equal(value, weights[source]), key
        loaded.add(source)
    # The first blocks without a gap, each with all its tensors.
    blocks = {int(key.split(".")[1]) for key in loaded}
    assert blocks == set(range(max(blocks) + 1))
    wanted = {k for k in weights if k.startswith("features.") and int(k.split(".")[1]) in blocks}
    assert loaded == wanted and len(loaded) > 100


@pytest.mark.parametrize("name", STUDENTS)
def test_imagenet_weights_are_the_default_and_random_ones_are_not(
    name, fake_torch_home, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    first = next(STUDENTS[name][0]().parameters())
    assert torch.equal(first, next(STUDENTS[name][0](pretrained=True).parameters()))
    assert not torch.equal(first, next(STUDENTS[name][0](pretrained=False).parameters()))


@pytest.mark.parametrize("name", STUDENTS)
def test_unreachable_imagenet_weights_are_an_error_that_says_what_to_do(
    name, tmp_path, monkeypatch
):
    def no_route(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    with pytest.raises(OSError) as caught:
        STUDENTS[name][0](pretrained=True)
    message = str(caught.value)
    assert "no route to host" in message and str(tmp_path) in message
    assert f"download.pytorch.org/models/{MOBILENET_FILE}" in message
    assert "--no_pretrained" in message


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("content", [b"", b"not a file of weights", "cut off"])
def test_damaged_imagenet_weights_are_an_error_and_no_random_start(
    name, content, fake_torch_home, tmp_path, monkeypatch
):
    if content == "cut off":
        content = (fake_torch_home / "hub" / "checkpoints" / MOBILENET_FILE).read_bytes()[:100_000]
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / MOBILENET_FILE).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="--no_pretrained"):
        STUDENTS[name][0](pretrained=True)


# --------------------------------------------------------------------------------- as a script


@pytest.mark.parametrize("name", STUDENTS)
def test_model_file_run_as_a_script_prints_shapes_parts_and_macs(name, capsys):
    runpy.run_path(str(ROOT / f"model_{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    student = STUDENTS[name][0](pretrained=False)
    assert "(1, 3, 256, 256)" in out and "(1, 21, 256, 256)" in out
    for level, cells in (("low", 64), ("mid", 32), ("high", 16)):
        assert re.search(rf"{level} +\(1, \d+, {cells}, {cells}\)", out)
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 3
    }
    for part, module in student.named_children():
        parameters = sum(p.numel() for p in module.parameters())
        assert rows[part][0] == f"{parameters:,}"
        assert float(rows[part][1]) > 0
    cost = voc_data.measure_cost(student, "cpu", size=256, repeats=1)
    assert rows["total"][0] == f"{cost['parameters']:,}"
    assert float(rows["total"][1]) == pytest.approx(cost["macs"] / 1e6, abs=0.06)
    parts = sum(float(rows[part][1]) for part, _ in student.named_children())
    assert parts == pytest.approx(float(rows["total"][1]), abs=0.3)


def test_macs_are_multiply_accumulates_counted_by_hand():
    network = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    cost = voc_data.measure_cost(network, "cpu", size=64, repeats=1)
    assert cost["macs"] == 8 * 32 * 32 * 3 * 9
    assert cost["parameters"] == 8 * 3 * 9
    assert cost["latency_ms"] > 0 and cost["fps"] == pytest.approx(1000 / cost["latency_ms"])
