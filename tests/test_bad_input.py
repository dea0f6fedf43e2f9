"""Bad input: one message on stderr, status 1 (data) or 2 (usage), no traceback, nothing written.

Most of it calls the scripts' `main` in this process, through the `run_script` of voc_data that
every script ends in: an exception that it does not turn into a message fails the test by itself.
"""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kd_losses
import test_pretrained_fcn
import train
import voc_data
from conftest import load_test_script
from model_ultracompact import UltraCompactSegmentationModel

TRAIN_IDS = [f"t{number}" for number in range(6)]
VAL_IDS = ["v0", "v1"]
BEST, LAST = "best_model_ultracompact_none.pth", "last_ultracompact_none.pth"


test_script = load_test_script()
test_script.__test__ = test_pretrained_fcn.__test__ = False  # no tests in there


# ------------------------------------------------------------------------- data made on the fly


def write_image(path, size=(48, 40), seed=0):
    """A small picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path, labels):
    """A palette PNG of labels."""
    mask = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    mask.putpalette(voc_data.voc_palette().ravel().tolist())
    mask.save(path)


@pytest.fixture
def voc(tmp_path):
    """A VOC folder of six train and two val images, to break."""
    root = tmp_path / "voc"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for number, image_id in enumerate(TRAIN_IDS + VAL_IDS):
        write_image(image_of(root, image_id), seed=number)
        labels = np.zeros((40, 48))
        labels[8:30, 10:40] = 1 + number
        write_mask(mask_of(root, image_id), labels)
    list_of(root, "train").write_text("\n".join(TRAIN_IDS) + "\n")
    list_of(root, "val").write_text("\n".join(VAL_IDS) + "\n")
    return root


def image_of(root, image_id):
    return root / "JPEGImages" / f"{image_id}.jpg"


def mask_of(root, image_id):
    return root / "SegmentationClass" / f"{image_id}.png"


def list_of(root, split):
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


# ------------------------------------------------------------------------- running a script here


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(module, *arguments)`: its main in this process -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(module, *arguments):
        capsys.readouterr()
        try:
            args = module.get_args_parser().parse_args([str(argument) for argument in arguments])
            voc_data.run_script(module.main, args)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)
    for worker in multiprocessing.active_children():  # an error that is kept keeps its loader
        with contextlib.suppress(RuntimeError):  # torch notices the death of a worker
            worker.kill()
            worker.join()
            time.sleep(0.1)


@pytest.fixture
def run_train(run, voc, tmp_path):
    """`run_train(*flags)`: a training of one epoch on `voc`, other flags last."""

    def call(*flags, pretrained=False):
        return run(
            train, "--data_root", voc, "--epochs", 1, "--batch_size", 2, "--crop_size", 33,
            "--workers", 0, "--device", "cpu", "--cache_dir", tmp_path / "cache", "--save_dir",
            tmp_path / "save", *([] if pretrained else ["--no_pretrained"]), *flags,
        )  # fmt: skip

    return call


def contents(folder):
    """{path: bytes} of every file below a folder; {} where there is none."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result, status, *needles, lines=1):
    """One message on stderr with these words in it, and the status."""
    code, _, stderr = result
    assert "Traceback" not in stderr
    assert stderr.count(": error: ") == 1, stderr or "nothing on stderr"
    if lines:
        assert len(stderr.strip().splitlines()) == lines, stderr
    assert code == status, stderr
    for needle in needles:
        assert str(needle) in stderr, f"{needle!r} is not in {stderr!r}"


def assert_nothing_written(tmp_path, *but):
    """No file below tmp_path but the data, the caches and what is named."""
    allowed = {"voc", "cache", *but}
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    strange = [path for path in found if path.relative_to(tmp_path).parts[0] not in allowed]
    assert not strange
    assert not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------ broken data


def missing_folder(root):
    shutil.rmtree(root)
    return ["was not found", "does not exist"]


def empty_list(root):
    list_of(root, "train").write_text("\n \n")
    return ["train.txt", "empty"]


def missing_list(root):
    list_of(root, "val").unlink()
    return ["val.txt does not exist", "train"]


def list_that_is_no_text(root):
    list_of(root, "train").write_bytes(b"\xff\xfe\x00t0\n")
    return ["train.txt"]


def id_without_image(root):
    image_of(root, "t3").unlink()
    return ["t3.jpg", "missing"]


def id_without_mask(root):
    mask_of(root, "v1").unlink()
    return ["v1.png", "missing"]


def truncated_jpeg(root):
    path = image_of(root, "t3")
    path.write_bytes(path.read_bytes()[:700])
    return [path, "cannot be read as an image"]


def empty_jpeg(root):
    image_of(root, "t3").write_bytes(b"")
    return [image_of(root, "t3"), "cannot be read as an image"]


def truncated_jpeg_in_val(root):
    path = image_of(root, "v0")
    path.write_bytes(path.read_bytes()[:700])
    return [path, "cannot be read as an image"]


def text_for_an_image(root):
    image_of(root, "t3").write_text("<html>404</html>")
    return [image_of(root, "t3"), "cannot be read as an image"]


def truncated_mask(root):
    path = mask_of(root, "t3")
    path.write_bytes(path.read_bytes()[:-40])
    return [path, "cannot be read as a mask"]


def mask_of_another_size(root):
    write_mask(mask_of(root, "t3"), np.zeros((41, 48)))
    return [mask_of(root, "t3"), "48x41", "48x40"]


def mask_turned_on_its_side(root):
    write_mask(mask_of(root, "t3"), np.zeros((48, 40)))
    return [mask_of(root, "t3"), "40x48", "48x40"]


def mask_with_label_21(root):
    write_mask(mask_of(root, "t3"), np.full((40, 48), 21))
    return [mask_of(root, "t3"), "21"]


