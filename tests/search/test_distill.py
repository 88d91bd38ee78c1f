"""What fine-tuning minimises where the answer is a map, written out in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from search.distill import objective, trivial_answer
from search.heatmaps import gaussians
from search.spec import FineTune, Metric, Task

RECIPE = FineTune(distill=0.3, temperature=2.0, heatmap_sigma=1.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_segmentation_is_cross_entropy_where_it_counts_and_the_original_everywhere() -> None:
    y, teacher = random(2, 4, 4, 4), random(2, 4, 4, 4, seed=1)  # as many classes as rows and columns
    labels = torch.randint(4, (2, 4, 4), generator=torch.Generator().manual_seed(2))
    labels[0, :2] = 255
    loss = objective(Task.SEGMENTATION, Metric.MIOU, RECIPE, teacher)(y, teacher, labels)
    p, t = softmax(y.double().numpy()), labels.numpy()
    hard = -np.mean([np.log(p[n, t[n, i, j], i, j]) for n, i, j in np.argwhere(t != 255)])
    soft_y, soft_t = (softmax(z.double().numpy() / 2) for z in (y, teacher))
    soft = (soft_t * np.log(soft_t / soft_y)).sum(1).mean()
    assert float(loss) == pytest.approx(0.7 * hard + 0.3 * 4 * soft, rel=1e-5)


def test_a_batch_without_a_pixel_that_counts_learns_from_the_original_alone() -> None:
    y, teacher = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1)
    of = objective(Task.SEGMENTATION, Metric.MIOU, RECIPE, teacher)
    loss = of(y, teacher, torch.full((2, 4, 4), 255))
    assert float(loss.detach()) == pytest.approx(0.3 * float(of(y.detach(), teacher, None)), rel=1e-5)
    loss.backward()
    assert torch.isfinite(y.grad).all()


def test_keypoints_are_gaussians_of_the_originals_height_where_a_joint_counts() -> None:
    joints = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(3))
    joints[..., 2] = torch.tensor([[1.0, 1], [1, 0], [0, 1]])
    drawn = gaussians(joints, 6, 8, 1.5)
    y, teacher = random(3, 2, 6, 8), 5 * drawn
    teacher[1, 1] = 9
    loss = objective(Task.KEYPOINTS, Metric.PCK, RECIPE, teacher)(y, teacher, joints)
    there = joints[..., 2] > 0
    hard = float((y[there] - 5 * drawn[there]).square().mean())
    soft = float((y - teacher).square().mean())
    assert float(loss) == pytest.approx((0.7 * hard + 0.3 * soft) / float(teacher.var(correction=0)), rel=1e-5)


def test_keypoints_without_labels_follow_the_original() -> None:
    y, teacher = random(3, 2, 6, 8), random(3, 2, 6, 8, seed=1)
    of = objective(Task.KEYPOINTS, Metric.PCK, RECIPE, teacher)
    assert float(of(y, teacher, None)) == pytest.approx(
        float((y - teacher).square().mean() / teacher.var(correction=0))
    )
    nobody = torch.zeros(3, 2, 4)
    assert float(of(y, teacher, nobody)) == pytest.approx(0.3 * float(of(y, teacher, None)), rel=1e-5)


def test_a_trivial_answer_is_uniform_for_classes_and_the_mean_for_heatmaps() -> None:
    teacher = random(4, 3, 2, 2)
    assert trivial_answer(Task.SEGMENTATION, Metric.MIOU, teacher).abs().max() == 0
    torch.testing.assert_close(trivial_answer(Task.KEYPOINTS, Metric.PCK, teacher)[2], teacher.mean(0))
