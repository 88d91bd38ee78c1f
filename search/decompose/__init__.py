"""The decompositions, one file each, behind one small interface (``base.Method``; of several layers together,
``joint.JointMethod``)."""

from collections.abc import Mapping
from typing import Any

from search.decompose.base import Fit, Method
from search.decompose.by_kind import ByKind
from search.decompose.cp3 import CP3
from search.decompose.cp4 import CP4
from search.decompose.joint import Group, JointFit, JointMethod, group_of
from search.decompose.joint_mps import JointMPS
from search.decompose.joint_tucker import JointTucker
from search.decompose.r_cp import RCP
from search.decompose.r_tt import RTT
from search.decompose.r_tucker import RTucker
from search.decompose.shuffled import ShuffledCP, ShuffledMethod, ShuffledTT, ShuffledTucker
from search.decompose.spatial_svd import SpatialSVD
from search.decompose.svd import SVD
from search.decompose.svd_recurrent import RecurrentSVD
from search.decompose.tied import Tied, same_weight
from search.decompose.tt import TT
from search.decompose.tt_matrix import TTMatrix
from search.decompose.tucker2 import SVDInput, Tucker2
from search.recurrent import RECURRENT

__all__ = ["AUTO", "JOINT_METHODS", "METHODS", "OF_SEVERAL", "Fit", "Group", "JointFit", "JointMethod", "Method"]
__all__ += ["group_of", "joint_method_of", "method_of", "same_weight"]

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *(ByKind(SVD(), {RECURRENT: RecurrentSVD()}), SVDInput(), SpatialSVD(), Tucker2(), CP3(), CP4(), TT()),
        *(TTMatrix(), RTT(), RCP(), RTucker()),
        *(ShuffledTT(), ShuffledTucker(), ShuffledCP()),
    )
}
"""Every method of one layer by its name."""

JOINT_METHODS: dict[str, JointMethod] = {m.name: m for m in (JointTucker(), JointMPS())}
"""Every method of several layers by its name."""

OF_SEVERAL: tuple[str, ...] = (*JOINT_METHODS, *METHODS)
"""What may replace a site of several layers: a joint method, or one of ``METHODS`` where they hold one weight."""


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    """The method of one layer that a plan's entry names, with its options."""
    return TTMatrix(options) if name == TTMatrix.name else METHODS[name]


def joint_method_of(name: str, options: Mapping[str, Any]) -> JointMethod:
    """Likewise of several layers: one of ``OF_SEVERAL``."""
    return Tied(method_of(name, options)) if name in METHODS else JOINT_METHODS[name]


AUTO: tuple[str, ...] = tuple(name for name, method in METHODS.items() if not isinstance(method, ShuffledMethod))
"""What ``methods: "auto"`` mixes, besides the joint methods where groups are given. Shuffled kernels save no
multiplications and take longest to fit; layers not trained to share factors do not share them: both by name only."""