def mask_with_label_254(root):
    write_mask(mask_of(root, "t3"), np.full((40, 48), 254))
    return [mask_of(root, "t3"), "254"]


def mask_with_labels_out_of_range_in_val(root):
    write_mask(mask_of(root, "v0"), np.full((40, 48), 100))
    return [mask_of(root, "v0"), "100"]


def rgb_mask(root):
    Image.new("RGB", (48, 40)).save(mask_of(root, "t3"))
    return [mask_of(root, "t3"), "RGB"]


def sixteen_bit_mask(root):
    Image.fromarray(np.zeros((40, 48), dtype=np.uint16)).save(mask_of(root, "t3"))
    return [mask_of(root, "t3"), "I;16"]


def one_bit_mask(root):
    Image.new("1", (48, 40)).save(mask_of(root, "t3"))
    return [mask_of(root, "t3")]


BROKEN_DATA = [
    missing_folder, empty_list, missing_list, list_that_is_no_text, id_without_image,
    id_without_mask, truncated_jpeg, empty_jpeg, truncated_jpeg_in_val, text_for_an_image,
    truncated_mask, mask_of_another_size, mask_turned_on_its_side, mask_with_label_21,
    mask_with_label_254, mask_with_labels_out_of_range_in_val, rgb_mask, sixteen_bit_mask,
    one_bit_mask,
]  # fmt: skip


def named(functions):
    return [pytest.param(function, id=function.__name__) for function in functions]


@pytest.mark.parametrize("break_it", named(BROKEN_DATA))
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_broken_data_stops_training(break_it, cache, voc, run_train, tmp_path):
    needles = break_it(voc)
    result = run_train("--pixel_cache", cache)
    assert_refused(result, 1, *needles, lines=None if break_it is missing_folder else 1)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "break_it, cache",
    [(truncated_jpeg, "none"), (rgb_mask, "auto"), (truncated_jpeg_in_val, "auto")],
    ids=["training", "pixel cache", "validation"],
)
def test_broken_file_met_in_a_worker(break_it, cache, voc, run_train, tmp_path, monkeypatch):
    """A worker hands its error over in a traceback; the person still gets one line."""
    # torch gives a worker five seconds to end after an error: less will do here
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    needles = break_it(voc)
    assert_refused(run_train("--workers", 1, "--pixel_cache", cache), 1, *needles)
    assert_nothing_written(tmp_path)


def test_broken_val_image_is_met_before_training(voc, run_train, tmp_path):
    """Not at the first validation, epochs later."""
    needles = truncated_jpeg_in_val(voc)
    assert_refused(run_train("--epochs", 2, "--val_every", 2), 1, *needles)
    assert_nothing_written(tmp_path)


def test_broken_file_met_in_a_worker_ends_the_process(voc, run_script, tmp_path):
    """The message alone is not enough: the process and its workers must end, with the status."""
    needles = truncated_jpeg(voc)
    done = run_script(
        "train.py", "--data_root", voc, "--no_pretrained", "--batch_size", 2, "--crop_size", 33,
        "--workers", 1, "--pixel_cache", "none", "--device", "cpu", "--epochs", 1,
        "--save_dir", tmp_path / "save", timeout=45,
    )  # fmt: skip
    assert_refused((done.returncode, done.stdout, done.stderr), 1, *needles)
    assert not (tmp_path / "save").exists()


def test_python_voc_data_lists_every_broken_file_in_one_pass(voc, run_script, tmp_path):
    """Six broken files of seven kinds of break: all named at once, none of the whole ones."""
    truncated = image_of(voc, "t0")
    truncated.write_bytes(truncated.read_bytes()[:700])
    image_of(voc, "t1").unlink()
    mask_of(voc, "t2").unlink()
    write_mask(mask_of(voc, "t3"), np.full((40, 48), 77))
    Image.new("RGB", (48, 40)).save(mask_of(voc, "t4"))
    write_mask(mask_of(voc, "v1"), np.zeros((40, 47)))
    list_of(voc, "trainval").write_text("\n".join(TRAIN_IDS + VAL_IDS) + "\n")  # all of it twice
    before = contents(voc)
    done = run_script("voc_data.py", "--data_root", str(voc))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    head, *listed = done.stderr.strip().splitlines()
    wanted = [
        "JPEGImages/t0.jpg", "JPEGImages/t1.jpg", "SegmentationClass/t2.png",
        "SegmentationClass/t3.png", "SegmentationClass/t4.png", "SegmentationClass/v1.png",
    ]  # fmt: skip
    for path in wanted:
        assert sum(line.strip().startswith(str(voc / path)) for line in listed) >= 1, path
    assert not any("t5" in line or "v0" in line for line in listed)
    assert "6 broken" in head, "a file that two lists name is one broken file"
    assert contents(voc) == before


def test_python_voc_data_leaves_out_lists_that_have_no_ground_truth(voc, run):
    """Both official archives unpack into one folder, and the masks of `test` are nobody's."""
    image_of(voc, "x0").write_bytes(image_of(voc, "t0").read_bytes())
    list_of(voc, "test").write_text("x0\n")
    status, out, _ = run(voc_data, "--data_root", voc)
    assert status == 0 and "no ground truth: test" in out and "val (2)" in out
    assert_refused(run(voc_data, "--data_root", voc, "--splits", "test"), 1, "x0.png", lines=None)
    mask_of(voc, "v0").unlink()
    image_of(voc, "v0").unlink()
    assert "val (2)" in run(voc_data, "--data_root", voc)[1], "one id that lacks both is one id"


def test_python_voc_data_lists_a_broken_list_with_the_broken_files(voc, run):
    """One empty list does not hide what is broken in the others."""
    list_of(voc, "other").write_text("")
    needles = truncated_jpeg(voc)
    status, _, stderr = run(voc_data, "--data_root", voc)
    assert status == 1 and "other.txt" in stderr
    for needle in needles:
        assert str(needle) in stderr


