"""The confusion matrix and `evaluate` against counting pixel by pixel."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import voc_data
from voc_data import NUM_CLASSES, UNLABELLED, VOID, ConfusionMatrix, VOCDataset

CPU = torch.device("cpu")


def count(target, prediction):
    """Counts[true, predicted], one pixel at a time."""
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=int)
    for true, predicted in zip(np.ravel(target).tolist(), np.ravel(prediction).tolist()):
        if true < NUM_CLASSES:
            counts[true, predicted] += 1
    return counts


def test_confusion_matrix_counts_as_a_loop_over_the_pixels():
    """The truth has five of the classes and void, the prediction all classes."""
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 5, 12, 20, VOID], (3, 40, 30)).astype(np.uint8)
    target[2, 0] = UNLABELLED  # a pixel without a label is left out as well
    prediction = np.where(rng.random(target.shape) < 0.6, target, rng.integers(0, 21, target.shape))
    prediction[prediction >= UNLABELLED] = 7
    prediction[target == 12] = 3  # a class that is there and never found
    matrix, expected = ConfusionMatrix(), count(target, prediction)
    for one_target, one_prediction in zip(target, prediction):
        matrix.update(torch.from_numpy(one_target), torch.from_numpy(one_prediction))
    assert np.array_equal(matrix.counts.numpy(), expected)
    found = {c: expected[c, c] / (expected[c].sum() + expected[:, c].sum() - expected[c, c])
             for c in (0, 1, 5, 12, 20)}  # fmt: skip
    for label, iou in enumerate(matrix.iou.tolist()):
        assert iou == pytest.approx(found[label], abs=1e-12) if label in found else np.isnan(iou)
    assert found[12] == 0 and matrix.miou == pytest.approx(sum(found.values()) / 5, abs=1e-12)
    assert matrix.pixel_accuracy == pytest.approx(expected.trace() / expected.sum(), abs=1e-12)
    table = {line.split("  ")[0]: line.split()[-1] for line in str(matrix).splitlines()}
    assert table["person"] == "nan" and table["bottle"] == f"{found[5]:.4f}"
    assert table["mIoU"] == f"{matrix.miou:.4f}" and {*voc_data.CLASSES} < {*table}
    matrix.counts[0, 0], matrix.counts[0, 1] = 2**40, 2**24  # float32 counts up to 2**24
    matrix.update(torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.int64))
    assert matrix.counts[0, 1] == 2**24 + 1
    assert 1 - matrix.pixel_accuracy == pytest.approx(2**24 / 2**40, rel=1e-3)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = "local_scalar|nonzero|bincount|masked_select"
        self.number += bool(re.search(names, function.__name__))
        return function(*args, **kwargs or {})


class ColourNet(nn.Module):
    """A fixed linear function of the colours, (1, 3, H, W) -> (1, 21, H / stride, W / stride)."""

    def __init__(self, stride=1):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, 3, 1, 1, generator=generator))
        self.stride, self.seen = stride, []

    def forward(self, image):
        self.seen.append(tuple(image.shape[-2:]))
        return F.conv2d(image, self.weight, stride=self.stride)


@pytest.fixture(scope="module")
def images(tiny_voc):
    return VOCDataset(voc_data.list_items(tiny_voc, "val"))


def test_batches_have_one_size_and_few_images_wait():
    sizes = [(10, 10), (20, 10), (10, 10), (20, 10), (10, 10), (30, 30)]
    samples = enumerate(np.zeros((*size, 4), np.uint8) for size in sizes)
    batches = voc_data.batches_of_one_size(samples, 300)
    assert [[index for index, _ in batch] for batch in batches] == [[1, 3], [0, 2, 4], [5]]
    taken, given = [], []
    many = (taken.append(n) or (n, np.zeros((n, 1, 4), np.uint8)) for n in range(1, 100))
    for batch in voc_data.batches_of_one_size(many, 100):  # images of n pixels, no two alike
        given += [index for index, _ in batch]
        assert sum(taken) - sum(given) < 1600
    assert sorted(given) == taken


@pytest.mark.parametrize("stride, eval_size, limit", [(1, 0, 1), (4, 0, 10**9), (4, 80, 10**9)])
def test_evaluate_counts_at_the_size_of_the_mask_as_done_by_hand(
    images, stride, eval_size, limit, monkeypatch
):
    monkeypatch.setattr(voc_data, "EVAL_PIXELS", {"cpu": limit})
    images = VOCDataset(images.items + images.items[:3])  # some of one size
    network, shown, counts, losses, sizes = ColourNet(stride), {}, 0, [], []
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    matrix, loss = voc_data.evaluate(
        network, images, eval_size, CPU, on_image=lambda index, *maps: shown.update({index: maps})
    )
    for index, pixels in enumerate(images):
        image, mask = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1), pixels[..., 3]
        scale = eval_size / max(mask.shape) if eval_size else 1
        sizes.append(tuple(round(side * scale) for side in mask.shape))
        image = voc_data.TF.resize(image, sizes[-1], antialias=True)
        with torch.no_grad():
            logits = ColourNet(stride)(((image / 255 - mean) / std)[None])
            logits = F.interpolate(logits, size=mask.shape, mode="bilinear")[0].double()
        best, log_p = logits.argmax(0).numpy(), logits.log_softmax(0).numpy()
        counts = counts + count(mask, best)
        losses.append(-log_p[(np.where(mask < 21, mask, 0), *np.indices(mask.shape))][mask != VOID])
        assert np.array_equal(shown[index][0], mask)
        assert (shown[index][1].numpy() == best).mean() > 0.999
    passes = Counter(sizes) if limit == 1 else Counter({*sizes})
    assert Counter(network.seen) == passes and len({*sizes}) > 1 and len(shown) == 11
    # A few pixels have two best logits that are equal but for rounding.
    assert np.abs(matrix.counts.numpy() - counts).sum() <= 4e-4 * counts.sum()
    assert loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-4)


def test_device_is_waited_for_at_the_end_alone(images):
    """Never to count, and as often for one image as for eight."""
    with Waits() as update:
        ConfusionMatrix().update(torch.tensor([[0, VOID]]), torch.tensor([[1, 1]]))
    with Waits() as one:
        voc_data.evaluate(ColourNet(), VOCDataset(images.items[:1]), 0, CPU)
    with Waits() as eight:
        voc_data.evaluate(ColourNet(), images, 0, CPU)
    assert update.number == 0 < one.number == eight.number


def one_of_two(rank, images, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    matrix, loss = voc_data.evaluate(ColourNet(), images, 0, CPU)
    torch.save((matrix.counts, loss), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_both_get_the_sums_over_all_images(images, tmp_path):
    odd = VOCDataset(images.items[:7])
    torch.multiprocessing.start_processes(one_of_two, (odd, tmp_path), 2, start_method="fork")
    matrix, loss = voc_data.evaluate(ColourNet(), odd, 0, CPU)
    for rank in (0, 1):
        counts, other_loss = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(counts, matrix.counts) and other_loss == pytest.approx(loss, rel=1e-6)


def test_palette_has_the_colours_of_voc():
    known = ("000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000 "
             "400080 c00080 408080 c08080 004000 804000 00c000 80c000 004080")  # fmt: skip
    palette = voc_data.voc_palette()
    assert [bytes(colour).hex() for colour in palette[:21]] == known.split()
    assert palette.shape == (256, 3) and palette[VOID].tolist() == [224, 224, 192]
