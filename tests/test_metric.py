"""The confusion matrix and `evaluate` against counting pixel by pixel."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import voc_data
from voc_data import NUM_CLASSES, UNLABELLED, VOID, ConfusionMatrix


def count(target, prediction, classes=NUM_CLASSES):
    """Counts[true][predicted], one pixel at a time."""
    counts = [[0] * classes for _ in range(classes)]
    for true, predicted in zip(np.ravel(target).tolist(), np.ravel(prediction).tolist()):
        if true < classes:
            counts[true][predicted] += 1
    return counts


def iou_of(counts):
    """{class: IoU} of the classes that the ground truth has."""
    ious = {}
    for label, row in enumerate(counts):
        if sum(row):
            predicted = sum(other[label] for other in counts)
            ious[label] = row[label] / (sum(row) + predicted - row[label])
    return ious


@pytest.fixture
def maps():
    """Labels and predictions (2, 30, 20) over some of the classes, with void."""
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 5, 20, VOID], (2, 30, 20)).astype(np.uint8)
    prediction = np.where(rng.random(target.shape) < 0.6, target, rng.integers(0, 21, target.shape))
    prediction[prediction == VOID] = 7
    return target, prediction


def matrix_of(target, prediction):
    matrix = ConfusionMatrix()
    matrix.update(torch.as_tensor(target), torch.as_tensor(prediction))
    return matrix


def test_confusion_matrix_counts_as_a_loop_over_the_pixels(maps):
    matrix = matrix_of(*maps)
    assert matrix.counts.dtype == torch.int64
    assert matrix.counts.tolist() == count(*maps)


def test_confusion_matrix_adds_up_over_updates(maps):
    target, prediction = maps
    matrix = ConfusionMatrix()
    for one_target, one_prediction in zip(target, prediction):
        matrix.update(torch.as_tensor(one_target), torch.as_tensor(one_prediction))
    assert matrix.counts.tolist() == count(target, prediction)


def test_void_and_unlabelled_pixels_are_left_out_of_everything(maps):
    target, prediction = maps
    counts = matrix_of(target, prediction).counts
    assert counts.sum() == (target != VOID).sum()
    elsewhere = np.where(target == VOID, (prediction + 3) % 21, prediction)
    assert torch.equal(matrix_of(target, elsewhere).counts, counts)
    unlabelled = np.where(target == VOID, UNLABELLED, target)
    assert torch.equal(matrix_of(unlabelled, prediction).counts, counts)


def test_iou_is_the_formula_and_absent_classes_are_nan_and_not_in_the_mean(maps):
    matrix = matrix_of(*maps)
    expected = iou_of(count(*maps))
    assert set(expected) == {0, 1, 5, 20}  # predictions hold all classes, the truth only these
    for label, iou in enumerate(matrix.iou.tolist()):
        if label in expected:
            assert iou == pytest.approx(expected[label], abs=1e-12)
        else:
            assert math.isnan(iou)
    assert matrix.miou == pytest.approx(sum(expected.values()) / 4, abs=1e-12)


def test_class_that_is_present_and_never_found_counts_as_zero():
    matrix = matrix_of([[3, 3, 0, 0]], [[0, 0, 0, 0]])
    assert matrix.iou[3] == 0
    assert matrix.miou == pytest.approx((0 + 2 / 4) / 2)


def test_pixel_accuracy_is_the_share_of_right_pixels(maps):
    target, prediction = maps
    known = target != VOID
    expected = (target == prediction)[known].sum() / known.sum()
    assert matrix_of(target, prediction).pixel_accuracy == pytest.approx(expected, abs=1e-7)


def test_all_void_gives_nan_and_no_exception():
    matrix = matrix_of(np.full((3, 3), VOID), np.zeros((3, 3), dtype=int))
    assert math.isnan(matrix.miou) and math.isnan(matrix.pixel_accuracy)
    assert "absent" in str(matrix)


def test_counts_stay_exact_past_the_integers_of_float32():
    matrix = ConfusionMatrix()
    matrix.counts[0, 0] = 2**53  # more pixels than VOC has; float32 ends at 2**24
    matrix.counts[0, 1] = 2**24
    matrix.update(torch.tensor([0]), torch.tensor([1]))
    assert matrix.counts[0, 1] == 2**24 + 1
    assert matrix.iou[0].item() == pytest.approx(1 - 2**24 / 2**53, abs=1e-12)


def test_table_names_every_class_and_the_mean(maps):
    table = str(matrix_of(*maps))
    for name in voc_data.CLASSES:
        assert name in table
    assert f"{iou_of(count(*maps))[5]:.4f}" in table and "mIoU" in table


# ------------------------------------------------------------------------------------ evaluate


class ColourNet(nn.Module):
    """A fixed linear reading of the pixels, (1, 3, H, W) -> (1, 21, H / stride, W / stride)."""

    def __init__(self, stride=1):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, 3, 1, 1, generator=generator))
        self.stride, self.seen = stride, []

    def forward(self, image):
        self.seen.append(tuple(image.shape))
        return F.conv2d(image, self.weight, stride=self.stride)


def evaluate(items, model, eval_size=0, **shard):
    data = voc_data.VOCDataset(items, voc_data.EvalTransform(eval_size))
    shown = {}
    result = voc_data.evaluate(
        model, voc_data.eval_loader(data, 0, **shard), "cpu",
        on_image=lambda index, labels, prediction: shown.update({index: (labels, prediction)}),
    )  # fmt: skip
    return result, shown


def by_hand(items, model, size_of=None):
    """Counts and mean loss by reading each image, resizing it, and counting at the mask's size."""
    counts, losses, pixels = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=int), 0.0, 0
    for item in items:
        image, mask = voc_data.read_item(item)
        picture = torch.from_numpy(image).permute(2, 0, 1)
        if size_of:
            picture = voc_data.TF.resize(picture, size_of(mask.shape), antialias=True)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.no_grad():
            logits = model(((picture / 255 - mean) / std)[None])
            logits = F.interpolate(logits, size=mask.shape, mode="bilinear")[0]
        counts += np.array(count(mask, logits.argmax(0).numpy()))
        log_p = logits.double().log_softmax(0).numpy()
        known = mask != VOID
        losses -= log_p[(np.where(known, mask, 0), *np.indices(mask.shape))][known].sum()
        pixels += known.sum()
    return counts, losses / pixels