@pytest.mark.parametrize("module", [test_script, test_pretrained_fcn], ids=["test", "teacher"])
def test_broken_data_stops_evaluation(module, voc, run, student_file, tmp_path):
    needles = truncated_jpeg_in_val(voc)
    network = ["--checkpoint"] if module is test_script else ["--teacher"]
    out = tmp_path / "report"
    result = run(
        module, *network, student_file(), "--data_root", voc, "--device", "cpu", "--workers", 0,
        "--output_dir", out,
    )  # fmt: skip
    assert_refused(result, 1, *needles)
    assert not out.exists()


# -------------------------------------------------------------- pictures that are read, not refused


def saved(path, picture, **options):
    picture.save(path, **options)
    return voc_data.read_image(path)


def test_odd_pictures_are_read_correctly(tmp_path):
    """Grey, CMYK, with alpha, palette, 16-bit, rotated by EXIF: each the picture that was meant."""
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)[None].repeat(40, axis=0)
    grey = saved(tmp_path / "grey.png", Image.fromarray(ramp))
    assert (grey == ramp[..., None]).all() and grey.shape == (40, 48, 3)
    sixteen = saved(tmp_path / "sixteen.png", Image.fromarray(ramp.astype(np.uint16) * 257))
    assert sixteen.dtype == np.uint8 and (sixteen == ramp[..., None]).all()
    colour = np.dstack([ramp, 255 - ramp, ramp // 2])
    alpha = np.dstack([colour, np.full_like(ramp, 255)])
    assert (saved(tmp_path / "alpha.png", Image.fromarray(alpha)) == colour).all()
    cmyk = saved(tmp_path / "cmyk.jpg", Image.fromarray(colour).convert("CMYK"), quality=95)
    assert np.abs(cmyk.astype(int) - colour).max() < 24
    two = Image.fromarray((ramp > 99).astype(np.uint8)).convert("P")
    two.putpalette([10, 20, 30, 200, 100, 50])
    palette = saved(tmp_path / "palette.png", two)
    assert (palette == np.where((ramp > 99)[..., None], [200, 100, 50], [10, 20, 30])).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = saved(tmp_path / "turned.png", Image.fromarray(colour), exif=exif)
    assert (turned == np.rot90(colour, -1)).all()


def test_training_on_odd_pictures(voc, run_train):
    """The pixel cache, which sizes itself by the headers, takes them too."""
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)[None].repeat(40, axis=0)
    Image.fromarray(ramp).save(image_of(voc, "t0"))
    Image.fromarray(ramp).convert("CMYK").save(image_of(voc, "t1"))
    image_of(voc, "t2").unlink()
    Image.fromarray(ramp.astype(np.uint16) * 257).save(image_of(voc, "t2").with_suffix(".png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.dstack([ramp] * 3)).save(image_of(voc, "v0"), exif=exif)
    write_mask(mask_of(voc, "v0"), np.zeros((48, 40)))
    status, _, stderr = run_train()
    assert (status, stderr) == (0, "")


# ----------------------------------------------------------------------------------- bad flags

BAD_FLAGS = [
    "--epochs 0", "--epochs -1", "--epochs many", "--batch_size 0", "--batch_size 7", "--lr 0",
    "--lr -1", "--lr nan", "--lr inf", "--temperature 0", "--temperature -2", "--temperature nan",
    "--temperature inf", "--alpha -0.1", "--alpha nan", "--alpha inf", "--beta -1", "--beta nan",
    "--beta inf", "--crop_size 32", "--crop_size 0", "--scale 2 1", "--scale 0 1", "--scale 1 inf",
    "--scale 1 nan", "--colour_jitter 2", "--colour_jitter -1", "--eval_size 20",
    "--eval_size -1", "--teacher_size 10", "--workers -1", "--weight_decay -1",
    "--weight_decay inf", "--backbone_lr_factor -1", "--backbone_lr_factor inf", "--warmup -1",
    "--ema 1", "--ema -0.1", "--loss_stride 3", "--loss_stride 0", "--val_every 0",
    "--patience -1", "--checkpoint_interval 0", "--seed 99999999999999999999",
    "--seed -99999999999999999999", "--device cuda:99", "--device gpu", "--device meta",
    "--amp float16", "--model huge", "--kd_mode both", "--optimizer adam", "--schedule step",
    "--kd_levels top", "--train_split val", "--extra_images voc", "--save_dir", "--no_such_flag",
    "--kd_mode response --teacher resnet9000", "--class_balance 2", "--class_balance -1",
    "--cutmix 2", "--cutmix -0.1", "--cutmix 0.5 --batch_size 1", "--epoch_images -1",
    "--freeze high", "--init any.pth", "--kd_levels low --kd_mode feature --freeze low",
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag(flags, run_train, tmp_path):
    status, out, stderr = run_train(*flags.split())
    needle = "teacher" if "--teacher" in flags else flags.split()[0].lstrip("-")
    said = stderr.strip().splitlines()[-1]  # argparse prints the usage before it
    argparse_usage = stderr.startswith("usage: ")
    assert_refused((status, out, said), 2, needle, lines=None if argparse_usage else 1)
    assert argparse_usage or said == stderr.strip()
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "flags", ["--num_vis 1", "--eval_size 20", "--eval_size -5", "--photo_size 0",
              "--speed_size 1", "--speed_repeats 0", "--workers -1", "--device cuda:99",
              "--model standard"]
)  # fmt: skip
def test_bad_flag_of_test(flags, run, voc, student_file, tmp_path):
    result = run(
        test_script, "--checkpoint", student_file(), "--data_root", voc, "--device", "cpu",
        "--workers", 0, "--output_dir", tmp_path / "report", *flags.split(),
    )  # fmt: skip
    assert_refused(result, 2, flags.split()[0].lstrip("-"))
    assert_nothing_written(tmp_path, "student.pth")


@pytest.mark.parametrize(
    "flags", ["--eval_size -5", "--eval_size 20", "--speed_size 1", "--speed_repeats 0",
              "--workers -1", "--device cuda:99"]
)  # fmt: skip
def test_bad_flag_of_test_pretrained_fcn(flags, run, voc, student_file, tmp_path):
    result = run(
        test_pretrained_fcn, "--teacher", student_file(), "--data_root", voc, "--device", "cpu",
        "--workers", 0, "--output_dir", tmp_path / "report", *flags.split(),
    )  # fmt: skip
    assert_refused(result, 2, flags.split()[0].lstrip("-"))
    assert_nothing_written(tmp_path, "student.pth")


def test_usage_error_as_a_person_meets_it(run_script, voc, tmp_path):
    """A real process: the status reaches the shell."""
    save = tmp_path / "save"
    done = run_script("train.py", "--temperature", "0", "--save_dir", save, "--data_root", voc)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train.py: error: --temperature must be positive, not 0.0\n"
    assert not save.exists()


def test_save_dir_and_cache_dir_that_are_files(run_train, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for flag in ("--save_dir", "--cache_dir"):
        assert_refused(run_train(flag, tmp_path / "taken"), 1, "taken")
        assert (tmp_path / "taken").read_text() == "mine"
    assert not (tmp_path / "save").exists()


def test_photographs_that_are_missing_or_broken(run, student_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    for path, needle in (
        ("nowhere.jpg", "nowhere.jpg"), ("empty", "no picture"), ("broken.jpg", "broken.jpg"),
    ):  # fmt: skip
        arguments = "--device", "cpu", "--image", path, "--output_dir", tmp_path / "report"
        result = run(test_script, "--checkpoint", student_file(), *arguments)
        assert_refused(result, 1, needle)
    assert not (tmp_path / "report").exists()


def test_turned_photograph_with_a_broken_exif_tag_is_named(tmp_path):
    """Orientation 6, and a ResolutionUnit that does not fit into its 16 bits."""
    tags = ((0x0112, 3, 6), (0x0128, 4, 70_000))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(voc_data.DataError, match="a.jpg cannot be read as an image"):
        voc_data.read_image(tmp_path / "a.jpg")


def test_files_beside_the_pictures_do_not_take_their_place(voc):
    """Labels of other tools, masks, what a Mac and Jupyter leave; a list with a mark in front."""
    before = voc_data.list_items(voc, "train")
    pictures = voc / "JPEGImages"
    for name in ("t0.json", "t0.xml", "._t0.jpg", "t1.png"):
        (pictures / name).write_text("no picture")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (pictures / name).mkdir()
        (pictures / name / "t0.jpg").write_text("no picture")
        (pictures / name / "more.jpg").write_text("no picture")
    list_of(voc, "train").write_bytes(b"\xef\xbb\xbf" + list_of(voc, "train").read_bytes())
    assert voc_data.list_items(voc, "train") == before
    found = {item.image.name for item in voc_data.list_extra_images(pictures, voc, set())}
    assert found == {f"{i}.jpg" for i in TRAIN_IDS + VAL_IDS} | {"t1.png"}


@pytest.mark.parametrize("folder, words", [("nowhere", "not a folder"), ("empty", "no picture")])
def test_extra_images_that_are_not_there(folder, words, run_train, student_file, tmp_path):
    (tmp_path / "empty").mkdir()
    teacher = student_file()
    result = run_train("--kd_mode", "response", "--teacher", teacher, "--extra_images", folder)
    assert_refused(result, 1, folder, words)
    assert_nothing_written(tmp_path, "student.pth")


# ------------------------------------------------------------------------------- bad checkpoints


@pytest.fixture
def student_file(tmp_path):
    """`student_file(**changes)`: an untrained student's checkpoint, with these entries changed."""

    def make(classes=voc_data.NUM_CLASSES, **changes):
        torch.manual_seed(0)
        student = UltraCompactSegmentationModel(classes, pretrained=False)
        content = {
            "model_state_dict": student.state_dict(), "model": "ultracompact", "kd_mode": "none",
            "num_classes": classes, "eval_size": 0, "miou": 0.1, "epoch": 1,
            "parameters": 1, "settings": {"seed": 0},
        }  # fmt: skip
        content |= changes
        content = {key: value for key, value in content.items() if value is not None}
        torch.save(content, tmp_path / "student.pth")
        return tmp_path / "student.pth"

    return make


class Bomb:
    """Makes a file if it is ever unpickled with code allowed."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def truncated(path, marker):
    torch.save({"model": "ultracompact", "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def empty(path, marker):
    path.write_bytes(b"")


def text(path, marker):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def web_page(path, marker):
    path.write_text("<!DOCTYPE html><html>Too many requests</html>")


def picture(path, marker):
    Image.new("RGB", (40, 40)).save(path, format="PNG")


def plain_pickle(path, marker):
    path.write_bytes(pickle.dumps({"model": "ultracompact"}))


def code_in_zip(path, marker):
    torch.save({"model": "ultracompact", "model_state_dict": Bomb(marker)}, path)


def code_in_old_format(path, marker):
    torch.save({"model": Bomb(marker)}, path, _use_new_zipfile_serialization=False)


def code_in_bare_pickle(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker)))


def whole_module(path, marker):
    torch.save(nn.Linear(2, 2), path)


def state_of_another_network(path, marker):
    torch.save(nn.Linear(2, 2).state_dict(), path)


def a_list(path, marker):
    torch.save([1, 2, 3], path)


def a_tensor(path, marker):
    torch.save(torch.zeros(3), path)


def a_folder(path, marker):
    path.mkdir()


def nothing(path, marker):
    pass


BAD_FILES = [
    truncated, empty, text, web_page, picture, plain_pickle, code_in_zip, code_in_old_format,
    code_in_bare_pickle, whole_module, state_of_another_network, a_list, a_tensor, a_folder,
    nothing,
]  # fmt: skip


@pytest.mark.parametrize("make", named(BAD_FILES))
@pytest.mark.parametrize("use", ["test", "resume", "auto", "init", "teacher", "teacher_weights"])
def test_bad_checkpoint(make, use, run, run_train, voc, tmp_path):
    """Refused wherever a checkpoint is read, by name; code in it never runs."""
    save, marker = tmp_path / "save", tmp_path / "executed"
    path = save / LAST if use == "auto" else tmp_path / "file.pth"
    path.parent.mkdir(exist_ok=True)
    make(path, marker)
    if use == "auto" and make in (nothing, a_folder):
        pytest.skip("--resume auto then starts afresh")
    before = contents(tmp_path)
    if use == "test":
        result = run(
            test_script, "--checkpoint", path, "--data_root", voc, "--device", "cpu",
            "--output_dir", tmp_path / "report",
        )  # fmt: skip
    elif use in ("resume", "auto"):
        result = run_train("--resume", "auto" if use == "auto" else path)
    elif use == "init":
        result = run_train("--init", path, pretrained=True)
    elif use == "teacher":
        result = run_train("--kd_mode", "response", "--teacher", path)
    else:
        result = run_train("--kd_mode", "response", "--teacher_weights", path)
    assert_refused(result, 1, path)
    assert not marker.exists(), "code in a checkpoint was executed"
    assert contents(tmp_path) == before


BAD_CONTENT = {
    "the weights of another model": {"model": "standard"},
    "an unknown model": {"model": "huge"},
    "no weights": {"model_state_dict": None},
    "weights that are no dict": {"model_state_dict": [1, 2]},
    "a number for weights": {"model_state_dict": {"classifier.1.weight": 3}},
    "an unknown mode": {"kd_mode": "telepathy"},
    "no mode": {"kd_mode": None},
    "other classes": {"classes": 7},
    "another number of classes than it says": {"num_classes": 7},
    "words for a number of classes": {"num_classes": "many"},
    "a model that is a list": {"model": ["ultracompact"]},
    "settings that are no dict": {"settings": "none"},
    "a bad evaluation size": {"eval_size": "large"},
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_checkpoint_with_bad_content(name, run, voc, student_file, tmp_path):
    path = student_file(**BAD_CONTENT[name])
    result = run(
        test_script, "--checkpoint", path, "--data_root", voc, "--device", "cpu", "--workers", 0,
        "--speed_size", 33, "--speed_repeats", 1, "--output_dir", tmp_path / "report",
    )  # fmt: skip
    assert_refused(result, 1, path)
    assert_nothing_written(tmp_path, "student.pth")


def test_bomb_is_a_bomb(tmp_path):
    """The marker of the tests above does appear when code is allowed: they can fail."""
    code_in_zip(tmp_path / "file.pth", tmp_path / "executed")
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"optimizer": {}}, {"optimizer": {}, "settings": 3}])
def test_state_that_lacks_parts(content, run_train, tmp_path):
    path = tmp_path / "save" / LAST
    path.parent.mkdir()
    torch.save(content, path)
    before = contents(tmp_path)
    assert_refused(run_train(), 1, path)
    assert contents(tmp_path) == before


def test_resume_from_a_best_model(run_train, student_file, tmp_path):
    result = run_train("--resume", student_file())
    assert_refused(result, 1, "student.pth", "last_")
    assert_nothing_written(tmp_path, "student.pth")


@pytest.mark.parametrize("name", ["history_ultracompact_none.jsonl", "teacher_x.json"])
def test_broken_files_beside_the_tables(name, run, voc, student_file, tmp_path):
    """A history or a teacher's row that was cut off or edited."""
    student_file()
    save, report = tmp_path / "save", tmp_path / "report"
    save.mkdir()
    report.mkdir()
    shutil.move(tmp_path / "student.pth", save / BEST)
    broken = (save if name.startswith("history") else report) / name
    broken.write_text('{"epoch": 1, "loss": ')
    result = run(
        test_script, "--save_dir", save, "--data_root", voc, "--device", "cpu", "--workers", 0,
        "--output_dir", report, "--speed_size", 33, "--speed_repeats", 1,
    )  # fmt: skip
    assert_refused(result, 1, broken)


# ---------------------------------------------------------------------------------- bad teachers


def export(path, classes=voc_data.NUM_CLASSES, features=(), bare=False):
    """A `.pt2` file of a small network with these outputs."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, classes, 3, stride=8, padding=1)

        def forward(self, image):
            logits = nn.functional.interpolate(self.conv(image), size=image.shape[-2:])
            outputs = {"out": logits} | {level: self.conv(image) for level in features}
            return logits if bare else outputs

    size = torch.export.Dim("size", min=33, max=4096)
    width = torch.export.Dim("width", min=33, max=4096)
    program = torch.export.export(
        Small().eval(), (torch.zeros(2, 3, 65, 65),),
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64), 2: size, 3: width},),
    )  # fmt: skip
    torch.export.save(program, path)
    return path


def test_exported_teachers(run_train, tmp_path):
    """Without features in feature mode, with other classes, without a dict, and no .pt2 at all."""
    good = export(tmp_path / "good.pt2")
    result = run_train("--kd_mode", "feature", "--teacher", good)
    assert_refused(result, 1, "good.pt2", "high", "--kd_mode response")
    other = export(tmp_path / "other.pt2", classes=7)
    result = run_train("--kd_mode", "response", "--teacher", other)
    assert_refused(result, 1, "other.pt2", "7", "21")
    bare = export(tmp_path / "bare.pt2", bare=True)
    assert_refused(run_train("--kd_mode", "response", "--teacher", bare), 1, "bare.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    text_file = tmp_path / "text.pt2"
    assert_refused(run_train("--kd_mode", "response", "--teacher", text_file), 1, "text.pt2")
    gone = tmp_path / "gone.pt2"
    assert_refused(run_train("--kd_mode", "response", "--teacher", gone), 1, "gone.pt2")
    assert_nothing_written(tmp_path, "good.pt2", "other.pt2", "bare.pt2", "text.pt2")
    status, _, stderr = run_train("--kd_mode", "response", "--teacher", good)
    assert (status, stderr) == (0, "")


def test_student_teacher_with_another_number_of_classes(run_train, student_file, tmp_path):
    result = run_train("--kd_mode", "response", "--teacher", student_file(classes=7))
    assert_refused(result, 1, "student.pth", "7", "21")
    assert_nothing_written(tmp_path, "student.pth")


def test_teacher_weights_with_another_number_of_classes(run_train, tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "seven.pth")
    result = run_train(
        "--kd_mode", "response", "--teacher", "lraspp_mobilenet_v3_large", "--teacher_weights",
        tmp_path / "seven.pth",
    )  # fmt: skip
    assert_refused(result, 1, "seven.pth")
    assert_nothing_written(tmp_path, "seven.pth")


# ------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def files_limited_to(size):
    """No file of this process grows beyond `size` bytes meanwhile, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("limit", [2_000_000, 500_000, 0], ids=["last", "best", "every file"])
def test_disk_full_while_saving(limit, run_train, tmp_path):
    """The last good checkpoint stays whole, no part of the new one is left, and it can go on."""
    save = tmp_path / "save"
    run_train("--epochs", 2)
    before = contents(save)
    assert len(before[save / BEST]) > 500_000 and len(before[save / LAST]) > 2_000_000
    with files_limited_to(limit):
        result = run_train("--epochs", 3)
    assert_refused(result, 1, "could not write", save)
    assert (save / LAST).read_bytes() == before[save / LAST]
    if limit < 2_000_000:
        assert (save / BEST).read_bytes() == before[save / BEST]
    kd_losses.load_student(save / BEST)
    assert not list(tmp_path.rglob("*.tmp"))
    status, _, _ = run_train("--epochs", 3)
    assert status == 0
    assert kd_losses.read_checkpoint(save / LAST)["epoch"] == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_that_fails_at_the_sync(code, run_train, tmp_path, monkeypatch):
    """Some disks say that they are full only when they are told to keep what they got."""
    save = tmp_path / "save"
    run_train()
    before = contents(save)

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        patched.setattr(train, "SAVE_AGAIN_AFTER", (0,))
        result = run_train("--epochs", 2)
    assert_refused(result, 1, "could not write", os.strerror(code))
    assert ("trying again" in result[1]) is (code == errno.EIO)
    assert contents(save) == before


def test_write_that_fails_once_is_made_again(run_train, tmp_path, monkeypatch):
    """As a network drive may refuse one: a run of a night must not end for it."""
    replace, failed = os.replace, []

    def fail_once(source, target):
        if Path(target).name == BEST and not failed:
            failed.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    monkeypatch.setattr(train, "SAVE_AGAIN_AFTER", (0,))
    status, out, _ = run_train()
    assert status == 0 and "trying again in 0 s" in out and failed
    assert kd_losses.read_checkpoint(tmp_path / "save" / LAST)["epoch"] == 1


@pytest.mark.parametrize("flag", ["--save_dir", "--cache_dir"])
def test_drive_of_colab_that_is_not_mounted(flag, run_train, tmp_path, monkeypatch):
    (tmp_path / "content").mkdir()
    drive = tmp_path / "content" / "drive"
    monkeypatch.setattr(voc_data, "COLAB_DRIVE", drive)
    result = run_train(flag, drive / "MyDrive" / "voc")
    assert_refused(result, 1, f"{flag} {drive / 'MyDrive' / 'voc'}", "not mounted", "drive.mount")
    assert not drive.exists()


@pytest.mark.parametrize("flag", ["--save_dir", "--cache_dir"])
def test_folder_that_cannot_be_written_is_refused_before_the_work(
    flag, run_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    folder = tmp_path / "locked" / "new"
    assert_refused(run_train(flag, folder), 1, f"{flag} {folder} cannot be written")
    assert_nothing_written(tmp_path)


def test_state_of_another_run_that_comes_up_late_is_not_replaced(run_train, tmp_path, monkeypatch):
    """A drive that was away when the run began."""
    assert run_train()[0] == 0
    last, away = tmp_path / "save" / LAST, tmp_path / "away"
    content = last.read_bytes()
    (tmp_path / "save").rename(away)
    train_one_epoch = train.Training.train_one_epoch

    def mount_meanwhile(*args):
        away.rename(tmp_path / "save")
        return train_one_epoch(*args)

    monkeypatch.setattr(train.Training, "train_one_epoch", mount_meanwhile)
    assert_refused(run_train(), 1, last, "was not there when this run began")
    assert last.read_bytes() == content


def test_all_broken_photographs_are_named_at_once(run_train, student_file, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40)).save(photos / "whole.png")
    (photos / "a.jpg").write_bytes(b"none")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        photos / "b.png"
    )
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:1500])
    teacher = student_file()
    flags = ("--kd_mode", "response", "--teacher", teacher, "--extra_images", photos)
    result = run_train(*flags)
    assert_refused(result, 1, "2 broken files", photos / "a.jpg", photos / "b.png", lines=3)
    assert "whole.png" not in result[2] and not list((tmp_path / "cache").glob("pixels-*"))


def test_disk_full_while_the_pixel_cache_is_filled(run_train, tmp_path):
    with files_limited_to(10_000):
        result = run_train()
    assert_refused(result, 1, tmp_path / "cache", "could not be written", "--cache_dir")
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "save").exists()
    assert run_train()[0] == 0


def test_cache_that_is_not_whole(run_train, tmp_path):
    """As a power cut may leave it: one line that says what to delete."""
    assert run_train("--save_dir", tmp_path / "cache/first")[0] == 0
    stores = list((tmp_path / "cache").glob("pixels-*/images.bin"))
    for store in stores:
        store.write_bytes(store.read_bytes()[:-100])
    assert_refused(run_train(), 1, "is not whole: delete it", stores[0].parent.parent)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
              RuntimeError("MPS backend out of memory (allocated: 9 GiB)")]
)  # fmt: skip
def test_device_without_enough_memory(error, run_train, monkeypatch):
    """No traceback, no advice to run the same command again."""

    def fail(*_):
        raise error

    monkeypatch.setattr(train.Training, "step", fail)
    result = run_train()
    assert_refused(result, 1, "out of memory", "9 GiB", "--batch_size")
    assert "same command" not in result[1]


