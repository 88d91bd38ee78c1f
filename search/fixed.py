"""Plans that a job gives for its layers: what cannot be is refused before anything is measured."""

from collections.abc import Callable, Sequence

from torch import nn

from search.decompose import METHODS, OF_SEVERAL, group_of, joint_method_of, method_of
from search.errors import BadRequest
from search.spec import Plan, SitePlan
from tenfold.layers import members_like, options_reason

__all__ = ["check_fixed"]


def check_fixed(fixed: Plan, network: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Refuse a plan that does not fit ``network``. ``ties``: its layers that hold one weight, two or more each.

    Raises:
        BadRequest: ``unknown_site``, ``unknown_method``, ``unknown_option``, ``method_does_not_apply``, ``bad_rank``
            or ``shared_weight``.
    """
    for site, chosen in fixed.items():
        if reason := options_reason(chosen.method, chosen.options):
            raise BadRequest("unknown_option", f"layers.fixed: {site}: {reason}")
        check = _check_several if chosen.members else _check_one
        check(site, chosen, network)
        _check_ties(site, chosen, ties)


def _check_one(site: str, chosen: SitePlan, network: nn.Module) -> None:
    try:
        layer = network.get_submodule(site)
    except AttributeError:
        raise BadRequest("unknown_site", f"layers.fixed names {site!r}, which is no layer of this network") from None
    name = chosen.method
    if name not in METHODS:
        raise BadRequest("unknown_method", f"layers.fixed: {site}: no method {name!r}; there are {sorted(METHODS)}")
    method = method_of(name, chosen.options)
    reason = method.applies_to(layer)
    if reason is not None:
        raise BadRequest("method_does_not_apply", f"layers.fixed: {site}: {name} does not apply: {reason}")
    dense = sum(p.numel() for p in layer.parameters())

    def size(ranks: Sequence[int]) -> int:
        return method.cost(layer, ranks, 1)[0]

    _check_ranks(site, chosen, method.ranks(layer), method.full_ranks(layer), size, dense)


def _check_several(site: str, chosen: SitePlan, network: nn.Module) -> None:
    name = chosen.method
    try:
        group = group_of(network, chosen.members)
    except AttributeError as error:
        raise BadRequest(
            "unknown_site", f"layers.fixed: {site}: a member is no layer of this network: {error}"
        ) from None
    if name not in OF_SEVERAL:
        raise BadRequest(
            "unknown_method",
            f"layers.fixed: {site}: no method {name!r} of several layers; there are {sorted(OF_SEVERAL)}",
        )
    method = joint_method_of(name, chosen.options)
    if reason := method.applies_to(group):
        raise BadRequest("method_does_not_apply", f"layers.fixed: {site}: {name} does not apply: {reason}")
    none = [0] * len(group.layers)

    def size(ranks: Sequence[int]) -> int:
        return method.cost(group, ranks, none)[0]

    _check_ranks(site, chosen, method.ranks(group), method.full_ranks(group), size, group.dense(none)[0])
    try:
        layers = dict(zip(group.names, group.layers, strict=True))
        members_like(layers, name, chosen.ranks, chosen.members, chosen.options)
    except ValueError as error:
        raise BadRequest("bad_rank", f"layers.fixed: {site}: {error}") from None


def _check_ranks(
    site: str,
    chosen: SitePlan,
    lattice: Sequence[tuple[int, ...]],
    full: tuple[int, ...],
    size: Callable[[Sequence[int]], int],
    dense: int,
) -> None:
    """Refuse ranks that a method cannot take or that make nothing smaller, and name the largest of ``lattice`` in them.

    ``full``: each rank's largest value; ``size``: parameters by ranks; ``dense``: parameters of what they replace.
    """
    asked, usable = chosen.ranks, lattice
    if len(asked) != len(full):
        reason = f"it takes {len(full)} here"
    else:
        usable = [ranks for ranks in lattice if all(r <= a for r, a in zip(ranks, asked, strict=True))] or lattice[:1]
        if any(rank > most for rank, most in zip(asked, full, strict=True)):
            reason = f"at {list(full)} it is exact here, and no rank can be higher"
        elif size(asked) >= dense:
            reason = f"{size(asked):,} parameters would replace {dense:,}"
        else:
            return
    example = max(usable, key=size)
    raise BadRequest(
        "bad_rank",
        f"layers.fixed: {site}: {chosen.method} was given the ranks {list(asked)}: {reason}; give for example "
        f"{list(example)}",
    )


def _check_ties(site: str, chosen: SitePlan, ties: Sequence[tuple[str, ...]]) -> None:
    """A weight that stays in one layer saves nothing in another."""
    layers = {*(chosen.members or (site,))}
    for tie in ties:
        if layers.intersection(tie) and not layers.issuperset(tie):
            raise BadRequest(
                "shared_weight",
                f"layers.fixed: {site} replaces {sorted(layers)}, but {list(tie)} hold one weight: give one site with "
                "all of them as its members, placed [0], [1] ..",
            )
