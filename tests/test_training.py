"""Whole runs on a tiny data set: train.py in its three modes, test.py, test_pretrained_fcn.py."""

import csv
import hashlib
import json
import re
import runpy
import shlex
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kd_losses
import test_pretrained_fcn as fcn_script
import train
import voc_data
from conftest import FCN_FILE, ROOT, load_test_script
from voc_data import CLASSES, DataError, UsageError

MODES = ("none", "response", "feature")
EPOCHS = 4


test_script = load_test_script()


def parsed(root, folder, mode, teacher, *more):
    """The arguments of a short run of train.py."""
    flags = [
        "--kd_mode", mode, "--teacher", teacher, "--data_root", root, "--save_dir", folder,
        "--cache_dir", folder.parent / "cache", "--no_pretrained", "--crop_size", 65, "--epochs",
        EPOCHS, "--batch_size", 8, "--lr", 5e-3, "--warmup", 2, "--teacher_size", 65,
        "--workers", 0, "--device", "cpu", "--seed", 3, *more,
    ]  # fmt: skip
    return train.get_args_parser().parse_args([str(flag) for flag in flags])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def teacher_file(tiny_voc, tmp_path_factory):
    """A standard student, trained a little, to teach the others."""
    folder = tmp_path_factory.mktemp("teacher") / "checkpoints"
    train.main(parsed(tiny_voc, folder, "none", "fcn_resnet50", "--model", "standard"))
    return folder / "best_model_standard_none.pth"


