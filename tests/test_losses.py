"""The losses against the formulas in the docstring of kd_losses.py, written out in numpy."""

import numpy as np
import pytest
import torch

import kd_losses
from kd_losses import cross_entropy, feature_based_kd_loss, response_based_kd_loss
from voc_data import UNLABELLED, VOID

CLASSES = 21
WEIGHTS = torch.linspace(0.4, 5, CLASSES)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def labels_at(labels, size):
    """The label under the centre of each cell of a grid of `size`."""
    rows, columns = (
        np.floor((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip(size, labels.shape[1:])
    )
    return labels.numpy()[:, rows][:, :, columns]


def numpy_ce(logits, labels, weights):
    """sum w[y] * -log p[y] / sum w[y] over labelled pixels, pixel by pixel."""
    log_p, labels = log_softmax(logits.double().numpy()), labels_at(labels, logits.shape[-2:])
    total = norm = 0
    for n, y, x in np.ndindex(*labels.shape):
        label = labels[n, y, x]
        if label < CLASSES:
            total -= weights[label].item() * log_p[n, label, y, x]
            norm += weights[label].item()
    return total / norm


def numpy_kl(student, teacher, labels, weights, temperature):
    """T^2 * sum v KL(t || s) / sum v over pixels that are not void; v = sum_c p_t(T=1) w."""
    labels = labels_at(labels, student.shape[-2:])
    at_one = np.exp(log_softmax(teacher.double().numpy()))
    log_s = log_softmax(student.double().numpy() / temperature)
    log_t = log_softmax(teacher.double().numpy() / temperature)
    total = norm = 0
    for n, y, x in np.ndindex(*labels.shape):
        if labels[n, y, x] != VOID:
            s, t = log_s[n, :, y, x], log_t[n, :, y, x]
            v = at_one[n, :, y, x] @ weights.double().numpy()
            total += v * (np.exp(t) * (t - s)).sum()
            norm += v
    return temperature**2 * total / norm


def numpy_cosine(student, teacher, labels):
    """Mean over levels of the mean of 1 - cos over positions that are not void."""
    levels = []
    for level, s in student.items():
        s, t = s.double().numpy(), teacher[level].double().numpy()
        at = labels_at(labels, s.shape[-2:])
        cosine = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
        levels.append((1 - cosine)[at != VOID].mean())
    return np.mean(levels)


@pytest.fixture
def batch():
    """Logits of student and teacher (2, 21, 7, 9) and labels (2, 28, 35), 4 px a cell or less."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(2, CLASSES, 7, 9, generator=generator) for _ in range(2))
    labels = torch.randint(0, CLASSES, (2, 28, 35), generator=generator, dtype=torch.uint8)
    labels[0, :8] = VOID  # two rows of cells
    labels[1, 12:20, 6:20] = VOID
    labels[1, :4] = UNLABELLED  # one row of cells
    return student, teacher, labels


def losses(student, teacher, labels, weights=WEIGHTS, temperature=2.0):
    """All three of one batch; the logits serve as features too."""
    return {
        "ce": cross_entropy(student, labels, weights),
        "response": response_based_kd_loss(student, teacher, labels, weights, temperature),
        "feature": feature_based_kd_loss({"high": student}, {"high": teacher}, labels),
    }


NAMES = ("ce", "response", "feature")


def test_cross_entropy_is_the_weighted_mean(batch):
    logits, _, labels = batch
    expected = numpy_ce(logits, labels, WEIGHTS)
    assert cross_entropy(logits, labels, WEIGHTS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_response_loss_is_the_weighted_mean_times_t_squared(batch, temperature):
    student, teacher, labels = batch
    loss = response_based_kd_loss(student, teacher, labels, WEIGHTS, temperature)
    expected = numpy_kl(student, teacher, labels, WEIGHTS, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_feature_loss_is_the_mean_over_levels_of_one_minus_cosine(batch):
    student, teacher = ({"high": z, "low": z[:, :6, ::2, ::3]} for z in batch[:2])
    loss = feature_based_kd_loss(student, teacher, batch[2])
    assert loss.item() == pytest.approx(numpy_cosine(student, teacher, batch[2]), rel=1e-5)


def test_response_loss_resizes_the_teacher_and_not_the_student(batch):
    """A teacher that gives one distribution everywhere gives it at any size."""
    student, _, labels = batch
    teacher = torch.randn(2, CLASSES, 1, 1, generator=torch.Generator().manual_seed(1))
    expected = numpy_kl(student, teacher.expand(-1, -1, 7, 9), labels, WEIGHTS, 1.0)
    for size in ((7, 9), (4, 5), (28, 36)):
        loss = response_based_kd_loss(student, teacher.expand(-1, -1, *size), labels, WEIGHTS)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_all_void_batch_gives_zero_and_zero_gradients(batch, name):
    student, teacher, labels = batch
    student.requires_grad_()
    loss = losses(student, teacher, torch.full_like(labels, VOID))[name]
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(batch, dtype):
    student, teacher = (values.to(dtype) for values in batch[:2])
    for name, loss in losses(student, teacher, batch[2]).items():
        assert loss.dtype == torch.float32
        assert loss == losses(student.float(), teacher.float(), batch[2])[name]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(batch, name):
    """Central differences, in pixels that count for all losses and in one unlabelled pixel."""
    student, teacher, labels = batch[0].double(), batch[1], batch[2]
    formula = {
        "ce": lambda s: numpy_ce(s, labels, WEIGHTS),
        "response": lambda s: numpy_kl(s, teacher, labels, WEIGHTS, 2.0),
        "feature": lambda s: numpy_cosine({"high": s}, {"high": teacher}, labels),
    }[name]
    leaf = student.float().requires_grad_()
    losses(leaf, teacher, labels)[name].backward()
    for place in [(0, 2, 4, 4), (0, 20, 6, 8), (1, 0, 6, 1), (1, 3, 0, 2)]:
        step = torch.zeros_like(student)
        step[place] = 1e-4
        slope = (formula(student + step) - formula(student - step)) / 2e-4
        assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_extreme_logits_and_zero_features_have_finite_gradients(batch):
    student, teacher, labels = batch
    for factors in ((1e4, -1e4), (0, 1)):
        leaf = (factors[0] * student).requires_grad_()
        total = sum(losses(leaf, factors[1] * teacher, labels).values())
        total.backward()
        assert total.isfinite() and leaf.grad.isfinite().all()


def test_class_weights_are_a_power_of_the_share():
    pixels = torch.tensor([7300, 1500, 900, 300])
    share = np.array([0.73, 0.15, 0.09, 0.03])
    for power in (0, 0.5, 1):
        weights = kd_losses.class_weights(pixels, power)
        np.testing.assert_allclose(weights, share**-power, rtol=1e-6)
    rare = kd_losses.class_weights(torch.tensor([2**40, 1, 0]), 1.0)
    np.testing.assert_allclose(rare, [1, 1000, 1000], rtol=1e-6)  # bounded
