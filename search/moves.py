"""Local refinement: the best plan once more, a little smaller, with other weights for its layers.

The profile measures one layer at a time; what the layers do together only candidates tell. So a plan that keeps the
budget is moved: the allocator is asked for ``STEP`` of its cost, with the weights that plan had times a log-normal draw
for each site. One that keeps the budget too is the next to be moved: a (1+1) evolution strategy on the allocator's
weights. The draws hang on the job's seed and the candidates' numbers alone, so that the rows tell them again.
"""

import math
import random
from collections.abc import Sequence

from search.space import SearchSpace, Start, allocated, macs_share
from search.spec import JobSpec, TrialRecord

__all__ = ["MOVED", "moved"]

MOVED = "moved_from"
"""The parameter that names the candidate a plan was moved from."""
STEP = 0.98
SPREAD = 0.3
"""Standard deviation of the log of one draw."""


def moved(spec: JobSpec, space: SearchSpace, best: TrialRecord, stage: Sequence[TrialRecord], number: int) -> Start:
    """Candidate ``number``: a move of ``best``, which is of the allocator or of moves of its plans."""
    ground, mix = space.ground, macs_share(spec)
    parents = {record.number: record.params.get(MOVED) for record in stage}
    weights = {site.site: 1.0 for site in ground.sites}
    drawn, at = [number], best.number
    while (parent := parents.get(at)) is not None:
        drawn.append(at)
        at = int(parent)
    for each in reversed(drawn):
        chance = random.Random(f"{spec.search.seed}/{each}")  # noqa: S311 - not a secret
        weights = {name: weight * math.exp(chance.gauss(0.0, SPREAD)) for name, weight in weights.items()}
    plan = allocated(ground, STEP * ground.share(best.plan, mix), mix, ground.weights(weights), None)
    return Start(space.params_of(plan) | {"start": "moved", MOVED: best.number}, plan)
