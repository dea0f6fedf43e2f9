"""The losses against their formulas, written out in numpy (float64)."""

import math

import numpy as np
import pytest
import torch

from kd_losses import (
    balanced_class_weights, cross_entropy, feature_based_kd_loss, response_based_kd_loss,
)  # fmt: skip
from voc_data import UNLABELLED, VOID, UsageError

CLASSES = 21


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def numpy_ce(logits, labels, weights=np.ones(CLASSES)):
    """Mean of -w[y] log p[y] over the labelled pixels, pixel by pixel."""
    log_p = log_softmax(logits.double().numpy())
    terms = [
        -weights[labels[n, y, x]] * log_p[n, labels[n, y, x], y, x]
        for n, y, x in np.ndindex(*labels.shape)
        if labels[n, y, x] < CLASSES
    ]
    return sum(terms) / len(terms)


def numpy_kl(student, teacher, labels, temperature, weights=np.ones(CLASSES)):
    """T^2 * mean over the non-void pixels of sum over classes of p_t (log p_t - log p_s), times the
    weight that the teacher at T = 1 expects the pixel to have."""
    at_one = np.exp(log_softmax(teacher.double().numpy()))
    log_s = log_softmax(student.double().numpy() / temperature)
    log_t = log_softmax(teacher.double().numpy() / temperature)
    terms = []
    for n, y, x in np.ndindex(*labels.shape):
        if labels[n, y, x] != VOID:
            s, t = log_s[n, :, y, x], log_t[n, :, y, x]
            weight = at_one[n, :, y, x] @ weights
            terms.append(weight * sum(math.exp(b) * (b - a) for a, b in zip(s, t)))
    return temperature**2 * sum(terms) / len(terms)


def numpy_bilinear(array, size):
    """Bilinear resize of (N, C, H, W), pixel centres at half, edges repeated, no antialias."""
    out = array
    for axis, new in ((2, size[0]), (3, size[1])):
        old = out.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
        low = np.minimum(np.floor(place).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(4)])
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


def numpy_cosine_loss(student, teacher, labels):
    """mean over levels of the mean over positions of 1 - cos; labels picked by nearest centre."""
    levels = []
    for level in student:
        s = student[level].double().numpy()
        n, _, h, w = s.shape
        t = numpy_bilinear(teacher[level].double().numpy(), (h, w))
        terms = []
        for i, y, x in np.ndindex(n, h, w):
            if labels is not None:
                at_y = int((y + 0.5) * labels.shape[1] / h)
                at_x = int((x + 0.5) * labels.shape[2] / w)
                if labels[i, at_y, at_x] == VOID:
                    continue
            a, b = s[i, :, y, x], t[i, :, y, x]
            terms.append(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        levels.append(sum(terms) / len(terms))
    return sum(levels) / len(levels)


@pytest.fixture
def batch():
    """Logits of student and teacher (2, 21, 7, 9), and labels with void and unlabelled pixels."""
    generator = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(2, CLASSES, 7, 9, generator=generator)
    teacher = 3 * torch.randn(2, CLASSES, 7, 9, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 7, 9), generator=generator)
    labels[0, :2] = VOID
    labels[1, 3:5, 2:6] = VOID
    labels[1, 0] = UNLABELLED
    return student, teacher, labels


@pytest.fixture
def features():
    """Two levels of features and labels; half of image 0 and a corner of image 1 are void."""
    generator = torch.Generator().manual_seed(4)
    draw = {"low": (2, 6, 8, 8), "high": (2, 10, 4, 4)}
    student = {level: torch.randn(size, generator=generator) for level, size in draw.items()}
    teacher = {level: torch.randn(size, generator=generator) for level, size in draw.items()}
    labels = torch.randint(0, CLASSES, (2, 33, 33), generator=generator)
    labels[0, :, 16:] = VOID
    labels[1, :9, :9] = VOID
    labels[1, 20:] = UNLABELLED
    return student, teacher, labels


def close(value, expected, tolerance=1e-5):
    return value.item() == pytest.approx(expected, rel=tolerance)


# ------------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_is_the_formula(batch):
    logits, _, labels = batch
    assert close(cross_entropy(logits, labels), numpy_ce(logits, labels.numpy()))


@pytest.mark.parametrize("ignored", [VOID, UNLABELLED])
def test_cross_entropy_does_not_look_at_void_and_unlabelled_pixels(batch, ignored):
    logits, _, labels = batch
    labels = torch.where(labels == VOID, 0, labels)
    labels[0, :2] = ignored
    changed = logits.clone()
    changed[0, :, :2] = 50 * torch.randn(CLASSES, 2, 9)
    assert cross_entropy(changed, labels) == cross_entropy(logits, labels)


