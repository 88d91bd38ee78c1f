"""Tensors made of a layer's parameters: anew at each call in training, once in evaluation without gradients.

What is kept holds until a parameter changes, which torch's version counters tell (an edit through ``.data`` they do not
count: call ``eval()`` after one). It is in no state dict, and an exported graph holds the parameters: it makes its
tensors at each call.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Keeping"]


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    tensors: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    """Aliases: as long as they live, no other tensor can be given their memory."""
    versions: tuple[int, ...]

    def is_of(self, key: Hashable, sources: Sequence[Tensor]) -> bool:
        return key == self.key and all(
            a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and b._version == version
            for a, b, version in zip(self.sources, sources, self.versions, strict=True)
        )


class Keeping(nn.Module):
    """A layer that keeps the last of what it made."""

    _kept: _Kept | None = None

    def made(
        self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` makes of ``sources``; ``key`` says which of the things that can be made of them."""
        traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(s.requires_grad for s in sources))
        # Tensors of inference mode have no version counter.
        if self.training or traced or any(s.is_inference() for s in sources):
            return make()
        if self._kept is None or not self._kept.is_of(key, sources):
            self._kept = None  # the memory of the last one first
            # In full precision and of use outside inference mode, wherever it happens to be made.
            device = sources[0].device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                tensors = make()
            versions = tuple(s._version for s in sources)
            self._kept = _Kept(key, tensors, tuple(s.detach() for s in sources), versions)
        return self._kept.tensors

    def train(self, mode: bool = True) -> "Keeping":
        super().train(mode)
        self._kept = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[no-untyped-call]
