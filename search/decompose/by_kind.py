"""One method whose algebra depends on the kind of layer, behind one name."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Fit, Method
from search.spec import CurvePoint

__all__ = ["ByKind"]


class ByKind:
    """``Method`` that hands each layer to the form for its kind, any other kind to ``others``."""

    def __init__(self, others: Method, forms: Mapping[tuple[type[nn.Module], ...], Method]) -> None:
        self.name = others.name
        self._others, self._forms = others, dict(forms)

    def form(self, layer: nn.Module) -> Method:
        return next((f for kinds, f in self._forms.items() if isinstance(layer, kinds)), self._others)

    def applies_to(self, layer: nn.Module) -> str | None:
        return self.form(layer).applies_to(layer)

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        return self.form(layer).ranks(layer)

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return self.form(layer).full_ranks(layer)

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        return self.form(layer).cost(layer, ranks, output_positions, input_sizes=input_sizes)

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return self.form(layer).variational_ranks(layer)

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        return self.form(layer).factorize(layer, ranks, statistics, metric=metric, start=start)

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        return self.form(layer).curve(layer, statistics, output_positions, metric=metric)
