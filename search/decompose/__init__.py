"""The decompositions, one file each, behind one small interface (``base.Method``)."""

from search.decompose.base import Fit, Method
from search.decompose.r_cp import RCP
from search.decompose.r_tucker import RTucker
from search.decompose.spatial_svd import SpatialSVD
from search.decompose.svd import SVD
from search.decompose.tucker2 import SVDInput, Tucker2

__all__ = ["METHODS", "Fit", "Method"]

METHODS: dict[str, Method] = {m.name: m for m in (SVD(), SVDInput(), SpatialSVD(), Tucker2(), RCP(), RTucker())}
"""Every method by its name: what ``methods: "auto"`` may mix."""