def test_loader_worker_that_was_killed_for_memory(run_train, monkeypatch):
    """In torch's own words, for want of a small /dev/shm."""

    def fail(*_):
        raise RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory."
        )

    monkeypatch.setattr(train.Training, "step", fail)
    assert_refused(run_train(), 1, "is killed by signal: Bus error", "/dev/shm", "--workers")


def test_interruption_while_saving_leaves_no_stray_file(tmp_path, monkeypatch):
    """Ctrl-C or SIGTERM in the middle of a write: the old file, and nothing beside it."""
    path = tmp_path / "file.bin"
    voc_data.write_whole(b"old", path)
    for stop in (KeyboardInterrupt, SystemExit):

        def interrupt(descriptor):
            raise stop

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", interrupt)
            with pytest.raises(stop):
                voc_data.write_whole(b"new", path)
        assert contents(tmp_path) == {path: b"old"}


# ------------------------------------------------------------- settings changed, results existing

CHANGES = [
    ("--seed 1", "seed (was 0, now 1)"),
    ("--lr 0.002", "lr (was"),
    ("--epochs 1", "epochs (2 are done, now 1)"),
    ("--batch_size 3", "batch_size (was 2, now 3)"),
    ("--crop_size 49", "crop_size"),
    ("--optimizer sgd", "optimizer (was adamw, now sgd)"),
    ("--scale 0.5 1.5", "scale"),
    ("--ema 0.5", "ema"),
    ("--alpha 0.5", "alpha"),
    ("--val_split other", "data"),
]


