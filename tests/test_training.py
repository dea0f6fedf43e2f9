"""Trainings of a few steps on a tiny data set, and what train.py's flags, files and lines say."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace
from unittest.mock import Mock, patch
from urllib.error import URLError

import pytest
import torch

import kd_losses
import test_pretrained_fcn
import train
import voc_data
from conftest import ROOT, load_test_script
from test_metric import Waits
from test_teacher import CPU, save_student
from voc_data import DataError, UsageError

MODES = ("none", "response", "feature")


def flags_of(root, save, *flags):
    flags = ["--data_root", root, "--save_dir", save, "--cache_dir", save.parent / "cache",
             "--no_pretrained", "--crop_size", 65, "--eval_size", 65, "--batch_size", 4, "--lr",
             0.01, "--epochs", 4, "--workers", 0, "--device", "cpu", *flags]  # fmt: skip
    return [str(flag) for flag in flags]


def trained(root, save, *flags, figures=False):
    """A training by train.main; the lines of its history."""
    args = train.get_args_parser().parse_args(flags_of(root, save, *flags))
    with patch.object(train, "write_summary", train.write_summary if figures else Mock()):
        train.main(args)
    file = train.run_file(args, "history", "jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def differences(one, other, place=""):
    """Where two nested structures differ, bit by bit; but for times and settings."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    if isinstance(one, (dict, list, tuple)) and len(one) == len(other):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        keys = [key for key in keys if key not in ("seconds", "val_seconds", "settings")]
        return [d for key in keys for d in differences(one[key], other[key], f"{place}/{key}")]
    return [] if one == other else [place]


