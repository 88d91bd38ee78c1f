"""Names of an upload's layers and tensors, and what they are called here.

A user may give an attribute any name without a dot. An exported graph holds its layers as attributes of torch's own
class and writes their names into Python code, so a layer called ``code`` at the top, or ``class`` anywhere, cannot be
loaded again, by torch no more than by us.
"""

import keyword
import re
import unicodedata

from torch import fx, nn

from search.errors import Refused

__all__ = ["Names"]

_LENGTH_MAX = 500
_OF_MODULES = frozenset(dir(nn.Module()))
_OF_GRAPHS = frozenset(
    # The last are what torch sets on the module of a program; the code itself calls that module self.
    {*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_guards_fn", "_in_spec", "_out_spec"}
    | {"range_constraints", "validate_inputs", "self"}
)


class Names:
    """Dotted names of an upload to names near them: ``block.class.weight`` to ``block.class_.weight``.

    Letters, digits and underscores stay; equal names become equal ones and different names different ones.
    """

    def __init__(self) -> None:
        self.renamed: dict[str, str] = {}
        """What is called otherwise here: its dotted name here to the last part of the user's."""
        self._here: dict[str, str] = {"": ""}
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        """Raises ``Refused``: no name that a module can have."""
        if len(name) > _LENGTH_MAX or not all(name.split(".")) or re.search(r"[\ud800-\udfff]", name):
            raise Refused("tensor_name", f"{name[:80]!r} is not a dotted name of at most {_LENGTH_MAX} characters")
        return self._called(name)

    def _called(self, name: str) -> str:
        if name not in self._here:
            above, _, given = name.rpartition(".")
            parent = self._called(above)
            prefix = f"{parent}." if parent else ""
            # Python reads names in this normal form.
            part = re.sub(r"\W", "_", unicodedata.normalize("NFKC", given))
            reserved = _OF_MODULES if parent else _OF_GRAPHS
            while keyword.iskeyword(part) or part in reserved or prefix + part in self._taken:
                part += "_"
            self._here[name] = prefix + part
            self._taken.add(prefix + part)
            if part != given:
                self.renamed[prefix + part] = given
        return self._here[name]
