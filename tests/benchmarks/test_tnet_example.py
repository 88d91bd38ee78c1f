import numpy as np

from benchmarks.figures import LIMBS, render
from examples.tnet import ENLARGED, FOUND, MISSED, picture


def test_joints_are_drawn_where_they_were_found_and_coloured_by_whether_that_is_right() -> None:
    figures = render(2)
    joints = figures.keypoints.copy()
    joints[1] += 3 * figures.heads[1]  # all of the second figure's are wrong
    drawn = np.asarray(picture(figures, joints, rows=1, columns=2))
    assert drawn.shape == (64 * ENLARGED, 128 * ENLARGED, 3)
    x, y = (ENLARGED * (joints[0] + 0.5)).round().astype(int).T
    # Another joint's outline may cover one, so most of them are looked at.
    assert (drawn[y, x] == FOUND).all(1).mean() > 0.7
    assert (drawn[:, : 64 * ENLARGED] == MISSED).all(-1).sum() == 0
    assert (drawn[:, 64 * ENLARGED :] == MISSED).all(-1).sum() > 0


def test_every_joint_has_a_line() -> None:
    assert {joint for limb in LIMBS for joint in limb} == set(range(14))