def assert_nearly_same(counts, expected):
    """Equal but for a few pixels, whose two best logits differ by rounding."""
    assert counts.sum() == expected.sum()
    assert np.abs(counts - expected).sum() <= 2e-4 * expected.sum()


@pytest.fixture(scope="module")
def items(tiny_voc):
    return voc_data.list_items(tiny_voc, "val")


@pytest.mark.parametrize("stride", [1, 4])
def test_evaluate_counts_at_native_size_as_done_by_hand(items, stride):
    model = ColourNet(stride)
    result, shown = evaluate(items, model)
    expected, loss = by_hand(items, ColourNet(stride))
    assert_nearly_same(result.matrix.counts.numpy(), expected)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.images == len(items) == len(shown)
    sizes = [voc_data.read_mask(item.mask).shape for item in items]
    assert model.seen == [(1, 3, *size) for size in sizes] and len(set(sizes)) > 1


def test_eval_size_resizes_the_image_and_never_the_mask(items):
    model = ColourNet()
    result, shown = evaluate(items, model, eval_size=80)

    def size_of(shape):
        return [max(1, round(side * 80 / max(shape))) for side in shape]

    expected, loss = by_hand(items, ColourNet(), size_of)
    assert_nearly_same(result.matrix.counts.numpy(), expected)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert all(max(shape[-2:]) == 80 for shape in model.seen)
    for index, item in enumerate(items):
        labels, prediction = shown[index]
        assert np.array_equal(labels.numpy(), voc_data.read_mask(item.mask))
        assert prediction.shape == labels.shape


def test_evaluate_leaves_the_model_in_the_mode_it_found_it_in(items):
    for training in (True, False):
        model = ColourNet().train(training)
        evaluate(items[:1], model)
        assert model.training is training


@pytest.mark.parametrize("world_size", [2, 3])
def test_sum_of_the_shards_is_the_whole(items, world_size):
    whole, _ = evaluate(items, ColourNet())
    shards = [
        evaluate(items, ColourNet(), rank=r, world_size=world_size) for r in range(world_size)
    ]
    counts = sum(result.matrix.counts for result, _ in shards)
    assert torch.equal(counts, whole.matrix.counts)
    assert sum(result.images for result, _ in shards) == whole.images
    seen = [index for _, shown in shards for index in shown]
    assert sorted(seen) == list(range(len(items)))


def test_two_processes_of_torch_distributed_both_get_the_whole(items, tiny_voc, tmp_path):
    """`evaluate` in two real processes over gloo: same counts, loss and images as in one."""
    script = tmp_path / "shard.py"
    script.write_text(TWO_PROCESSES)
    whole, _ = evaluate(items, ColourNet())
    folder = voc_data.Path(__file__).resolve().parent
    command = [sys.executable, str(script), str(folder), str(tiny_voc), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    try:
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 1):
        counts, loss, images = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(counts, whole.matrix.counts)
        assert loss == pytest.approx(whole.loss, rel=1e-9) and images == whole.images


TWO_PROCESSES = """
import sys
folder, root, out, rank = sys.argv[1:]
sys.path[:0] = [folder, folder + "/.."]
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from test_metric import ColourNet
import voc_data
dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=int(rank), world_size=2)
data = voc_data.VOCDataset(voc_data.list_items(Path(root), "val"), voc_data.EvalTransform())
loader = voc_data.eval_loader(data, 0, int(rank), 2)
result = voc_data.evaluate(ColourNet(), loader, "cpu")
torch.save((result.matrix.counts, result.loss, result.images), f"{out}/{rank}.pt")
dist.destroy_process_group()
"""


# ------------------------------------------------------------------------------------- palette


def test_palette_has_the_colours_of_voc():
    known = {
        "background": (0, 0, 0), "aeroplane": (128, 0, 0), "bicycle": (0, 128, 0),
        "bird": (128, 128, 0), "boat": (0, 0, 128), "bottle": (128, 0, 128), "bus": (0, 128, 128),
        "car": (128, 128, 128), "cat": (64, 0, 0), "chair": (192, 0, 0), "cow": (64, 128, 0),
        "diningtable": (192, 128, 0), "dog": (64, 0, 128), "horse": (192, 0, 128),
        "motorbike": (64, 128, 128), "person": (192, 128, 128), "pottedplant": (0, 64, 0),
        "sheep": (128, 64, 0), "sofa": (0, 192, 0), "train": (128, 192, 0),
        "tvmonitor": (0, 64, 128),
    }  # fmt: skip
    palette = voc_data.voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert {name: tuple(palette[i]) for i, name in enumerate(voc_data.CLASSES)} == known
    assert tuple(palette[VOID]) == (224, 224, 192)