@pytest.fixture(scope="session")
def runs(tiny_voc, teacher_file, tmp_path_factory):
    """One folder with a finished run of each mode, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "checkpoints"
    before = digest(teacher_file)
    for mode in MODES:
        train.main(parsed(tiny_voc, folder, mode, teacher_file, "--checkpoint_interval", 2))
    assert digest(teacher_file) == before, "training wrote into the teacher's file"
    return folder


def weights(folder, mode, kind="best_model"):
    """The tensors of a run's file; those of last_* under the names of its parts."""
    content = torch.load(folder / f"{kind}_ultracompact_{mode}.pth", weights_only=True)
    if kind != "last":
        return content["model_state_dict"]
    parts = {name: content[name] for name in ("student", "averaged", "adapters")}
    moments = content["optimizer"]["state"]
    parts["optimizer"] = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
    return {f"{part}.{key}": v for part, state in parts.items() for key, v in state.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def history(folder, mode):
    lines = (folder / f"history_ultracompact_{mode}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(records):
    timed = ("seconds", "val_seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


# ------------------------------------------------------------------------------------ a run


@pytest.mark.parametrize("mode", MODES)
def test_loss_falls_over_the_epochs_in_every_mode(mode, tiny_voc, teacher_file, tmp_path):
    """A longer run, all classes alike: else the luck of the crops hides the fall."""
    more = ["--epochs", 16, "--class_balance", 0]
    train.main(parsed(tiny_voc, tmp_path / "s", mode, teacher_file, *more))
    records = history(tmp_path / "s", mode)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert records[-1]["ce"] < 0.9 * records[0]["ce"]
    assert records[-1]["val_loss"] < 0.95 * records[0]["val_loss"]
    beta = {"none": 0.0, "response": 1.0, "feature": 5.0}[mode]
    for record in records:
        assert record["loss"] == pytest.approx(record["ce"] + beta * record["kd"], rel=1e-4)
        assert (record["kd"] > 0) is (mode != "none")


@pytest.mark.parametrize("mode", ["response", "feature"])
def test_distillation_alone_brings_the_student_nearer_to_the_teacher(
    mode, tiny_voc, teacher_file, tmp_path
):
    more = ["--alpha", 0, "--beta", 2, "--epochs", 5, "--val_every", 5]
    train.main(parsed(tiny_voc, tmp_path / "s", mode, teacher_file, *more))
    records = history(tmp_path / "s", mode)
    assert records[-1]["kd"] < 0.8 * records[0]["kd"]
    assert all(record["loss"] == pytest.approx(2 * record["kd"], rel=1e-4) for record in records)


@pytest.mark.parametrize("mode", MODES)
def test_history_is_one_json_object_an_epoch(runs, mode):
    records = history(runs, mode)
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    for record in records:
        assert {"loss", "ce", "kd", "lr", "val_loss", "val_miou", "seconds"} <= record.keys()
        assert 0 <= record["val_miou"] <= 1 and record["val_loss"] > 0
        assert record["images"] == 24


@pytest.mark.parametrize("mode", MODES)
def test_best_checkpoint_loads_as_plain_values_with_the_keys_of_the_design(runs, mode):
    path = runs / f"best_model_ultracompact_{mode}.pth"
    content = torch.load(path, weights_only=True)
    assert {
        "model_state_dict", "model", "kd_mode", "num_classes", "eval_size", "miou", "parameters",
        "settings",
    } <= content.keys()  # fmt: skip
    assert (content["model"], content["kd_mode"]) == ("ultracompact", mode)
    assert content["num_classes"] == 21 and content["eval_size"] == 0
    assert content["miou"] == max(record["val_miou"] for record in history(runs, mode))
    student, _ = kd_losses.load_student(path)
    assert content["parameters"] == sum(p.numel() for p in student.parameters()) <= 250_000
    settings = content["settings"]
    assert settings["lr"] == 5e-3 and settings["crop_size"] == 65 and settings["seed"] == 3
    plain = (str, int, float, bool, list, type(None))
    assert all(type(value) in plain for value in settings.values())


@pytest.mark.parametrize("mode", MODES)
def test_best_checkpoint_has_the_mIoU_that_it_says(runs, mode, tiny_voc):
    student, content = kd_losses.load_student(runs / f"best_model_ultracompact_{mode}.pth")
    data = voc_data.VOCDataset(voc_data.list_items(tiny_voc, "val"), voc_data.EvalTransform())
    result = voc_data.evaluate(student, voc_data.eval_loader(data, 0), "cpu")
    assert result.matrix.miou == pytest.approx(content["miou"], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_shipped_weights_hold_the_student_alone(runs, mode):
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    assert weights(runs, mode).keys() == student.state_dict().keys()
    kept = weights(runs, mode, f"epoch_{EPOCHS}")
    assert kept.keys() == student.state_dict().keys()


@pytest.mark.parametrize("mode", MODES)
def test_report_says_result_score_data_times_and_settings(runs, mode):
    text = (runs / f"training_report_ultracompact_{mode}.txt").read_text()
    records = history(runs, mode)
    best = max(record["val_miou"] for record in records)
    content = torch.load(runs / f"best_model_ultracompact_{mode}.pth", weights_only=True)
    score = 4 * best / (1 + content["parameters"] / 1e6)

    def value(label):
        return re.search(rf"^ *{label} +(\S+)", text, re.MULTILINE).group(1)

    assert value("best val mIoU") == f"{best:.4f}"
    assert value("final val mIoU") == f"{records[-1]['val_miou']:.4f}"
    assert value("score") == f"{score:.4f}"
    assert value("parameters") == f"{content['parameters']:,}"
    assert value("training images") == "24" and value("validation images") == "8"
    assert float(value("training, per epoch")) >= 0 and float(value("training, per image")) > 0
    for name, setting in content["settings"].items():
        assert re.search(rf"^ *{name} +{re.escape(str(setting))}$", text, re.MULTILINE), name


@pytest.mark.parametrize("mode", MODES)
def test_curves_are_a_picture_with_two_panels(runs, mode):
    with Image.open(runs / f"training_curves_ultracompact_{mode}.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > 1.5 * pixels.shape[0] > 300
    middle = pixels.shape[1] // 2
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    assert coloured[:, :middle].any() and coloured[:, middle:].any()


def test_kept_copies_are_made_at_the_interval(runs):
    names = sorted(path.name for path in runs.glob("epoch_*_ultracompact_none.pth"))
    assert names == ["epoch_2_ultracompact_none.pth", "epoch_4_ultracompact_none.pth"]
    early, late = (torch.load(runs / name, weights_only=True) for name in names)
    assert (early["epoch"], late["epoch"]) == (2, 4)
    assert not equal(early["model_state_dict"], late["model_state_dict"])


def test_nothing_unfinished_is_left_behind(runs):
    assert [path.name for path in runs.parent.rglob("*.tmp")] == []


def test_modes_lead_to_different_weights(runs):
    found = [weights(runs, mode, "last") for mode in MODES]
    key = "student.classifier.1.weight"
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[first][key], found[second][key], atol=1e-4)


# ------------------------------------------------------------------------ inside a training step


def begin(root, folder, mode, teacher, *more, pretrained=False):
    """A `Training` and its train loader, as `main` makes them."""
    args = parsed(root, folder, mode, teacher, *more)
    args.no_pretrained = not pretrained
    train.check_args(args)
    train.setup_processes(args)
    _, train_items, val_items = train.find_data(args)
    train.seed_everything(args.seed, 0, 0)
    teacher = train.build_teacher(args)
    loaders, _ = train.build_loaders(args, train_items, val_items, teacher)
    loader = loaders[args.crop_size]
    weights = train.find_class_weights(args, loaders)
    return train.Training(args, teacher, len(loader), weights), loader


def test_state_of_a_device_without_loss_scaling_continues_on_one_with(tiny_voc, tmp_path):
    """From a CPU or a bfloat16 GPU to one that has float16 only, as Colab may give next time."""
    trainer, _ = begin(tiny_voc, tmp_path / "s", "none", "fcn_resnet50")
    state = trainer.state_dict()
    assert state["scaler"] == {}
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.load_state_dict(state)


def test_optimizer_keeps_its_own_kernel_and_layout_over_a_change_of_device(runs, tiny_voc):
    """MPS has neither: state from there must not turn them off here, nor the other way round."""
    trainer, loader = begin(tiny_voc, runs, "none", "fcn_resnet50")
    state = torch.load(runs / "last_ultracompact_none.pth", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()
    trainer.load_state_dict(state)
    assert all(group["fused"] is True for group in state["optimizer"]["param_groups"])
    assert all(group["fused"] is True for group in trainer.optimizer.param_groups)
    for parameter, moments in trainer.optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    trainer.step(next(iter(loader)), 0)


def test_message_of_a_run_that_is_cut_off_while_it_saves(tiny_voc, tmp_path, monkeypatch, capsys):
    """The epoch is done, but not on disk."""
    monkeypatch.setattr(train, "save_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main(parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50"))
    assert "stopped in epoch 1; 0 whole epochs are saved" in capsys.readouterr().out


def test_another_teacher_of_the_same_name_is_another_run(runs, tiny_voc, teacher_file, tmp_path):
    content = torch.load(teacher_file, weights_only=True)
    content["model_state_dict"]["classifier.1.bias"] += 1
    other = tmp_path / teacher_file.name
    torch.save(content, other)
    with pytest.raises(UsageError, match="teacher_digest"):
        train.main(parsed(tiny_voc, runs, "response", other, "--checkpoint_interval", 2))


def test_restart_by_torchrun_goes_on_even_where_the_flags_say_afresh(tmp_path, monkeypatch):
    args = train.get_args_parser().parse_args(["--resume", "none", "--overwrite"])
    files = train.RunFiles(tmp_path, "ultracompact_none")
    train.save_whole({"epoch": 3, "optimizer": {}, "settings": {}}, files.last)
    assert train.find_resume(args, files) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.find_resume(args, files)["epoch"] == 3


def test_resume_from_a_file_elsewhere_brings_state_and_best_weights_along(runs, tiny_voc, tmp_path):
    """Before the first epoch: whatever cuts the run off then, it can go on from --save_dir."""
    last, best = runs / "last_ultracompact_none.pth", runs / "best_model_ultracompact_none.pth"
    for name, has_best in (("with", True), ("without", False), ("of another epoch", False)):
        source = tmp_path / name / "from"
        source.mkdir(parents=True)
        for file in (last,) if name == "without" else (last, best):
            shutil.copyfile(file, source / file.name)
        if name == "of another epoch":
            content = torch.load(best, weights_only=True)
            torch.save(content | {"epoch": content["epoch"] + 1}, source / best.name)
        save = tmp_path / name / "to"
        args = parsed(tiny_voc, save, "none", "fcn_resnet50", "--resume", source / last.name)
        train.main(args)  # all epochs are done already
        before, after = (torch.load(path / last.name) for path in (runs, save))
        assert equal(after["averaged"], before["averaged"]) and after["epoch"] == before["epoch"]
        if has_best:
            assert (save / best.name).read_bytes() == best.read_bytes()
            assert after["best"] == before["best"]
        else:  # the averaged weights of the last epoch, which was validated, are the best there are
            found = torch.load(save / best.name, weights_only=True)
            assert equal(found["model_state_dict"], before["averaged"])
            assert after["best"] == {"miou": before["history"][-1]["val_miou"], "epoch": EPOCHS}
            assert after["best"]["miou"] == found["miou"]


@pytest.mark.parametrize("left", ["nothing", "another run's", "a part"])
def test_continued_run_does_not_claim_a_best_model_that_is_not_there(
    left, runs, tiny_voc, tmp_path, capsys
):
    """Whoever copied `last` alone, or lost the latest upload, gets the best of what there is."""
    save = tmp_path / "s"
    shutil.copytree(runs, save)
    best = save / "best_model_ultracompact_none.pth"
    content = torch.load(best, weights_only=True)
    if left == "another run's":
        torch.save(content | {"epoch": content["epoch"] + 7}, best)
    elif left == "a part":
        best.write_bytes(best.read_bytes()[:1000])
    else:
        best.unlink()
    train.main(parsed(tiny_voc, save, "none", "fcn_resnet50", "--checkpoint_interval", 2))
    assert f"{best} is not there or of another run" in capsys.readouterr().out
    found, state = torch.load(best), torch.load(save / "last_ultracompact_none.pth")
    assert equal(found["model_state_dict"], state["averaged"]) and found["epoch"] == EPOCHS
    assert state["best"] == {"miou": found["miou"], "epoch": EPOCHS}


def test_continued_run_needs_no_imagenet_weights(runs, tiny_voc, tmp_path, monkeypatch):
    """It has weights of its own, on a machine without a network too."""
    monkeypatch.setattr(train, "FREE_ON_RESUME", train.FREE_ON_RESUME | {"no_pretrained"})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    shutil.copytree(runs, tmp_path / "s")
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--checkpoint_interval", 2)
    args.no_pretrained = False
    with monkeypatch.context() as offline:
        offline.setattr(torch.hub, "load_state_dict_from_url", None)
        offline.setattr(torch.hub, "download_url_to_file", None)
        train.main(args)


def test_resume_from_a_run_elsewhere_that_has_done_nothing(tiny_voc, tmp_path):
    flags = ["--epochs", 1, "--resume", tmp_path / "last_ultracompact_none.pth"]
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *flags)
    train.check_args(args)
    train.setup_processes(args)
    train.save_whole(train.nothing_done(args), tmp_path / "last_ultracompact_none.pth")
    train.main(args)
    assert (tmp_path / "s" / "best_model_ultracompact_none.pth").is_file()


@pytest.mark.parametrize(
    "place", [(train.Training, "train_one_epoch"), (voc_data, "pixel_cache")],
    ids=["in its first epoch", "while it fills the caches"],
)  # fmt: skip
def test_fresh_start_that_is_cut_off_early_is_not_the_older_run(
    place, runs, tiny_voc, tmp_path, monkeypatch
):
    shutil.copytree(runs, tmp_path / "s")
    flags = ["--resume", "none", "--overwrite"]
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *flags)
    monkeypatch.setattr(*place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main(args)
    files = train.RunFiles(tmp_path / "s", "ultracompact_none")
    args.resume, args.overwrite = "auto", False
    assert train.find_resume(args, files)["epoch"] == 0
    assert digest(files.best) == digest(runs / files.best.name)


def test_own_file_may_be_named_by_another_path(runs, monkeypatch):
    monkeypatch.chdir(runs)
    files = train.RunFiles(runs, "ultracompact_none")
    for path in (files.last, files.last.name, f"../{runs.name}/{files.last.name}"):
        args = train.get_args_parser().parse_args(["--resume", str(path)])
        assert train.find_resume(args, files)["epoch"] > 0


def test_run_of_a_version_with_fewer_flags_goes_on_where_the_new_ones_are_off(runs, tiny_voc):
    args = parsed(tiny_voc, runs, "none", "fcn_resnet50")
    train.check_args(args)
    train.setup_processes(args)
    resumed = torch.load(runs / "last_ultracompact_none.pth")
    args.data_key, args.teacher_digest = resumed["settings"]["data_key"], None
    for name in ("cutmix", "freeze", "epoch_images", "init"):
        del resumed["settings"][name]
    train.check_same_settings(args, resumed)
    args.cutmix = 0.5
    with pytest.raises(UsageError, match="cutmix .was 0.0, now 0.5"):
        train.check_same_settings(args, resumed)


@pytest.mark.parametrize("asked, size", [(None, 80), (0, 0), (65, 65)])
def test_student_as_a_teacher_is_asked_at_the_size_it_was_made_for(
    asked, size, tiny_voc, teacher_file, tmp_path
):
    content = torch.load(teacher_file, weights_only=True)
    torch.save(content | {"eval_size": 80}, tmp_path / "student.pth")
    args = parsed(tiny_voc, tmp_path / "s", "response", tmp_path / "student.pth")
    args.teacher_size = asked
    train.check_args(args)
    assert args.teacher_size == size


def test_validation_is_in_float32_whatever_the_training(tiny_voc, tmp_path):
    flags = ("--amp", "bfloat16", "--epochs", 1)
    train.main(parsed(tiny_voc, tmp_path, "none", "fcn_resnet50", *flags))
    student, checkpoint = kd_losses.load_student(tmp_path / "best_model_ultracompact_none.pth")
    data = voc_data.VOCDataset(voc_data.list_items(tiny_voc, "val"), voc_data.EvalTransform(0))
    result = voc_data.evaluate(student, voc_data.eval_loader(data, 0), "cpu")
    record = history(tmp_path, "none")[-1]
    assert record["val_miou"] == result.matrix.miou
    assert record["val_loss"] == pytest.approx(result.loss, rel=1e-6)


def test_early_epochs_see_smaller_crops_of_smaller_pictures(tiny_voc, teacher_file, tmp_path):
    """Batches of both sizes go through a step; the same seed cuts the same part of a picture."""
    more = ["--early_epochs", 2, "--early_crop", 48, "--crop_size", 96, "--epochs", 3]
    args = parsed(tiny_voc, tmp_path / "s", "response", teacher_file, *more)
    train.check_args(args)
    assert [train.crop_of_epoch(args, epoch) for epoch in range(3)] == [48, 48, 96]
    train.setup_processes(args)
    _, train_items, val_items = train.find_data(args)
    teacher = train.build_teacher(args)
    loaders, _ = train.build_loaders(args, train_items, val_items, teacher)
    trainer = train.Training(args, teacher, steps_per_epoch=4, class_weights=None)
    batches = {crop: next(iter(loader)) for crop, loader in loaders.items()}
    for crop, batch in batches.items():
        assert batch["image"].shape[-2:] == batch["mask"].shape[-2:] == (crop, crop)
        assert batch["out"].shape[-1] == crop // 4
        assert trainer.step(batch, 0)["loss"].isfinite()
    smaller = batches[96]["mask"][:, 1::2, 1::2]
    assert (smaller == batches[48]["mask"]).float().mean() > 0.9


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("mode", ["none", "response", "feature"])
def test_cutmix_mixes_the_images_and_what_was_said_of_them(
    mode, cache, tiny_voc, teacher_file, tmp_path, monkeypatch
):
    """The student sees mixed images; the teacher never does, but its answers are mixed likewise."""
    more = ["--cutmix", 1, "--teacher_cache", cache]
    trainer, loader = begin(tiny_voc, tmp_path, mode, teacher_file, *more)
    calls, cutmix, compute_losses = {}, voc_data.cutmix, train.compute_losses

    def watched_cutmix(*batch):
        calls["before"], calls["after"] = batch, cutmix(*batch)
        return calls["after"]

    def watched_losses(args, logits, features, labels, taught, weights):
        assert labels is calls["after"][1] and taught is calls["after"][2]
        return compute_losses(args, logits, features, labels, taught, weights)

    def watched_student(module, inputs):
        assert inputs[0] is calls["after"][0]

    monkeypatch.setattr(voc_data, "cutmix", watched_cutmix)
    monkeypatch.setattr(train, "compute_losses", watched_losses)
    trainer.module.register_forward_pre_hook(watched_student)
    batch = next(iter(loader))
    assert trainer.step(batch, 0)["loss"].isfinite()
    images, labels, taught = calls["before"]
    assert torch.equal(labels, batch["mask"])
    if mode != "none":
        expected = trainer.ask_teacher(images, batch)
        assert taught.keys() == calls["after"][2].keys() == expected.keys() != set()
        assert all(torch.equal(taught[key], expected[key]) for key in taught)


def test_cutmix_takes_the_share_of_the_steps_that_is_wanted(tiny_voc, tmp_path, monkeypatch):
    mixed = []
    monkeypatch.setattr(voc_data, "cutmix", lambda *batch: mixed.append(1) or batch)
    for share, allowed in ((0, [0]), (0.5, range(4, 17)), (1, [20])):
        more = ["--cutmix", share]
        trainer, loader = begin(tiny_voc, tmp_path, "none", "fcn_resnet50", *more)
        batch = next(iter(loader))
        mixed.clear()
        for step in range(20):
            trainer.step(batch, step)
        assert len(mixed) in allowed


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("mode", ["response", "feature"])
def test_step_trains_student_and_adapters_and_never_the_teacher(
    mode, cache, tiny_voc, teacher_file, tmp_path
):
    more = ["--teacher_cache", cache, "--kd_levels", "low", "mid", "high"]
    trainer, loader = begin(tiny_voc, tmp_path / "s", mode, teacher_file, *more)
    network = trainer.teacher._network[0]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modules = {"student": trainer.student, "adapters": trainer.adapters}
    start = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
    trainer.module.train()
    losses = trainer.step(next(iter(loader)), 0)
    assert losses.keys() == {"loss", "ce", "kd"} and losses["kd"] > 0
    for name, module in modules.items():
        parameters = dict(module.named_parameters())
        assert bool(parameters) is (name == "student" or mode == "feature")
        for key, parameter in parameters.items():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
            assert not torch.equal(parameter, start[name][key]), key
    assert all(p.grad is None for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert equal(network.state_dict(), before)


@pytest.mark.parametrize("freeze, frozen", [("low", ("low",)), ("mid", ("low", "mid"))])
def test_frozen_parts_stay_as_they_are_with_their_norms_and_all_else_learns(
    freeze, frozen, tiny_voc, tmp_path
):
    more = ["--freeze", freeze]
    trainer, loader = begin(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *more)
    before = {key: value.clone() for key, value in trainer.student.state_dict().items()}
    trainer.train_one_epoch(loader)
    after = trainer.student.state_dict()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    parts = tuple(f"backbone.to_{level}" for level in frozen)
    assert kept == {key for key in before if key.startswith(parts)}
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert held == sum(parameter.requires_grad for parameter in trainer.student.parameters())


def test_init_starts_from_the_weights_of_a_checkpoint(runs, tiny_voc, tmp_path, monkeypatch):
    given = weights(runs, "none")
    file = runs / "best_model_ultracompact_none.pth"
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--init", file, "--epochs", 1)
    args.no_pretrained = False
    seen = []
    monkeypatch.setattr(train, "run_epochs", lambda _, trainer, *rest: seen.append(trainer))
    train.main(args)
    assert equal(seen[0].student.state_dict(), given)
    assert equal(seen[0].averaged.state_dict(), given)
    assert train.settings_of(args)["init"] == file.name
    assert digest(file).startswith(train.settings_of(args)["init_digest"])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"model": "standard"}, "does not fit"),
        ({"settings": "none"}, "not a student for the classes of VOC"),
        ({"num_classes": 7}, "does not fit"),
        ({"settings": {"allow_val_in_train": True}}, "--allow_val_in_train"),
        ({"settings": {"train_split": "val", "val_split": "train"}}, "--allow_val_in_train"),
    ],
)
def test_init_from_what_may_not_be_used_is_refused(changed, words, runs, tiny_voc, tmp_path):
    content = torch.load(runs / "best_model_ultracompact_none.pth", weights_only=True)
    torch.save(content | changed, tmp_path / "init.pth")
    more = ["--init", tmp_path / "init.pth"]
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *more)
    args.no_pretrained = False
    with pytest.raises((UsageError, DataError), match=words):
        train.main(args)
    assert not (tmp_path / "s").exists()