def test_settings_changed_between_runs(run_train, voc, tmp_path):
    """Refused with what differs, and not one byte changes; the old settings still go on."""
    save = tmp_path / "save"
    list_of(voc, "other").write_text("v0\n")
    assert run_train("--epochs", 2)[0] == 0
    before = contents(tmp_path)
    for flags, words in CHANGES:
        assert_refused(run_train("--epochs", 2, *flags.split()), 2, words)
        assert contents(tmp_path) == before, flags
    assert_refused(
        run_train("--epochs", 2, *"--seed 1 --lr 0.002".split()), 2, "seed (was", "lr (was"
    )
    list_of(voc, "train").write_text("\n".join(TRAIN_IDS[:4]) + "\n")
    assert_refused(run_train("--epochs", 2), 2, "data")
    list_of(voc, "train").write_text("\n".join(TRAIN_IDS) + "\n")
    assert contents(save) == {path: b for path, b in before.items() if save in path.parents}
    status, out, _ = run_train("--epochs", 3)
    assert status == 0 and "epoch 3/3" in out and "epoch 2/3" not in out


def test_other_model_or_mode_is_another_run(run_train, student_file, tmp_path):
    """The names of the files differ: a run beside the first, which keeps every byte."""
    save = tmp_path / "save"
    assert run_train()[0] == 0
    before = contents(save)
    student_file()
    assert run_train("--kd_mode", "response", "--teacher", tmp_path / "student.pth")[0] == 0
    after = contents(save)
    assert len(after) > len(before) and {path: after[path] for path in before} == before