def test_class_weights_lift_rare_classes_and_keep_the_mean_at_one():
    counts = torch.tensor([7300, 1500, 900, 300])
    share = (counts / counts.sum()).double().numpy()
    for power in (0, 0.5, 1):
        weights = balanced_class_weights(counts, power).double().numpy()
        np.testing.assert_allclose(weights, share**-power / (share ** (1 - power)).sum(), rtol=1e-6)
        assert share @ weights == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("power", [0, 0.5, 1])
@pytest.mark.parametrize("counts", [(990, 10, 0), (950, 50, *[0] * 19), (2**40, 1, 1)])
def test_class_weights_of_absent_classes_are_bounded_and_leave_the_mean_at_one(counts, power):
    counts = torch.tensor(counts)
    weights = balanced_class_weights(counts, power)
    assert (counts * weights).sum() / counts.sum() == pytest.approx(1, rel=1e-5)
    assert (weights > 0).all() and weights.max() <= 1000 * weights[0]


def test_class_weights_without_any_labelled_pixel_are_all_one():
    assert (balanced_class_weights(torch.zeros(CLASSES), 0.5) == 1).all()


def test_class_weights_weigh_pixels_in_cross_entropy_and_response_loss(batch):
    student, teacher, labels = batch
    weights = torch.linspace(0.2, 3, CLASSES)
    expected = numpy_ce(student, labels.numpy(), weights.double().numpy())
    assert close(cross_entropy(student, labels, weights), expected)
    for temperature in (1.0, 4.0):
        loss = response_based_kd_loss(student, teacher, labels, temperature, weights)
        expected = numpy_kl(student, teacher, labels.numpy(), temperature, weights.double().numpy())
        assert close(loss, expected)


def test_cross_entropy_takes_labels_in_bytes(batch):
    logits, _, labels = batch
    assert cross_entropy(logits, labels.byte()) == cross_entropy(logits, labels)


# ------------------------------------------------------------------------------------ response


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_response_loss_is_the_formula_at_any_temperature(batch, temperature):
    student, teacher, labels = batch
    loss = response_based_kd_loss(student, teacher, labels, temperature)
    assert close(loss, numpy_kl(student, teacher, labels.numpy(), temperature))


def test_response_loss_of_equal_logits_is_zero(batch):
    student, _, labels = batch
    shifted = student + 2.5  # the same distributions
    assert response_based_kd_loss(student, shifted, labels, 2.0).item() == pytest.approx(
        0, abs=1e-5
    )


def test_response_loss_goes_from_teacher_to_student_and_not_back(batch):
    student, teacher, labels = batch
    forward = response_based_kd_loss(student, teacher, labels, 1.0).item()
    backward = response_based_kd_loss(teacher, student, labels, 1.0).item()
    assert abs(forward - backward) > 1e-3


def test_response_loss_scales_with_the_square_of_the_temperature(batch):
    """Logits T times larger at temperature T are the same distributions: only T^2 is left."""
    student, teacher, labels = batch
    at_one = response_based_kd_loss(student, teacher, labels, 1.0).item()
    at_three = response_based_kd_loss(3 * student, 3 * teacher, labels, 3.0)
    assert close(at_three, 9 * at_one)


def test_response_loss_leaves_void_out_and_counts_unlabelled(batch):
    student, teacher, labels = batch
    loss = response_based_kd_loss(student, teacher, labels, 1.0)
    in_void, in_unlabelled = student.clone(), student.clone()
    in_void[0, :, :2] += torch.randn(CLASSES, 2, 9)
    in_unlabelled[1, :, 0] += torch.randn(CLASSES, 9)
    assert response_based_kd_loss(in_void, teacher, labels, 1.0) == loss
    assert response_based_kd_loss(in_unlabelled, teacher, labels, 1.0) != loss


def test_response_loss_is_no_mean_over_classes_or_pixels_of_all_images(batch):
    """Twice the same batch, or a batch with more void around it, has the same loss."""
    student, teacher, labels = batch
    loss = response_based_kd_loss(student, teacher, labels, 2.0).item()
    doubled = [torch.cat([x, x]) for x in batch]
    assert close(response_based_kd_loss(*doubled, 2.0), loss)
    pad = [torch.nn.functional.pad(x, (0, 5, 0, 5)) for x in (student, teacher)]
    padded = torch.nn.functional.pad(labels, (0, 5, 0, 5), value=VOID)
    assert close(response_based_kd_loss(*pad, padded, 2.0), loss)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_response_loss_refuses_a_temperature_that_is_not_positive(batch, temperature):
    with pytest.raises(UsageError, match="temperature"):
        response_based_kd_loss(*batch, temperature)