def test_init_from_another_model_is_refused(teacher_file, tiny_voc, tmp_path):
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--init", teacher_file)
    args.no_pretrained = False
    with pytest.raises(UsageError, match="holds standard, not ultracompact"):
        train.main(args)


def test_init_from_the_file_that_the_run_would_replace_is_refused(runs, tiny_voc):
    file = runs / "best_model_ultracompact_none.pth"
    args = parsed(tiny_voc, runs, "none", "fcn_resnet50", "--init", file, "--overwrite")
    args.no_pretrained, args.resume = False, "none"
    before = digest(file)
    with pytest.raises(UsageError, match="would be overwritten"):
        train.main(args)
    assert digest(file) == before


def test_run_with_init_that_was_killed_in_its_first_epoch_starts_from_the_file_again(
    runs, tiny_voc, tmp_path
):
    """A `last` that says "nothing done yet" is no reason to forget where to start from."""
    file = runs / "best_model_ultracompact_none.pth"
    flags = [tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--init", file, "--epochs", 1]
    weights_of = {}
    for name in ("undisturbed", "killed"):
        args = parsed(*flags)
        args.no_pretrained, args.save_dir = False, str(tmp_path / name)
        if name == "killed":
            nothing_done = {"epoch": 0, "optimizer": {}, "settings": settings}
            train.save_whole(nothing_done, tmp_path / name / "last_ultracompact_none.pth")
        train.main(args)
        settings = train.settings_of(args)
        weights_of[name] = weights(tmp_path / name, "none", "last")
    assert equal(weights_of["killed"], weights_of["undisturbed"])


@pytest.mark.parametrize("mode", ["none", "response"])
def test_class_balance_reaches_the_losses_of_a_step(mode, tiny_voc, teacher_file, tmp_path):
    """One batch, one start: 0 gives the plain losses, and the default other ones."""
    losses = {}
    for power in (0, 0.5):
        more = ["--class_balance", power]
        trainer, loader = begin(tiny_voc, tmp_path / "s", mode, teacher_file, *more)
        assert (trainer.class_weights is None) is (power == 0)
        torch.manual_seed(0)  # dropout
        losses[power] = trainer.step(next(iter(loader)), 0)
    assert abs(losses[0]["ce"] - losses[0.5]["ce"]) > 1e-3
    assert bool(losses[0]["kd"] != losses[0.5]["kd"]) is (mode == "response")


def test_average_of_the_weights_is_what_ema_says(tiny_voc, tmp_path):
    more = ["--ema", 0.3, "--epochs", 20]
    trainer, loader = begin(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *more)
    key = "classifier.1.weight"
    average = trainer.averaged.state_dict()[key].clone()
    trainer.module.train()
    for step, batch in zip(range(30, 32), loader):
        trainer.step(batch, step)
        average = 0.3 * average + 0.7 * trainer.student.state_dict()[key]
        torch.testing.assert_close(trainer.averaged.state_dict()[key], average)


@pytest.mark.parametrize("pretrained, factor", [(True, 0.25), (False, 1)])
def test_rate_warms_up_and_falls_to_zero_with_a_pretrained_backbone_below_the_head(
    pretrained, factor, tiny_voc, tmp_path, fake_torch_home, monkeypatch
):
    """A backbone that starts at random has nothing to keep, and learns at the rate of the head."""
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    more = ["--warmup", 4, "--lr", 1e-3, "--backbone_lr_factor", 0.25]
    trainer, _ = begin(
        tiny_voc, tmp_path / "s", "none", "fcn_resnet50", *more, pretrained=pretrained
    )
    rates = []
    for step in range(EPOCHS * trainer.steps_per_epoch):
        trainer.set_rate(step)
        groups = [group["lr"] for group in trainer.optimizer.param_groups]
        assert groups[0] == groups[1] == pytest.approx(factor * groups[2])
        assert groups[2] == groups[3]
        rates.append(groups[2])
    assert rates.index(max(rates)) == 3 and max(rates) <= 1e-3
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.2 * max(rates)


def test_optimizer_holds_every_parameter_once_and_decays_no_norm_or_bias(
    tiny_voc, teacher_file, tmp_path
):
    trainer, _ = begin(tiny_voc, tmp_path / "s", "feature", teacher_file)
    groups = trainer.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    wanted = [*trainer.student.parameters(), *trainer.adapters.parameters()]
    assert sorted(held) == sorted(id(p) for p in wanted)
    for group in groups:
        assert all((p.ndim > 1) is (group["weight_decay"] > 0) for p in group["params"])


# --------------------------------------------------------------------- reproducible, resumable


def test_second_run_with_one_seed_has_bit_equal_weights_and_history(
    runs, tiny_voc, teacher_file, tmp_path
):
    """With workers, and without the cache of pixels: neither may change what is computed."""
    folder = tmp_path / "again"
    more = ["--workers", 2, "--pixel_cache", "none"]
    train.main(parsed(tiny_voc, folder, "response", teacher_file, *more))
    assert equal(weights(folder, "response"), weights(runs, "response"))
    assert equal(weights(folder, "response", "last"), weights(runs, "response", "last"))
    assert without_times(history(folder, "response")) == without_times(history(runs, "response"))


@pytest.mark.parametrize("mode", MODES)
def test_run_that_fills_the_caches_equals_one_that_finds_them(
    mode, tiny_voc, teacher_file, tmp_path
):
    for name in ("first", "second"):
        folder = tmp_path / name / "checkpoints"
        more = ["--cache_dir", tmp_path / "cache", "--epochs", 1]
        train.main(parsed(tiny_voc, folder, mode, teacher_file, *more))
    first, second = (tmp_path / name / "checkpoints" for name in ("first", "second"))
    assert equal(weights(first, mode), weights(second, mode))
    assert without_times(history(first, mode)) == without_times(history(second, mode))


def test_run_with_another_seed_has_other_weights(runs, tiny_voc, tmp_path):
    train.main(parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--seed", 4, "--epochs", 1))
    assert history(tmp_path / "s", "none")[0]["loss"] != history(runs, "none")[0]["loss"]


@pytest.mark.parametrize("moment", ["inside an epoch", "between best and last"])
def test_resumed_run_equals_the_uninterrupted_one(
    moment, runs, tiny_voc, teacher_file, tmp_path, monkeypatch
):
    folder, mode = tmp_path / "resumed", "feature"  # the mode with the most state
    cache = runs.parent / "cache"
    args = [tiny_voc, folder, mode, teacher_file, "--checkpoint_interval", 2, "--cache_dir", cache]
    with monkeypatch.context() as patch:
        if moment == "inside an epoch":
            step = train.Training.step
            patch.setattr(
                train.Training, "step",
                lambda self, batch, n: interrupt() if n == 7 else step(self, batch, n),
            )  # fmt: skip
        else:
            save = train.save_whole
            patch.setattr(
                train, "save_whole",
                lambda content, path: interrupt()
                if "last" in path.name and content["epoch"] == 3 else save(content, path),
            )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            train.main(parsed(*args))
    saved = torch.load(folder / f"last_ultracompact_{mode}.pth", weights_only=True)
    assert saved["epoch"] == 2
    train.main(parsed(*args))
    for kind in ("best_model", "last", "epoch_4"):
        assert equal(weights(folder, mode, kind), weights(runs, mode, kind)), kind
    assert without_times(history(folder, mode)) == without_times(history(runs, mode))


def interrupt(*_):
    raise KeyboardInterrupt


def test_finished_run_is_not_trained_again(runs, tiny_voc, teacher_file, capsys):
    """Report and curves may be written anew; weights and history stay as they are."""
    kept = [path for path in runs.iterdir() if path.suffix in (".pth", ".jsonl")]
    before = {path: digest(path) for path in kept}
    train.main(parsed(tiny_voc, runs, "none", teacher_file, "--checkpoint_interval", 2))
    assert "nothing left" in capsys.readouterr().out
    assert {path: digest(path) for path in kept} == before


def test_resume_with_other_settings_is_refused_and_changes_nothing(runs, tiny_voc, teacher_file):
    before = {path.name: digest(path) for path in runs.iterdir()}
    with pytest.raises(UsageError, match=r"lr \(was 0.005, now 0.001\)"):
        train.main(parsed(tiny_voc, runs, "none", teacher_file, "--lr", 1e-3))
    assert {path.name: digest(path) for path in runs.iterdir()} == before


def test_fresh_start_over_older_results_needs_overwrite(runs, tiny_voc, teacher_file, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    name = "best_model_ultracompact_none.pth"
    shutil.copy(runs / name, folder / name)
    with pytest.raises(UsageError, match="--overwrite"):
        train.main(parsed(tiny_voc, folder, "none", teacher_file))
    assert digest(folder / name) == digest(runs / name)
    train.main(parsed(tiny_voc, folder, "none", teacher_file, "--overwrite", "--epochs", 1))
    assert torch.load(folder / name, weights_only=True)["epoch"] == 1


def test_teacher_that_lacks_the_features_is_refused_in_feature_mode(
    tiny_voc, tmp_path, monkeypatch
):
    class OnlyLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 21, 1)

        def forward(self, image):
            return {"out": self.conv(image)}

    teacher = kd_losses.Teacher(OnlyLogits(), "only_logits")
    monkeypatch.setattr(kd_losses, "load_teacher", lambda *_: teacher)
    with pytest.raises(DataError, match="only_logits has no features high"):
        train.main(parsed(tiny_voc, tmp_path / "s", "feature", "x.pt2"))
    train.main(parsed(tiny_voc, tmp_path / "s", "response", "x.pt2", "--epochs", 1))
    assert history(tmp_path / "s", "response")[0]["kd"] > 0


def test_extra_images_count_in_the_distillation_term(tiny_voc, teacher_file, sample_root, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for image_id in voc_data.read_split(sample_root, "train")[-16:]:
        shutil.copy(sample_root / "JPEGImages" / f"{image_id}.jpg", photos)
    more = ["--extra_images", photos, "--epochs", 1]
    train.main(parsed(tiny_voc, tmp_path / "s", "response", teacher_file, *more))
    record = history(tmp_path / "s", "response")[0]
    assert record["images"] == 40 and record["kd"] > 0
    report = (tmp_path / "s" / "training_report_ultracompact_response.txt").read_text()
    assert re.search(r"without ground truth +16$", report, re.MULTILINE)


def test_training_on_validation_images_ends_with_status_2_unless_allowed(
    tiny_voc, run_script, tmp_path
):
    args = parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--train_split", "val")
    with pytest.raises(UsageError, match="8 images .*--allow_val_in_train"):
        train.main(args)
    done = run_script(
        "train.py", "--data_root", tiny_voc, "--no_pretrained", "--train_split", "val",
        "--save_dir", tmp_path / "s", "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 2
    assert "--allow_val_in_train" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
    args.allow_val_in_train, args.epochs = True, 1
    train.main(args)
    content = torch.load(tmp_path / "s" / "best_model_ultracompact_none.pth", weights_only=True)
    assert content["settings"]["allow_val_in_train"] is True


def test_early_stopping_after_patience_without_a_better_miou(
    tiny_voc, tmp_path, capsys, monkeypatch
):
    mious = iter([0.3, 0.2, 0.25, 0.9])
    validate = train.Training.validate
    monkeypatch.setattr(
        train.Training,
        "validate",
        lambda self, loader: validate(self, loader) | {"val_miou": next(mious)},
    )
    train.main(parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50", "--patience", 2))
    assert [record["val_miou"] for record in history(tmp_path / "s", "none")] == [0.3, 0.2, 0.25]
    content = torch.load(tmp_path / "s" / "best_model_ultracompact_none.pth", weights_only=True)
    assert content["epoch"] == 1 and content["miou"] == 0.3
    assert "stopped early" in capsys.readouterr().out


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    tiny_voc, tmp_path, monkeypatch
):
    step = train.compute_losses
    calls = []

    def explode(*args):
        losses = step(*args)
        calls.append(1)
        return losses if len(calls) != 5 else losses | {"loss": losses["loss"] * float("nan")}

    monkeypatch.setattr(train, "compute_losses", explode)
    with pytest.raises(DataError, match=r"nan in epoch 2, step 2 \(images sample_train_.*--lr"):
        train.main(parsed(tiny_voc, tmp_path / "s", "none", "fcn_resnet50"))
    saved = torch.load(tmp_path / "s" / "last_ultracompact_none.pth", weights_only=True)
    assert saved["epoch"] == 1
    assert all(v.isfinite().all() for v in saved["student"].values())


# ---------------------------------------------------------------------- the lists of commands

PARSERS = {
    "train.py": train.get_args_parser, "test.py": test_script.get_args_parser,
    "test_pretrained_fcn.py": fcn_script.get_args_parser, "voc_data.py": voc_data.get_args_parser,
}  # fmt: skip


def commands(name):
    """The commands of train.txt or test.txt, as lists of words."""
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not there")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    return [shlex.split(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_every_line_of_the_command_lists_parses(name):
    found = [words for words in commands(name) if words[0] == "python"]
    assert found
    for words in found:
        assert (ROOT / words[1]).is_file()
        try:
            args = parser_of(words[1]).parse_args(words[2:])
        except SystemExit:
            pytest.fail(f"{name}: {shlex.join(words)}")
        if words[1] == "train.py":
            train.check_args(args)
        if words[1] == "test.py":
            test_script.check_args(args)


def parser_of(name):
    """The argument parser of a script, by its name in the lists."""
    if name in PARSERS:
        return PARSERS[name]()
    return runpy.run_path(str(ROOT / name))["get_args_parser"]()


def test_train_txt_trains_all_six_variants():
    parser = train.get_args_parser()
    runs = [
        parser.parse_args(words[2:]) for words in commands("train.txt") if words[1] == "train.py"
    ]
    variants = {(args.model, args.kd_mode) for args in runs}
    assert variants == {(model, mode) for model in kd_losses.STUDENTS for mode in MODES}


def test_time_left_counts_the_pixels_of_the_epochs_to_come():
    """After two epochs of 10 s on 128 px crops, and before one of them and two on 256 px."""
    flags = "--epochs 5 --early_epochs 3 --early_crop 128 --crop_size 256"
    args = train.get_args_parser().parse_args(flags.split())
    history = [{"epoch": 1, "seconds": 10}, {"epoch": 2, "seconds": 8, "val_seconds": 2}]
    assert train.time_left(args, history) == pytest.approx(10 + 2 * 4 * 10)
    history += [{"epoch": 3, "seconds": 10}, {"epoch": 4, "seconds": 30}]
    assert train.time_left(args, history) == pytest.approx((10 + 10 + 30) / (1 + 1 + 4) * 4)
    history.append({"epoch": 5, "seconds": 40})
    assert train.time_left(args, history) == 0


# --------------------------------------------------------------------------------- test.py


def measure(tiny_voc, output, *more):
    """Run test.py quickly; returns the rows of results.json, read strictly."""
    flags = [
        "--data_root", tiny_voc, "--output_dir", output, "--device", "cpu", "--workers", 0,
        "--speed_size", 33, "--speed_repeats", 2, *more,
    ]  # fmt: skip
    test_script.main(test_script.get_args_parser().parse_args([str(flag) for flag in flags]))
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def tested(runs, teacher_file, tiny_voc, tmp_path_factory):
    """test.py over every checkpoint of a folder, with overlays: (output folder, rows)."""
    folder = tmp_path_factory.mktemp("tested")
    for path in (*runs.glob("best_model_*.pth"), *runs.glob("history_*"), teacher_file):
        shutil.copy(path, folder)
    output = folder / "report"
    more = ["--save_dir", folder, "--visualize", "--num_vis", 2]
    return output, measure(tiny_voc, output, *more)


@pytest.mark.parametrize(
    "name, history",
    [
        ("best_model_standard_none.pth", "history_standard_none.jsonl"),
        ("epoch_20_standard_none.pth", "history_standard_none.jsonl"),
        ("first_stage_standard_none.pth", "first_stage_history_standard_none.jsonl"),
    ],
)
def test_history_of_a_checkpoint_is_that_of_its_run(name, history, tmp_path):
    student = SimpleNamespace(path=tmp_path / name, run="standard_none")
    assert test_script.history_of(student) == tmp_path / history


@pytest.mark.parametrize(
    "flags, folder",
    [
        ("", "report"),
        ("--checkpoint a/best_model_standard_none.pth", "report/best_model_standard_none"),
        ("--checkpoint a/best_model_x.pth b.pth c.pth", "report/best_model_x_and_2_more"),
        ("--model standard", "report/standard"),
    ],
)
def test_a_selection_does_not_replace_the_comparison(flags, folder):
    args = test_script.get_args_parser().parse_args(flags.split())
    assert test_script.default_output(args) == Path(folder)


def test_without_checkpoints_every_best_model_of_the_folder_is_tested_in_order(tested):
    _, rows = tested
    assert [(row["model"], row["kd_mode"]) for row in rows] == [
        *(("ultracompact", mode) for mode in MODES), ("standard", "none"),
    ]  # fmt: skip


def test_row_has_miou_score_gain_and_cost(tested, runs):
    _, rows = tested
    for row in rows[:3]:
        path = runs / f"best_model_ultracompact_{row['kd_mode']}.pth"
        content = torch.load(path, weights_only=True)
        assert row["miou"] == pytest.approx(content["miou"], abs=1e-3)
        assert row["parameters"] == content["parameters"]
        assert row["score"] == pytest.approx(4 * row["miou"] / (1 + row["parameters"] / 1e6))
        assert row["gain"] == pytest.approx(100 * (row["miou"] - rows[0]["miou"]))
        assert row["macs"] > 0 and row["latency_ms"] > 0 and row["images"] == 8
        present = [iou for iou in row["iou"].values() if iou is not None and iou == iou]
        assert statistics.mean(present) == pytest.approx(row["miou"])
    assert rows[3]["gain"] == 0


def test_tables_in_four_formats_say_the_same(tested):
    output, rows = tested
    markdown = (output / "results.md").read_text().splitlines()
    latex = (output / "results.tex").read_text()
    with open(output / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and "\\toprule" in latex
    assert set(table[0]) >= {"model", "kd_mode", "miou", "score", *(f"iou_{c}" for c in CLASSES)}
    for line, from_csv, row in zip(markdown[2:], table, rows):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        shown = dict(zip((cell.strip() for cell in markdown[0].strip("|").split("|")), cells))
        assert [shown["model"], shown["KD"]] == [row["model"], row["kd_mode"]]
        figures = [f"{100 * row['miou']:.2f}", f"{row['parameters']:,}", f"{row['score']:.3f}"]
        assert [shown["mIoU %"], shown["parameters"], shown["score"]] == figures
        assert float(from_csv["miou"]) == row["miou"]
        assert any(all(f in line for f in figures) for line in latex.splitlines())
    per_class = (output / "per_class.md").read_text()
    assert all(name in per_class for name in CLASSES)


@pytest.mark.parametrize("name", ["results.json"])
def test_json_is_strict_json_without_nan(tested, name):
    """An absent class is NaN in Python; JSON has no such number, and other readers stop at it."""
    output, _ = tested

    def refuse(constant):
        pytest.fail(f"{name} holds {constant}, which is not JSON")

    json.loads((output / name).read_text(), parse_constant=refuse)


def test_visualize_writes_a_sheet_for_each_variant_and_one_of_all(tested):
    output, rows = tested
    names = {f"overlays_{row['model']}_{row['kd_mode']}.jpg" for row in rows}
    names |= {"overlays_compared.jpg", "per_class_iou.png", "training_curves.png"}
    assert names <= {path.name for path in output.iterdir()}
    for name in names:
        with Image.open(output / name) as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture.convert("L")).std() > 5


def test_one_checkpoint_alone_is_tested_at_its_own_eval_size(runs, tiny_voc, tmp_path):
    path = tmp_path / "small.pth"
    content = torch.load(runs / "best_model_ultracompact_none.pth", weights_only=True)
    torch.save(content | {"eval_size": 65}, path)
    (row,) = measure(tiny_voc, tmp_path / "a", "--checkpoint", path)
    assert row["eval_size"] == 65 and row["gain"] == 0
    (native,) = measure(tiny_voc, tmp_path / "b", "--checkpoint", path, "--eval_size", 0)
    assert native["eval_size"] == 0
    assert native["miou"] == pytest.approx(content["miou"], abs=1e-3)
    assert native["loss"] != row["loss"]


def test_several_seeds_of_one_variant_are_summed_up(runs, tiny_voc, tmp_path):
    second = tmp_path / "other_seed.pth"
    content = torch.load(runs / "best_model_ultracompact_none.pth", weights_only=True)
    state = content["model_state_dict"]
    state["classifier.1.bias"][3] += 1000  # says "bird" everywhere
    content["settings"]["seed"] = 4
    torch.save(content, second)
    paths = [runs / "best_model_ultracompact_none.pth", second]
    rows = measure(tiny_voc, tmp_path / "out", "--checkpoint", *paths)
    mious = [100 * row["miou"] for row in rows]
    assert len(mious) == 2 and mious[0] != mious[1]
    line = (tmp_path / "out" / "runs.md").read_text().splitlines()[2]
    assert f"{statistics.mean(mious):.2f}" in line and f"{statistics.stdev(mious):.2f}" in line
    measure(tiny_voc, tmp_path / "out", "--checkpoint", second, second)  # one run, twice
    assert (tmp_path / "out" / "runs.md").read_text().splitlines()[2].split("|")[6].strip() == "-"


def test_several_seeds_beside_the_row_of_a_teacher(runs, tiny_voc, tmp_path):
    output = tmp_path / "out"
    paths = [runs / "best_model_ultracompact_none.pth"] * 2
    (row, _) = measure(tiny_voc, output, "--checkpoint", *paths)
    teacher = {name: row[name] for name in row.keys() - {"seed", "settings", "gain"}}
    teacher |= {"model": "fcn_resnet50", "kd_mode": "teacher"}
    (output / "teacher_fcn_resnet50.json").write_text(json.dumps(teacher))
    rows = measure(tiny_voc, output, "--checkpoint", *paths)
    assert [row["kd_mode"] for row in rows] == ["none", "none", "teacher"]
    assert len((output / "runs.md").read_text().splitlines()) == 3


def test_seeds_on_gpus_that_chose_another_precision_are_seeds_of_one_run():
    on_t4, on_a100 = ({"settings": {"lr": 1, "amp": "auto", "amp_dtype": dtype}}
                      for dtype in ("float16", "bfloat16"))  # fmt: skip
    assert test_script.choices(on_t4) == test_script.choices(on_a100) == {"lr": 1, "amp": "auto"}


def test_row_of_a_run_that_is_not_finished_says_so_and_has_no_gain(runs, tiny_voc, tmp_path):
    for path in (*runs.glob("best_model_*.pth"), *runs.glob("history_*")):
        shutil.copy(path, tmp_path)
    file = tmp_path / "history_ultracompact_response.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    rows = measure(tiny_voc, tmp_path / "out", "--save_dir", tmp_path)
    gains = {row["kd_mode"]: row["gain"] for row in rows}
    assert gains["response"] is None and gains["none"] == 0 and gains["feature"] is not None
    note = f"Not finished: ultracompact response has had 2 of its {EPOCHS} epochs so far."
    assert (tmp_path / "out" / "results.md").read_text().endswith(f"\n\n{note}\n")


def test_gain_is_over_runs_that_are_no_shorter():
    """Photographs make an epoch longer, unless --epoch_images fixes it: then they may count."""
    for epoch_images, wanted in ((0, []), (64, [0.25])):
        none = {"epochs": 5, "epoch_images": epoch_images, "data_key": "a"}
        more = {**none, "extra_images": "photos", "data_key": "b", "teacher": "x"}
        rows = [
            {"model": "standard", "kd_mode": mode, "miou": 0.25, "settings": settings}
            for mode, settings in (("none", none), ("response", more))
        ]
        assert test_script.alone_like(rows[1], rows) == wanted
        rows[1]["settings"] = {**none, "teacher": "x"}  # the same images
        assert test_script.alone_like(rows[1], rows) == [0.25]


@pytest.mark.parametrize(
    "changed, words", [({}, ""), ({"allow_val_in_train": True}, "--allow_val_in_train"),
                       ({"val_split": "mini"}, "kept apart from 'mini', not from 'val'"),
                       ({"val_split": "train"}, "kept apart from 'train', not from 'val'")]
)  # fmt: skip
def test_figures_of_a_network_that_may_know_the_images_say_so(
    changed, words, runs, tiny_voc, tmp_path, capsys
):
    content = torch.load(runs / "best_model_ultracompact_none.pth", weights_only=True)
    content["settings"] |= changed
    torch.save(content, tmp_path / "a.pth")
    measure(tiny_voc, tmp_path / "out", "--checkpoint", tmp_path / "a.pth")
    for text in (capsys.readouterr().out, (tmp_path / "out" / "results.md").read_text()):
        assert words in text and ("it may know these images" in text) is bool(words)


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(runs, tiny_voc, tmp_path):
    """Two learning rates: two rows that name them; two overlay sheets."""
    second = tmp_path / "other_rate.pth"
    content = torch.load(runs / "best_model_ultracompact_none.pth", weights_only=True)
    settings = content["settings"] | {"lr": 0.5, "seed": 7, "save_dir": "elsewhere"}
    torch.save(content | {"settings": settings}, second)
    paths = [runs / "best_model_ultracompact_none.pth", second]
    more = ["--visualize", "--num_vis", 2]
    measure(tiny_voc, tmp_path / "out", "--checkpoint", *paths, *more)
    table = (tmp_path / "out" / "runs.md").read_text()
    rates = [row.split("|")[3].strip() for row in table.splitlines()[2:]]
    assert sorted(rates) == sorted([f"lr {content['settings']['lr']}", "lr 0.5"])
    response = runs / "best_model_ultracompact_response.pth"
    measure(tiny_voc, tmp_path / "gain", "--checkpoint", *paths, response)
    lines = (tmp_path / "gain" / "runs.md").read_text().splitlines()[2:]
    gains = {tuple(cell.strip() for cell in line.split("|")[2:4]): line.split("|")[7].strip()
             for line in lines}  # fmt: skip
    assert gains["none", "lr 0.5"] == gains["none", f"lr {content['settings']['lr']}"] == "+0.00"
    mious = [100 * kd_losses.read_checkpoint(path)["miou"] for path in (response, paths[0])]
    assert float(gains["response", ""]) == pytest.approx(mious[0] - mious[1], abs=0.02)
    names = {path.name for path in (tmp_path / "out").glob("overlays_*")}
    assert {"overlays_ultracompact_none.jpg", "overlays_ultracompact_none_2.jpg"} <= names


def test_no_checkpoint_at_all_is_an_error_that_names_train_py(tiny_voc, tmp_path):
    with pytest.raises(DataError, match="no best_model_.*train.py"):
        measure(tiny_voc, tmp_path / "out", "--save_dir", tmp_path)


def test_model_flag_that_disagrees_with_the_checkpoint_is_refused(runs, tiny_voc, tmp_path):
    path = runs / "best_model_ultracompact_none.pth"
    with pytest.raises(UsageError, match="holds ultracompact, not --model standard"):
        measure(tiny_voc, tmp_path / "out", "--checkpoint", path, "--model", "standard")


def test_model_flag_alone_chooses_among_the_checkpoints(tested, tiny_voc, tmp_path):
    folder = tested[0].parent
    rows = measure(tiny_voc, tmp_path, "--save_dir", folder, "--model", "standard")
    assert [row["model"] for row in rows] == ["standard"]


def photographs(runs, output, *paths):
    flags = ["--checkpoint", runs / "best_model_ultracompact_none.pth", "--image", *paths,
             "--output_dir", output, "--device", "cpu"]  # fmt: skip
    test_script.main(test_script.get_args_parser().parse_args([str(flag) for flag in flags]))


def test_image_writes_an_overlay_for_each_photograph_and_needs_no_data(
    runs, tiny_voc, tmp_path, monkeypatch
):
    monkeypatch.setattr(voc_data, "find_voc", None)
    folder = tmp_path / "photos"
    folder.mkdir()
    files = sorted((tiny_voc / "JPEGImages").iterdir())[:2]
    shutil.copy(files[0], folder)
    (folder / "notes.txt").write_text("no picture")
    photographs(runs, tmp_path / "out", folder, files[1])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(f"photo_{path.stem}.jpg" for path in files)
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.size[0] > 1.5 * picture.size[1] / 2 > 50


def test_photographs_of_one_name_do_not_overwrite_each_other(runs, tiny_voc, tmp_path):
    photo = next((tiny_voc / "JPEGImages").iterdir())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(photo, tmp_path / name / "beach.jpg")
    photographs(runs, tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert len(list((tmp_path / "out").iterdir())) == 2


# -------------------------------------------------------------------------- test_pretrained_fcn.py


def test_pretrained_fcn_end_to_end_leaves_its_row_for_the_table(
    fake_torch_home, tiny_voc, runs, tmp_path, monkeypatch, capsys
):
    """The default teacher from torchvision's cache, on a list of two images."""
    root = tmp_path / "VOC2012"
    shutil.copytree(tiny_voc, root)
    ids = voc_data.read_split(root, "val")[:2]
    (root / "ImageSets" / "Segmentation" / "two.txt").write_text("\n".join(ids))
    monkeypatch.setenv("TORCH_HOME", str(fake_torch_home))
    flags = ["--data_root", root, "--val_split", "two", "--output_dir", tmp_path / "out",
             "--device", "cpu", "--speed_size", 33, "--speed_repeats", 1, "--workers",
             0]  # fmt: skip
    fcn_script.main(fcn_script.get_args_parser().parse_args([str(flag) for flag in flags]))
    out = capsys.readouterr().out
    (row,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("teacher_*.json")]
    assert row["model"] == "fcn_resnet50" and row["images"] == 2
    assert row["parameters"] == 32_957_013  # of FCN-ResNet50 without its auxiliary head
    assert f"mIoU {row['miou']:.4f}" in out and all(name in out for name in CLASSES)

    weights = fake_torch_home / "hub" / "checkpoints" / FCN_FILE
    teacher = kd_losses.load_teacher("fcn_resnet50", weights)
    matrix = voc_data.ConfusionMatrix()
    for image_id in ids:
        item = voc_data.Item(
            image_id,
            root / f"JPEGImages/{image_id}.jpg",
            root / f"SegmentationClass/{image_id}.png",
        )
        image, labels = (torch.from_numpy(array) for array in voc_data.read_item(item))
        logits = teacher(voc_data.normalise(image.permute(2, 0, 1)[None]))["out"]
        matrix.update(labels, logits[0].argmax(0))
    assert row["miou"] == pytest.approx(matrix.miou, abs=1e-4)

    path = runs / "best_model_ultracompact_none.pth"
    rows = measure(root, tmp_path / "out", "--checkpoint", path, "--val_split", "two")
    assert [r["kd_mode"] for r in rows] == ["none", "teacher"]
    assert "fcn_resnet50" in (tmp_path / "out" / "results.md").read_text()
    capsys.readouterr()
    rows = measure(root, tmp_path / "out", "--checkpoint", path)  # other images: no row beside it
    assert [r["kd_mode"] for r in rows] == ["none"]
    assert "measured on another split" in capsys.readouterr().out