def test_last_of_another_model_or_mode_under_this_name(run_train, tmp_path):
    """Continuing standard from a file of ultracompact, by name or renamed: refused."""
    save = tmp_path / "save"
    assert run_train()[0] == 0
    before = contents(save)
    for flags in ("--model standard", "--kd_mode response"):
        result = run_train("--resume", save / LAST, *flags.split())
        assert_refused(result, 2, flags.split()[0].lstrip("-") + " (was")
    assert contents(save) == before


def test_existing_results_are_not_replaced_without_overwrite(run_train, tmp_path):
    save = tmp_path / "save"
    assert run_train()[0] == 0
    before = contents(save)
    assert_refused(run_train("--resume", "none"), 2, "--overwrite", BEST)
    assert contents(save) == before
    (save / LAST).unlink()  # shipped weights, whose last_* stayed at home
    assert_refused(run_train("--seed", 5), 2, "--overwrite", BEST)
    assert (save / BEST).read_bytes() == before[save / BEST]
    status, out, _ = run_train("--seed", 5, "--overwrite")
    assert status == 0 and "epoch 1/1" in out
    assert (save / BEST).read_bytes() != before[save / BEST]


def test_unfinished_run_is_not_replaced_without_overwrite(run_train, tmp_path, monkeypatch):
    """Killed before its first validation, a run has a last_* but no best_model_* yet."""
    save = tmp_path / "save"
    flags = ("--epochs", 3, "--val_every", 3)
    original = train.Training.train_one_epoch

    def second_is_interrupted(self, loader):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return original(self, loader)

    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "train_one_epoch", second_is_interrupted)
        assert run_train(*flags)[0] == 130
    before = contents(save)
    assert save / LAST in before and save / BEST not in before
    assert_refused(run_train(*flags, "--resume", "none"), 2, "--overwrite")
    assert contents(save) == before


