"""The two students: size, shapes, ImageNet weights, the shipped checkpoints, run as scripts."""

import re
import runpy
from unittest import mock
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from kd_losses import KD_MODES, STUDENTS, load_student

PARAMETERS = {"ultracompact": 223_101, "standard": 1_038_429}
MOBILENET = "mobilenet_v3_small-047dcff4.pth"
both = pytest.mark.parametrize("name", STUDENTS)


@both
@pytest.mark.parametrize("size", [(33, 33), (33, 50), (65, 97), (128, 128), (34, 300)])
def test_logits_have_the_size_of_the_image_and_features_their_strides(name, size):
    student = STUDENTS[name](pretrained=False).eval()
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, features = student(image, return_features=True)
        small, same_features = student(image, return_features=True, upsample=False)
        assert torch.equal(student(image), logits)
    assert logits.shape == (2, 21, *size) and logits.dtype == torch.float32
    assert small.shape == (2, 21, *(-(-side // 4) for side in size)) and small.std() > 0
    assert torch.equal(F.interpolate(small, size=size, mode="bilinear"), logits)
    assert list(features) == ["low", "mid", "high"] == list(student.feature_channels)
    for (level, value), stride in zip(features.items(), (4, 8, 16)):
        grid = [-(-side // stride) for side in size]
        assert value.shape == (2, student.feature_channels[level], *grid)
        assert torch.equal(value, same_features[level])


@both
def test_batch_of_one_trains_every_weight_and_dropout_acts_in_training_alone(name):
    model, image = STUDENTS[name](pretrained=False).train(), torch.randn(1, 3, 33, 65)
    model(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    dropout = model.eval().classifier[0]
    assert isinstance(dropout, torch.nn.Dropout2d) and torch.equal(model(image), model(image))
    dropout.train()
    assert not torch.equal(model(image), model(image))


@both
def test_backbone_is_loaded_whole_from_the_imagenet_file(name, fake_torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    weights = torch.load(fake_torch_home / "hub/checkpoints" / MOBILENET)
    loaded = {"features." + key.split(".", 1)[1]: value  # to_low.0.0.weight -> features.0.0.weight
              for key, value in STUDENTS[name]().backbone.state_dict().items()}  # fmt: skip
    blocks = [f"features.{number}." for number in range({"ultracompact": 9, "standard": 12}[name])]
    assert {*loaded} == {key for key in weights if key.startswith(tuple(blocks))}
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    random = next(STUDENTS[name](pretrained=False).parameters())
    assert not torch.equal(random, weights["features.0.0.weight"])


@both
@pytest.mark.parametrize("content", [None, b"<html>no weights</html>", b""])
def test_missing_or_damaged_weights_say_what_to_do(
    name, content, fake_torch_home, tmp_path, monkeypatch
):
    no_route = mock.Mock(side_effect=URLError("no route to host"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    if content is not None:
        folder.mkdir(parents=True)
        whole = (fake_torch_home / "hub/checkpoints" / MOBILENET).read_bytes()
        (folder / MOBILENET).write_bytes(content or whole[:100_000])
    with pytest.raises(OSError, match=rf"{folder}.*/models/{MOBILENET}.*--no_pretrained"):
        STUDENTS[name]()


def test_shipped_checkpoints_load_and_say_what_they_are():
    files = sorted((ROOT / "checkpoints").rglob("best_model_*.pth"))
    for file in files:
        model, checkpoint = load_student(file)
        assert type(model) is STUDENTS[checkpoint["model"]] and not model.training
        assert file.stem == f"best_model_{checkpoint['model']}_{checkpoint['kd_mode']}"
        assert checkpoint["parameters"] == PARAMETERS[checkpoint["model"]]
    assert {file.stem for file in files} == {
        f"best_model_{model}_{mode}" for model in STUDENTS for mode in KD_MODES}


@both
def test_file_run_as_a_script_prints_shapes_parameters_and_flops(name, capsys):
    runpy.run_path(str(ROOT / f"model_{name}.py"), run_name="__main__")
    out, channels = capsys.readouterr().out, STUDENTS[name].feature_channels["high"]
    shapes = {"image": "3, 256, 256", "low": "16, 64, 64", "mid": "24, 32, 32",
              "high": f"{channels}, 16, 16", "logits": "21, 256, 256"}  # fmt: skip
    for part, shape in shapes.items():
        assert re.search(rf"^{part} +\(1, {shape}\)$", out, re.MULTILINE)
    sizes = re.findall(r"^\w+ +([\d,]+) parameters$", out, re.MULTILINE)
    *parts, total = [int(number.replace(",", "")) for number in sizes]
    assert len(parts) == 5 and sum(parts) == total == PARAMETERS[name]
    flops = re.findall(rf"^{STUDENTS[name].__name__}[.\w]* +([\d.]+)M", out, re.MULTILINE)
    total, *parts = map(float, flops)
    assert len(parts) == 5 and 100 < sum(parts) == pytest.approx(total, rel=1e-3)