def files_differ(one, other, run="ultracompact_none"):
    """Where the checkpoints of two folders differ."""
    return [
        place for kind in ("best_model", "last")
        for place in differences(*(torch.load(folder / f"{kind}_{run}.pth", weights_only=True)
                                   for folder in (one, other)), kind)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module", autouse=True)
def short_warmup():
    with patch.object(train, "WARMUP", 4):
        yield


@pytest.fixture(scope="module")
def runs(tiny_voc, teacher_file, tmp_path_factory):
    """The folder that a run of each mode left, and their histories."""
    folder = tmp_path_factory.mktemp("runs") / "save"
    flags = ["--teacher", teacher_file, "--val_every", 3, "--kd_mode"]
    return folder, {m: trained(tiny_voc, folder, *flags, m, figures=True) for m in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_losses_fall_and_add_up_and_the_history_says_so(runs, mode):
    history, beta = runs[1][mode], {"none": 0, "response": 3, "feature": 50}[mode]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    assert history[-1]["ce"] < 0.95 * history[0]["ce"]
    for record in history:
        assert record["loss"] == pytest.approx(record["ce"] + beta * record["kd"], rel=1e-4)
        assert (record["kd"] > 0) is (mode != "none")
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert [r["epoch"] for r in history if "val_miou" in r] == [3, 4]  # and after the last
    assert all(record["images"] == 24 and record["seconds"] > 0 for record in history)
    assert 0 < history[-1]["lr"] < history[0]["lr"] < 0.01


def test_compiled_run_has_equal_losses(runs, tiny_voc, teacher_file, tmp_path, monkeypatch):
    """Student and losses are one graph each, or fullgraph=True raises; the backend is eager."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for mode in MODES[1:]:
        torch._dynamo.utils.counters.clear()
        flags = ["--teacher", teacher_file, "--compile", "--val_every", 4, "--kd_mode", mode]
        history = trained(tiny_voc, tmp_path / "save", *flags)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        for one, other in zip(runs[1][mode], history, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint_holds_plain_values_and_the_student_alone(runs, mode, tiny_voc):
    content = torch.load(runs[0] / f"best_model_ultracompact_{mode}.pth", weights_only=True)
    validated = [record for record in runs[1][mode] if "val_miou" in record]
    best = max(validated, key=lambda record: record["val_miou"])
    expected = {"model": "ultracompact", "kd_mode": mode, "num_classes": 21, "eval_size": 65,
                "epoch": best["epoch"], "miou": best["val_miou"]}  # fmt: skip
    assert content.items() >= expected.items()
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    student.load_state_dict(content["model_state_dict"])  # no adapters, nothing missing
    assert content["parameters"] == sum(p.numel() for p in student.parameters()) < 250_000
    settings = content["settings"]
    assert settings["lr"] == 0.01 and settings["seed"] == 0 and settings["labelled_images"] == 24
    assert all(type(v) in (str, int, float, bool, list, type(None)) for v in settings.values())
    images = voc_data.VOCDataset(voc_data.list_items(tiny_voc, "val"))
    matrix, loss = voc_data.evaluate(student, images, 65, CPU)
    assert content["miou"] == pytest.approx(matrix.miou, abs=1e-6)
    assert best["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_folder_holds_five_files_a_run_and_a_report(runs):
    folder, histories = runs
    names = ("best_model_{}.pth", "last_{}.pth", "history_{}.jsonl", "training_report_{}.txt",
             "training_curves_{}.png")  # fmt: skip
    assert set(os.listdir(folder)) == {n.format(f"ultracompact_{m}") for n in names for m in MODES}
    text = (folder / "training_report_ultracompact_response.txt").read_text()
    content = torch.load(folder / "best_model_ultracompact_response.pth", weights_only=True)
    score = 4 * content["miou"] / (1 + content["parameters"] / 1e6)
    final = histories["response"][-1]["val_miou"]
    assert re.search(rf"best val mIoU +{content['miou']:.4f} \(epoch {content['epoch']}\)", text)
    assert re.search(rf"final val mIoU +{final:.4f} \(epoch 4\)", text)
    assert re.search(rf"score +{score:.4f}", text)
    for name, value in content["settings"].items():
        assert re.search(rf"^ *{name} +{re.escape(str(value))}$", text, re.MULTILINE), name


def test_curves_are_the_columns_of_the_history(runs):
    history = runs[1]["feature"]
    series = {k: [*map(list, zip(*points))] for k, points in train.curves(history).items()}
    assert series["train loss"] == [[1, 2, 3, 4], [record["loss"] for record in history]]
    assert series["train distillation"][1] == [record["kd"] for record in history]
    (miou,) = [points for label, points in series.items() if "mIoU" in label]
    assert miou[0] == series["val cross-entropy, unweighted"][0] == [3, 4]
    assert miou[1] == [history[2]["val_miou"], history[3]["val_miou"]]


def test_epoch_line():
    record = {"loss": 0.432, "ce": 0.401, "kd": 0.031, "images": 3744, "seconds": 12.0}
    history = 11 * [record] + [record | {"val_loss": 0.511, "val_miou": 0.452, "val_seconds": 2.0}]
    args = SimpleNamespace(epochs=50, val_every=1)
    line = train.epoch_line(args, history)
    start = ("epoch 12/50 | loss 0.432 (ce 0.401 kd 0.031) | val loss 0.511 mIoU 0.452 | 312 img/s "
             "| 14 s, ")  # fmt: skip
    assert line.startswith(start) and re.fullmatch(r"[789] min left", line[len(start) :])
    assert " | val" not in train.epoch_line(args, history[:-1])


def test_extra_images_join_every_batch_and_leave_the_steps_alone(
    tiny_voc, teacher_file, sample_root, tmp_path, monkeypatch
):
    compute, batches = train.compute_losses, {}

    def spy(args, logits, features, labels, *rest):
        unlabelled = (labels == voc_data.UNLABELLED).flatten(1).any(dim=1).sum().item()
        batches[args.kd_mode].append((len(logits), unlabelled))
        return compute(args, logits, features, labels, *rest)

    monkeypatch.setattr(train, "compute_losses", spy)
    shutil.copytree(sample_root / "JPEGImages", tmp_path / "photos",
                    ignore=lambda _, names: sorted(names)[:-5])  # fmt: skip
    for mode in MODES:
        batches[mode] = []
        flags = ["--kd_mode", mode, "--teacher", teacher_file, "--epochs", 1, "--crop_size", 33]
        flags += ["--extra_images", tmp_path / "photos"] if mode != "none" else []
        (record,) = trained(tiny_voc, tmp_path / "save", *flags)
        assert record["images"] == 24
    assert batches == {"none": 6 * [(4, 0)], "response": 6 * [(8, 4)], "feature": 6 * [(8, 4)]}


@pytest.mark.parametrize("mode", ["response", "feature"])
def test_live_teacher_trains_like_the_cached_one_does(runs, mode, tiny_voc, teacher_file, tmp_path):
    flags = ["--kd_mode", mode, "--teacher", teacher_file, "--cache_dir", "none", "--epochs", 1]
    (record,) = trained(tiny_voc, tmp_path / "save", *flags)
    assert record["kd"] == pytest.approx(runs[1][mode][0]["kd"], rel=0.3)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="live"):  # cached targets are others
        trained(tiny_voc, tmp_path / "save", *flags[:4], "--epochs", 2)


def test_steps_do_not_wait_for_the_device(tiny_voc, teacher_file, tmp_path, monkeypatch):
    """No number is read off a tensor between the first loss and the 20th."""
    at_step, compute = [], train.compute_losses

    def mark(*args):
        at_step.append(waits.number)
        return compute(*args)

    monkeypatch.setattr(train, "compute_losses", mark)
    flags = ["--kd_mode", "feature", "--teacher", teacher_file, "--batch_size", 1, "--crop_size",
             33, "--cache_dir", "none", "--epochs", 1]  # fmt: skip
    with Waits() as waits:
        trained(tiny_voc, tmp_path, *flags)
    assert len(at_step) == 24
    assert at_step[0] == at_step[19] < at_step[20] == at_step[23]  # the 20th loss is shown


def test_schedule_warms_up_and_falls_to_zero(monkeypatch):
    monkeypatch.setattr(train, "WARMUP", 100)
    for step, share in ((0, 0.01), (49, 0.5), (99, 1), (500, 1), (999, 1)):
        assert train.schedule(step, 1000) == pytest.approx(share * (1 - step / 1000) ** 0.9)


@pytest.mark.parametrize("start, rate", [(["--no_pretrained"], 1), ([], 0.3)])
def test_optimizer_slows_a_pretrained_backbone_and_decays_weights_alone(start, rate):
    flags = ["--lr", "0.01", "--weight_decay", "0.1", "--kd_mode", "feature", *start]
    args = train.get_args_parser().parse_args(flags)
    student = kd_losses.STUDENTS["standard"](pretrained=False)
    adapters = kd_losses.make_adapters(student.feature_channels, {"high": 9}, ["high"])
    model = train.StudentWithAdapters(student, adapters)
    groups = {id(p): group for group in train.build_optimizer(args, model).param_groups
              for p in group["params"]}  # fmt: skip
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        group, module = groups.pop(id(parameter)), modules[name.rpartition(".")[0]]
        assert group["initial_lr"] == pytest.approx(0.01 * (rate if "backbone" in name else 1))
        is_weight = isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "weight" in name
        assert group["weight_decay"] == (0.1 if is_weight else 0), name
    assert not groups


def test_average_of_the_weights_is_the_formula():
    network = torch.nn.BatchNorm2d(2)
    ema = train.EMA(network)
    expected = {key: value.double() for key, value in ema.network.state_dict().items()}
    for step in (0, 1, 10, 50_000):
        for value in network.state_dict().values():
            value.copy_(torch.rand(value.shape))
        decay = min(0.998, (1 + step) / (10 + step))
        expected = {key: decay * expected[key] + (1 - decay) * value
                    for key, value in network.state_dict().items()}  # fmt: skip
        ema.update(step)
    for key, value in ema.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert not ema.network.training


def test_patience_stops_after_validations_without_a_better_miou(tiny_voc, tmp_path, monkeypatch):
    mious = iter([0.1, 0.3, 0.3, 0.2, 0.9])
    monkeypatch.setattr(train, "validate", lambda *_: {"val_loss": 1, "val_miou": next(mious)})
    flags = ["--patience", 2, "--epochs", 9, "--crop_size", 33, "--batch_size", 24]
    history = trained(tiny_voc, tmp_path, *flags)
    assert [record["val_miou"] for record in history] == [0.1, 0.3, 0.3, 0.2]
    best = torch.load(tmp_path / "best_model_ultracompact_none.pth", weights_only=True)
    assert best["epoch"] == 2  # the first of equals


def test_clock_that_is_set_back_does_not_matter(tiny_voc, tmp_path, monkeypatch, capsys):
    hours = iter(range(10**6))
    monkeypatch.setattr("time.time", lambda: 1e9 - 3600 * next(hours))
    (record, _) = trained(tiny_voc, tmp_path, "--epochs", 2, "--batch_size", 12)
    assert 0 < record["seconds"] < 60 and 0 < record["val_seconds"] < 60
    assert not re.search(r"-\d", capsys.readouterr().out.replace(str(tmp_path), ""))


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    tiny_voc, tmp_path, monkeypatch
):
    with pytest.raises(DataError, match="loss is nan.* --lr"):
        trained(tiny_voc, tmp_path / "first", "--lr", 1e9)
    assert not list((tmp_path / "first").glob("best_*.pth"))
    trained(tiny_voc, tmp_path / "save", "--epochs", 1)
    before = (tmp_path / "save/last_ultracompact_none.pth").read_bytes()
    nan = {name: torch.tensor(torch.nan, requires_grad=True) for name in ("loss", "ce", "kd")}
    monkeypatch.setattr(train, "compute_losses", lambda *_: nan)
    with pytest.raises(DataError, match="loss is nan in epoch 2"):
        trained(tiny_voc, tmp_path / "save", "--epochs", 2)
    assert (tmp_path / "save/last_ultracompact_none.pth").read_bytes() == before


def test_init_starts_from_the_weights_of_a_checkpoint(teacher_file, tmp_path):
    args = train.get_args_parser().parse_args(["--init", str(teacher_file)])
    state = train.build_model(args, None).student.state_dict()
    expected = torch.load(teacher_file, weights_only=True)["model_state_dict"]
    assert differences(dict(state), dict(expected)) == []
    args.model = "standard"
    with pytest.raises(DataError, match="teacher.pth does not fit"):
        train.build_model(args, None)


@pytest.mark.parametrize("status, flags, word", [
    *((2, flags, flags.split()[0]) for flags in (
        "--epochs 0", "--epochs 1.5", "--batch_size 0", "--batch_size 25", "--lr nan", "--lr inf",
        "--lr -1", "--weight_decay -1", "--seed -1", "--seed 9223372036854775808",
        "--temperature 0", "--alpha -1", "--beta nan",
        "--crop_size 32", "--eval_size 0", "--scale 2 1", "--scale 0 1", "--colour_jitter 1.1",
        "--workers -1", "--val_every 0", "--patience -1", "--model vgg", "--kd_mode both",
        "--kd_levels top", "--typo 1", "--class_balance x", "--device tpu", "--amp on",
        "--extra_images voc", "--resume maybe",
    )),
    (2, "--kd_mode response --teacher resnet18", "'fcn_resnet50'"),
    (2, "--train_split val", "--allow_val_in_train"),
    (1, "--train_split absent", "absent.txt does not exist"),
    (1, "--data_root /nowhere", "/nowhere"), (1, "--init absent.pth", "absent.pth"),
    (1, "--kd_mode feature --extra_images /nowhere", "/nowhere"),
    (1, "--kd_mode response --teacher absent.pth", "absent.pth"),
    (1, "--kd_mode response --teacher fcn_resnet50 --teacher_weights absent", "absent"),
])  # fmt: skip
def test_bad_flags_and_missing_data_end_in_one_line(
    status, flags, word, tiny_voc, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(signal, "signal", Mock())
    with pytest.raises(SystemExit) as stop:
        flags = flags_of(tiny_voc, tmp_path / "save", *flags.split())
        voc_data.run(train.main, train.get_args_parser().parse_args(flags))
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count(": error: ") == 1
    assert stop.value.code == status and word in error.strip().splitlines()[-1]
    assert not (tmp_path / "save").exists()


def test_older_results_are_replaced_only_where_that_is_asked_for(tiny_voc, tmp_path):
    flags = ["--epochs", 1, "--batch_size", 12]
    trained(tiny_voc, tmp_path, *flags)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(UsageError, match="lr.*0.01"):
        trained(tiny_voc, tmp_path, *flags, "--lr", 0.02)
    with pytest.raises(UsageError, match="exists.*--overwrite"):
        trained(tiny_voc, tmp_path, *flags, "--lr", 0.02, "--resume", "none")
    trained(tiny_voc, tmp_path / "two", "--epochs", 2)
    with pytest.raises(UsageError, match="2 epochs"):
        trained(tiny_voc, tmp_path / "two", "--epochs", 1)
    assert before == {file: file.read_bytes() for file in before}
    trained(tiny_voc, tmp_path, *flags, "--lr", 0.02, "--resume", "none", "--overwrite")
    best = torch.load(tmp_path / "best_model_ultracompact_none.pth", weights_only=True)
    assert best["settings"]["lr"] == 0.02


def commands():
    """(file, line) of every python line in the three lists."""
    for name in ("train.txt", "test.txt", "sample.txt"):
        for line in (ROOT / name).read_text("utf-8").splitlines():
            if line.strip() and not line.startswith(("#", "trap ", "set ")):
                yield pytest.param(line, id=f"{name}: {line[:40]}")


@pytest.mark.parametrize("line", commands())
def test_lines_of_the_lists_parse(line):
    python, script, *flags = shlex.split(line)
    assert python == "python" and (ROOT / script).is_file()
    modules = {"train.py": train, "test_pretrained_fcn.py": test_pretrained_fcn,
               "test.py": load_test_script()}  # fmt: skip
    args = modules[script].get_args_parser().parse_args(flags) if script in modules else None
    if script == "train.py":
        train.check_flags(args)


def test_every_flag_of_train_is_named_in_the_lists_or_the_readme():
    files = ("train.txt", "test.txt", "sample.txt", "README.md")
    text = "\n".join((ROOT / name).read_text("utf-8") for name in files)
    flags = {"--" + name for name in vars(train.get_args_parser().parse_args([]))}
    assert not [flag for flag in sorted(flags) if not re.search(rf"{flag}\b", text)]


class Malicious:
    """Reading it back writes a file."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "evil.pth")
    torch.load("evil.pth", weights_only=False)
    os.remove("executed")  # it works where it is let
    for read in (kd_losses.load_student, kd_losses.read_checkpoint):
        with pytest.raises(DataError, match="evil.pth"):
            read(tmp_path / "evil.pth")
    assert not os.path.exists("executed")


def test_files_that_are_no_student_are_one_line(teacher_file, tmp_path):
    whole, content = teacher_file.read_bytes(), kd_losses.read_checkpoint(teacher_file)
    broken = [b"text", b"<html>404</html>", b"PK\x03\x04" + bytes(99)]
    broken += [whole[: len(whole) * part // 9] for part in range(9)]
    others = [[1], torch.zeros(3), {}, content["model_state_dict"], {"model": {}},
              content | {"model": "standard"}, content | {"num_classes": 5},
              content | {"kd_mode": None}, content | {"model_state_dict": {"a": 1}}]  # fmt: skip
    for number, value in enumerate([*broken, *others]):
        file = tmp_path / f"{number}.pth"
        file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)
        with pytest.raises(DataError, match=file.name) as caught:
            kd_losses.load_student(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    {}, {"weight": torch.zeros(3)}, {"model": {"weight": torch.zeros(3)}}, {1: torch.zeros(3)},
    {f"backbone.{n}": torch.zeros(1) for n in range(500)}, {"model": 5}, torch.zeros(3), [1, 2],
])  # fmt: skip
def test_teacher_weights_that_do_not_fit_are_one_short_line(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(DataError, match="weights.pth") as caught:
        kd_losses.load_teacher("lraspp_mobilenet_v3_large", tmp_path / "weights.pth", CPU)
    text = str(caught.value).replace(str(tmp_path), "")
    assert len(text) < 400 and "\n" not in text


def test_missing_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    no_route = Mock(side_effect=URLError("no route to host"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    with pytest.raises(DataError, match="no route to host.*--teacher_weights") as caught:
        kd_losses.load_teacher("lraspp_mobilenet_v3_large", None, CPU)
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "LOCAL_RANK", 2)
    with pytest.raises(UsageError, match="--nproc_per_node=2"):
        train.init_processes(SimpleNamespace(device=None))