def test_interruption_in_the_last_moment_still_gets_its_report(run_train, tmp_path, monkeypatch):
    """Killed between the last save and the report: the same command again writes the report."""
    save = tmp_path / "save"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_summary", interrupt)
        assert run_train()[0] == 130
    assert kd_losses.read_checkpoint(save / LAST)["epoch"] == 1
    assert run_train()[0] == 0
    assert (save / "training_report_ultracompact_none.txt").is_file()
    assert (save / "training_curves_ultracompact_none.png").is_file()


# -------------------------------------------------------------------------------------- numerics


def test_loss_that_is_not_finite(run_train, tmp_path, monkeypatch):
    """Stops with epoch, step and the ids of that batch; nothing goes over the good checkpoint."""
    save = tmp_path / "save"
    assert run_train()[0] == 0
    before = contents(save)
    sampler = voc_data.EpochSampler(len(TRAIN_IDS), seed=0)
    sampler.set_epoch(1)
    bad_batch = [TRAIN_IDS[index] for index, _ in list(sampler)[2:4]]  # step 2 of batches of two
    original, calls = train.compute_losses, []

    def spoilt(*args):
        losses = original(*args)
        calls.append(1)
        return {k: v * math.nan for k, v in losses.items()} if len(calls) == 2 else losses

    with monkeypatch.context() as patched:
        patched.setattr(train, "compute_losses", spoilt)
        result = run_train("--epochs", 2)
    assert_refused(result, 1, "nan", "epoch 2, step 2", *bad_batch)
    assert not any(f"{image_id}" in result[2] for image_id in set(TRAIN_IDS) - set(bad_batch))
    assert contents(save) == before


