"""test.py and test_pretrained_fcn.py: rows, gains, tables, what the figures show."""

import io
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kd_losses
import test_pretrained_fcn as fcn_script
import voc_data
from conftest import load_test_script
from test_teacher import CPU, save_student
from voc_data import CLASSES, DataError, UsageError

script = load_test_script()
script.__test__ = fcn_script.__test__ = False  # no tests in there
SPEED = {"macs": 123_456_789, "latency_ms": 4.5, "images_per_second": 300.0, "device": "cpu, 1"}
NAMES = ("ultracompact none seed 0", "ultracompact none seed 1", "ultracompact response seed 0",
         "ultracompact response seed 1", "ultracompact feature")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc_data, "measure_speed", lambda *_: SPEED)
        yield


def run(module, *flags):
    flags = ("--device", "cpu", "--workers", 0, *flags)
    module.main(module.get_args_parser().parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Untrained students, two seeds of two modes and one of feature, below a name with an ë."""
    root, files = tmp_path_factory.mktemp("Zoë"), []
    for number, name in enumerate(NAMES):
        _, mode, _, seed = (name + " seed 0").split()[:4]
        folder = root / f"seed{seed}"
        folder.mkdir(exist_ok=True)
        settings = {"seed": int(seed), "epochs": 9 if mode == "feature" else 2,
                    "train_split": "train", "val_split": "val", "eval_size": 65}  # fmt: skip
        files.append(folder / f"best_model_ultracompact_{mode}.pth")
        save_student(files[-1], number, kd_mode=mode, settings=settings)
        lines = [{"epoch": 1, "ce": number}, {"epoch": 2, "ce": 0, "val_miou": number / 10}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"history_ultracompact_{mode}.jsonl").write_text(text)
    return files


@pytest.fixture(scope="module")
def tested(files, tiny_voc, tmp_path_factory):
    """The results of all files, beside the row of a "teacher": the folder and the rows."""
    output = tmp_path_factory.mktemp("out")
    flags = ["--data_root", tiny_voc, "--output_dir", output]
    run(fcn_script, *flags, "--teacher", files[2], "--eval_size", 65)
    written, flags = io.BytesIO(), [*flags, "--visualize", "--num_vis", 2]
    with pytest.MonkeyPatch.context() as patch:  # a terminal that lacks most characters
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
        patch.setattr(voc_data.signal, "signal", lambda *_: None)
        voc_data.run(lambda args: run(script, *args), [*flags, "--checkpoint", *reversed(files)])
        assert b"mIoU %" in written.getvalue()
    return output, json.loads((output / "results.json").read_text("utf-8"))


def test_rows_are_in_order_and_say_what_evaluate_says(tested, files, tiny_voc):
    *rows, teacher = tested[1]
    assert tuple(row["label"] for row in rows) == NAMES
    images = voc_data.VOCDataset(voc_data.list_items(tiny_voc, "val"))
    for file, row in zip(files, rows):
        student = kd_losses.load_student(file)[0]
        matrix, loss = voc_data.evaluate(student, images, 65, CPU)
        assert row["miou"] == pytest.approx(matrix.miou, abs=1e-6)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["parameters"] == sum(p.numel() for p in student.parameters())
        assert row["score"] == pytest.approx(4 * row["miou"] / (1 + row["parameters"] / 1e6))
        shown = [iou for iou in row["iou"].values() if iou is not None]
        assert statistics.mean(shown) == pytest.approx(row["miou"])
        assert row["images"] == 8 and row["macs"] == SPEED["macs"]
    assert [row["final_val_miou"] for row in rows] == [0, 0.1, 0.2, 0.3, 0.4]  # of the histories
    assert teacher["kd_mode"] == "teacher" and teacher["label"] == rows[2]["checkpoint"][-36:]
    assert teacher["miou"] == pytest.approx(rows[2]["miou"], abs=1e-6)
    assert teacher["parameters"] == rows[2]["parameters"]


def test_tables_agree_in_all_formats(tested):
    output, rows = tested
    text = {name: (output / name).read_text("utf-8") for name in os.listdir(output)
            if name.endswith((".md", ".tex", ".json"))}  # fmt: skip
    json.loads(text["results.json"], parse_constant=pytest.fail)  # NaN is no JSON
    lines, latex = text["results.md"].splitlines(), text["results.tex"].splitlines()
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    for line, row in zip(lines[2:], rows):
        shown = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|"))))
        final = row.get("final_val_miou")
        expected = {"mIoU %": f"{100 * row['miou']:.2f}", "score": f"{row['score']:.3f}",
                    "parameters": f"{row['parameters']:,}", "MMACs": "123",
                    "final epoch": f"{100 * final:.2f}" if final else "-"}  # fmt: skip
        assert shown["network"] == row["label"] and shown.items() >= expected.items()
        assert any(all(value in entry for value in expected.values()) for entry in latex)
    head, _, *per_class = text["per_class.md"].splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [row["label"] for row in rows]
    for name, line in zip(CLASSES, per_class, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        ious = [row["iou"][name] for row in rows]
        assert cells == [name, *("-" if v is None else f"{100 * v:.1f}" for v in ious)]


def test_gain_table_pairs_the_seeds(tested):
    output, rows = tested
    miou = [100 * row["miou"] for row in rows]
    gain = [miou[2] - miou[0], miou[3] - miou[1]]
    expected = ["2", f"{(miou[2] + miou[3]) / 2:.2f}", "2", f"{sum(gain) / 2:+.2f}",
                f"{abs(gain[0] - gain[1]) / 2:.2f}", "+20.00", "0.00"]  # fmt: skip
    lines = (output / "results.md").read_text("utf-8").splitlines()
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]]
             for row in (line.split("|") for line in lines[-3:])}  # fmt: skip
    assert cells["ultracompact response"] == expected
    assert cells["ultracompact feature"] == ["1", f"{miou[4]:.2f}", *5 * "-"]  # other --epochs
    assert cells["ultracompact none"][2:] == [*5 * "-"]  # is not compared with itself


def test_gains_are_paired_by_seed_length_and_list():
    rows = [{"model": "standard", "kd_mode": mode, "seed": seed, "epochs": 5, "train_split": split,
             "labelled_images": images, "miou": miou, "final_val_miou": final}
            for mode, seed, split, images, miou, final in (
                ("none", 0, "a", 9, 0.30, 0.20), ("none", 1, "a", 9, 0.20, None),
                ("response", 1, "a", 9, 0.24, 0.2), ("response", 0, "a", 9, 0.36, 0.3),
                ("response", 7, "a", 9, 0.9, 0.9), ("feature", 0, "a", 9, 0.31, 0.2),
                ("feature", 1, "b", 9, 0.5, 0.5), ("feature", 0, "a", 8, 0.6, 0.6))]  # fmt: skip
    rows.append(rows[2] | {"model": "ultracompact"})
    table = script.gains(rows)
    assert table["standard response"] == pytest.approx((3, 50, 2, 5, 1, 10, None))
    assert table["standard feature"] == pytest.approx((3, 47, 1, 1, None, 0, None))
    assert table["ultracompact response"] == pytest.approx((1, 24, 0, *[None] * 4))


@pytest.mark.parametrize("name", ["teacher_a.json", "history_ultracompact_none.jsonl"])
def test_damaged_results_are_named(name, files, tiny_voc, tmp_path):
    folder = shutil.copytree(files[0].parent, tmp_path / "copy")
    (folder / name).write_text('{"epoch": 1, "ce"')
    flags = ["--data_root", tiny_voc, "--output_dir", folder]
    flags += ["--checkpoint", folder / files[0].name]
    with pytest.raises(DataError, match=f"{name} is damaged"):
        run(script, *flags)


def test_teacher_of_another_device_is_left_out(tmp_path):
    like = {"split": "val", "images": 8, "device": "cpu"}
    for number, row in enumerate([like, like | {"device": "cuda"}, like | {"images": 9}]):
        (tmp_path / f"teacher_{number}.json").write_text(json.dumps(row))
    assert script.teacher_rows(tmp_path, like) == [like]


def test_figures_show_the_right_data(tested, files):
    sheets = {f"overlays_{name.replace(' ', '_')}.jpg" for name in (*NAMES, "compared")}
    assert sheets | {"per_class_iou.png", "training_curves.png"} <= set(os.listdir(tested[0]))
    chosen = SimpleNamespace(checkpoint=files, model=None, eval_size=None)
    students = script.load_students(chosen, CPU)
    assert [student.history[0]["ce"] for student in students] == [0, 1, 2, 3, 4]
    ious = {7: 0.5, 1: 0.9, 2: 0.1, 3: 0.3, 4: 0.7}
    assert script.best_and_worst(ious, 4) == [1, 2, 4, 3]
    other = {7: 0.0, 1: 0.9, 2: 0.1, 3: 0.3, 4: 0.7}
    assert script.evenly_ranked([ious, other], 5) == [2, 7, 3, 4, 1]
    assert script.evenly_ranked([ious], 1) == [7]
    for count in (8, 99):  # more than there are: each once
        assert script.best_and_worst(ious, count) == [1, 2, 4, 3, 7]
        assert script.evenly_ranked([ious], count) == [2, 3, 7, 4, 1]


def test_prediction_of_an_image_is_the_one_that_is_measured(files, tiny_voc):
    chosen = SimpleNamespace(checkpoint=files[:1], model=None, eval_size=50)
    (student,) = script.load_students(chosen, CPU)
    images, seen = voc_data.VOCDataset(voc_data.list_items(tiny_voc, "val")), {}
    keep = lambda index, mask, prediction: seen.update({index: prediction.numpy()})  # noqa: E731
    voc_data.evaluate(student.network, images, 50, CPU, on_image=keep)
    for index, labels in seen.items():
        assert (script.predict(student, images[index][..., :3], CPU) == labels).mean() > 0.999


def test_selections(files, tiny_voc, tmp_path, monkeypatch, capsys):
    """A selection leaves report/ alone; --model must agree; --image and --export need no data."""
    monkeypatch.chdir(tmp_path)
    run(script, "--checkpoint", files[0], "--data_root", tiny_voc)
    assert os.listdir("report") == ["best_model_ultracompact_none"]
    assert "results.md" in os.listdir("report/best_model_ultracompact_none")
    run(script, "--checkpoint", *files[:2], "--data_root", tiny_voc, "--eval_size", 50)
    run(script, "--model", "ultracompact", "--save_dir", files[0].parent, "--data_root", tiny_voc)
    other = json.loads(Path("report/several/results.json").read_text())
    assert [row["final_val_miou"] for row in other] == [None, None]  # of another size
    assert {*os.listdir("report")} == {"best_model_ultracompact_none", "several", "ultracompact"}
    with pytest.raises(UsageError, match="--model standard"):
        run(script, "--checkpoint", files[0], "--model", "standard", "--data_root", tiny_voc)
    with pytest.raises(DataError, match="no best_model_.*train.py"):
        run(script, "--save_dir", tmp_path, "--data_root", tiny_voc)
    photo = sorted((tiny_voc / "JPEGImages").iterdir())[0]
    monkeypatch.setattr(voc_data, "find_voc", None)
    run(script, "--image", photo, "--checkpoint", files[0], "--output_dir", tmp_path / "photos")
    assert os.listdir("photos") == [f"image_{photo.stem}.jpg"]
    run(script, "--checkpoint", files[0], "--export", tmp_path / "student.pt2")
    exported = kd_losses.load_teacher(str(tmp_path / "student.pt2"), None, CPU)
    student = kd_losses.StudentWithDict(kd_losses.load_student(files[0])[0])
    for size in ((1, 3, 65, 17), (3, 3, 40, 97)):
        torch.testing.assert_close(exported(torch.ones(size)), student(torch.ones(size)))
    with pytest.raises(UsageError, match="one --checkpoint"):
        run(script, "--checkpoint", *files, "--export", tmp_path / "all.pt2")
    with pytest.raises(UsageError, match="one name"):
        run(script, "--image", photo, photo, "--checkpoint", files[0], "--output_dir", "photos")
