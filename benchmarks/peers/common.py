"""What every peer's script does: read the request, write each network and the rows. Needs torch and numpy only."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.exporting import export

__all__ = ["Request", "answer", "layers"]


class Request:
    """The network, the images to choose on, and what is wanted."""

    def __init__(self, path: Path) -> None:
        asked = json.loads(path.read_text())
        # Pickled by the process that started this one.
        self.network: nn.Module = torch.load(asked["network"], weights_only=False).eval()
        self.rates: list[float] = asked["rates"]
        """Shares of the parameters to keep."""
        self.images: int = asked["images"]
        """How many images all evaluations for one share together may look at."""
        self.folder = Path(asked["folder"])
        self._data = asked["data"]

    def choosing(self) -> tuple[Tensor, Tensor]:
        """Inputs as the network takes them, and labels: what may be used to choose."""
        with np.load(self._data) as arrays:
            return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


def layers(network: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """What may be decomposed: layers of these kinds, without the classifier and convolutions of an image's channels.

    Raises ValueError when there are none.
    """
    found = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    names = list(found)[:-1]
    kept = {n: found[n] for n in names if isinstance(found[n], kinds) and getattr(found[n], "in_channels", 5) > 4}
    if not kept:
        raise ValueError(f"nothing to decompose: no layer is of {', '.join(k.__name__ for k in kinds)}")
    return kept


def _renamed(network: nn.Module) -> nn.Module:
    """Children under names that can be written with a dot between: some peers' have hyphens."""
    for module in network.modules():
        for name in [n for n in module._modules if "-" in n]:
            module._modules[name.replace("-", "_")] = module._modules.pop(name)
    return network


def answer(compress: Callable[[Request, float], tuple[nn.Module, dict[str, Any]]]) -> None:
    """``compress(request, share kept)`` for every share; what it could not make is a row with the error."""
    request = Request(Path(sys.argv[1]))
    example = request.choosing()[0][:2]
    rows = []
    for rate in request.rates:
        began, cpu = time.monotonic(), time.process_time()
        row: dict[str, Any] = {"wanted": rate}
        try:
            network, facts = compress(request, rate)
            row |= facts
            row["file"] = str(export(_renamed(network).eval(), example, request.folder / f"{rate:g}.pt2"))
        except Exception as error:  # the peer's own, whatever it is; the other shares may still work
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row |= {"wall_s": round(time.monotonic() - began, 2), "cpu_s": round(time.process_time() - cpu, 2)}
        rows.append(row)
    if all("error" in row for row in rows):
        sys.exit(rows[0]["error"])
    Path(sys.argv[2]).write_text(json.dumps(rows))