def history(save, run="ultracompact_none"):
    return [json.loads(line) for line in (save / f"history_{run}.jsonl").read_text().splitlines()]


def assert_finite_weights(path):
    student, _ = kd_losses.load_student(path)
    assert all(value.isfinite().all() for value in student.state_dict().values())


@pytest.mark.parametrize("mode", ["none", "response", "feature"])
def test_batches_that_are_all_void(mode, run_train, voc, student_file, tmp_path):
    for image_id in TRAIN_IDS:
        write_mask(mask_of(voc, image_id), np.full((40, 48), 255))
    teacher = ["--kd_mode", mode, "--teacher", student_file()] if mode != "none" else []
    status, _, stderr = run_train(*teacher)
    assert (status, stderr) == (0, "")
    [record] = history(tmp_path / "save", f"ultracompact_{mode}")
    assert record["loss"] == record["ce"] == record["kd"] == 0
    assert_finite_weights(tmp_path / "save" / f"best_model_ultracompact_{mode}.pth")


@pytest.mark.parametrize("sizes", [(20, 12), (1, 1), (200, 3)])
def test_images_smaller_than_the_crop(sizes, run_train, voc, tmp_path):
    for number, image_id in enumerate(["t1", "t4", "v0"]):
        write_image(image_of(voc, image_id), sizes, number)
        write_mask(mask_of(voc, image_id), np.full(sizes[::-1], 3))
    status, _, stderr = run_train("--crop_size", 65)
    assert (status, stderr) == (0, "")
    [record] = history(tmp_path / "save")
    assert math.isfinite(record["loss"]) and math.isfinite(record["val_loss"])
    assert_finite_weights(tmp_path / "save" / BEST)


def test_classes_absent_from_the_split(run_train, voc, tmp_path, run):
    """Val has three classes: the mean is over these, the tables show the others as absent."""
    status, _, stderr = run_train()
    assert (status, stderr) == (0, "")
    [record] = history(tmp_path / "save")
    assert 0 <= record["val_miou"] <= 1
    status, _, stderr = run(
        test_script, "--save_dir", tmp_path / "save", "--data_root", voc, "--device", "cpu",
        "--output_dir", tmp_path / "report", "--speed_size", 33, "--speed_repeats", 1,
        "--workers", 0,
    )  # fmt: skip
    assert (status, stderr) == (0, "")
    [row] = json.loads((tmp_path / "report/results.json").read_text())
    present = [value for value in row["iou"].values() if value is not None and value == value]
    assert len(present) == 3  # background, and one object in each of the two images
    assert row["miou"] == pytest.approx(sum(present) / 3)


def test_validation_without_any_labelled_pixel(run_train, voc, tmp_path):
    """All of val is void: no mIoU to speak of."""
    for image_id in VAL_IDS:
        write_mask(mask_of(voc, image_id), np.full((40, 48), 255))
    assert_refused(run_train(), 1, "all 2 images are void")
    assert_nothing_written(tmp_path)


def test_batches_of_one(run_train, tmp_path):
    status, _, stderr = run_train("--batch_size", 1)
    assert (status, stderr) == (0, "")
    assert_finite_weights(tmp_path / "save" / BEST)


@pytest.mark.parametrize("mode", ["response", "feature"])
def test_losses_stay_in_float32_under_amp(mode, run_train, student_file, tmp_path, monkeypatch):
    original, seen = train.compute_losses, []

    def watched(args, logits, *rest):
        losses = original(args, logits, *rest)
        seen.append((logits.dtype, {value.dtype for value in losses.values()}))
        return losses

    monkeypatch.setattr(train, "compute_losses", watched)
    status, _, stderr = run_train(
        "--amp", "bfloat16", "--kd_mode", mode, "--teacher", student_file()
    )
    assert (status, stderr) == (0, "")
    assert all(losses == {torch.float32} for _, losses in seen) and seen
    assert {logits for logits, _ in seen} == {torch.bfloat16}, "AMP was not on"