def test_response_loss_is_finite_for_certain_teachers_and_students(batch):
    """One class certain on either side: 0 * log 0 must not become NaN."""
    student, teacher, labels = batch
    student = (1e4 * student).requires_grad_()
    loss = response_based_kd_loss(student, -1e4 * teacher, labels, 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


# ------------------------------------------------------------------------------------- feature


def test_feature_loss_is_the_formula_without_void_positions(features):
    student, teacher, labels = features
    expected = numpy_cosine_loss(student, teacher, labels.numpy())
    assert close(feature_based_kd_loss(student, teacher, labels), expected)


def test_feature_loss_without_labels_takes_every_position(features):
    student, teacher, labels = features
    loss = feature_based_kd_loss(student, teacher)
    assert close(loss, numpy_cosine_loss(student, teacher, None))
    assert loss != feature_based_kd_loss(student, teacher, labels)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 2)])
def test_feature_loss_resizes_the_teacher_to_the_student(features, size):
    student, teacher, labels = features
    teacher["high"] = torch.randn(2, 10, *size, generator=torch.Generator().manual_seed(1))
    expected = numpy_cosine_loss(student, teacher, labels.numpy())
    assert close(feature_based_kd_loss(student, teacher, labels), expected)


def test_feature_loss_counts_unlabelled_and_not_void_positions(features):
    student, teacher, labels = features
    loss = feature_based_kd_loss(student, teacher, labels)
    in_void = {level: value.clone() for level, value in student.items()}
    in_void["high"][0, :, :, 2:] = torch.randn(10, 4, 2)
    assert feature_based_kd_loss(in_void, teacher, labels) == loss
    unlabelled = {level: value.clone() for level, value in student.items()}
    unlabelled["high"][1, :, 3] = torch.randn(10, 4)
    assert feature_based_kd_loss(unlabelled, teacher, labels) != loss


def test_feature_loss_compares_directions_and_not_lengths(features):
    student, teacher, _ = features
    longer = {level: 7 * value for level, value in teacher.items()}
    opposite = {level: -value for level, value in teacher.items()}
    assert feature_based_kd_loss(longer, teacher).item() == pytest.approx(0, abs=1e-6)
    assert feature_based_kd_loss(opposite, teacher).item() == pytest.approx(2, abs=1e-6)


def test_feature_loss_weighs_levels_alike_whatever_their_size(features):
    student, teacher, _ = features
    each = [
        feature_based_kd_loss({level: student[level]}, {level: teacher[level]}).item()
        for level in student
    ]
    assert close(feature_based_kd_loss(student, teacher), sum(each) / 2)


def test_feature_loss_of_zero_features_has_finite_gradients(features):
    _, teacher, labels = features
    student = {
        level: torch.zeros_like(value, requires_grad=True) for level, value in teacher.items()
    }
    feature_based_kd_loss(student, teacher, labels).backward()
    assert all(value.grad.isfinite().all() for value in student.values())


# ----------------------------------------------------------------------------------- all three


def losses_of(student, teacher, labels):
    return {
        "ce": cross_entropy(student, labels),
        "response": response_based_kd_loss(student, teacher, labels, 2.0),
        "feature": feature_based_kd_loss({"high": student}, {"high": teacher}, labels),
    }


@pytest.mark.parametrize("name", ["ce", "response", "feature"])
def test_all_void_batch_gives_exactly_zero_and_zero_gradients(batch, name):
    student, teacher, labels = batch
    student.requires_grad_()
    loss = losses_of(student, teacher, torch.full_like(labels, VOID))[name]
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_batch_without_ground_truth_counts_in_distillation_alone(batch):
    student, teacher, labels = batch
    losses = losses_of(student, teacher, torch.full_like(labels, UNLABELLED))
    everywhere = losses_of(student, teacher, torch.zeros_like(labels))
    assert losses["ce"] == 0
    assert losses["response"] == everywhere["response"] > 0
    assert losses["feature"] == everywhere["feature"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ce", "response", "feature"])
def test_half_precision_inputs_are_computed_in_float32(batch, name, dtype):
    student, teacher, labels = batch
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = losses_of(student, teacher, labels)[name]
    assert loss.dtype == torch.float32
    assert loss == losses_of(student.float(), teacher.float(), labels)[name]


@pytest.mark.parametrize("name", ["ce", "response", "feature"])
def test_gradients_are_those_of_the_formula(batch, name):
    """Central differences in three logits of pixels that count."""
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in batch)
    formula = {
        "ce": lambda s: numpy_ce(s, labels.numpy()),
        "response": lambda s: numpy_kl(s, teacher, labels.numpy(), 2.0),
        "feature": lambda s: numpy_cosine_loss({"a": s}, {"a": teacher}, labels.numpy()),
    }[name]
    leaf = student.float().requires_grad_()
    losses_of(leaf, teacher.float(), labels)[name].backward()
    for place in [(0, 2, 4, 4), (0, 20, 6, 8), (1, 0, 6, 1)]:
        step = torch.zeros_like(student)
        step[place] = 1e-4
        slope = (formula(student + step) - formula(student - step)) / 2e-4
        assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)
