"""The vocabulary that travels: between client, database, search and workers. Imports no torch.

Every value is frozen, refuses unknown fields, and round-trips through JSON
(``model_dump(mode="json")`` / ``model_validate``). Conventions used everywhere:

* ``drop`` is *how much worse* than the original, in the budget's units, positive is worse, whatever the metric's
  direction: accuracy points as a fraction (0.005 = half a point), relative increase for a loss.
* costs count the real module: ``parameters`` (elements, buffers excluded), ``macs`` (multiply-accumulates of one
  sample), ``bytes`` (of the stored tensors), ``latency_ms`` (median, milliseconds, one batch).
* a *site* is what one decomposition replaces: one layer, by its dotted name as the user wrote it; or several that are
  decomposed together, by the name of their group (its members are then told). A plan has a layer in one site only.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "BEYOND_CHANCE",
    "DEFAULT_EPOCHS",
    "FRACTIONS",
    "IGNORED_CLASS",
    "LEARNING_RATE_SCALE",
    "AskedWork",
    "Augmentation",
    "Budget",
    "Cost",
    "Costs",
    "CurvePoint",
    "DataInfo",
    "DataSpec",
    "EpochRecord",
    "ExportFormat",
    "ExportWork",
    "FineTune",
    "Finished",
    "Interval",
    "JobSpec",
    "LayerInfo",
    "Layers",
    "Metric",
    "ModelInfo",
    "Outcome",
    "Plan",
    "Profile",
    "ProfileWork",
    "RefineWork",
    "Rung",
    "Sampler",
    "SearchSpec",
    "SiteChoice",
    "SitePlan",
    "Space",
    "SplitSizes",
    "Storage",
    "Task",
    "TensorInfo",
    "Transform",
    "TrialRecord",
    "TrialResult",
    "TrialState",
    "TrialWork",
    "entry_of",
]


class Value(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------ what a user asks


class Task(StrEnum):
    CLASSIFICATION = "classification"
    """Integer class targets; logits out."""
    REGRESSION = "regression"
    """Float targets shaped like the output."""
    FIDELITY = "fidelity"
    """No labels: stay close to the original's own outputs."""
    SEGMENTATION = "segmentation"
    """A class for each pixel, ``(rows, height, width)``, 255 where none counts; logits, ``(classes, height, width)``,
    out."""
    KEYPOINTS = "keypoints"
    """Joints' coordinates ``(rows, joints, 2 or 3)``; a heatmap for each out, ``(joints, height, width)``."""


class Metric(StrEnum):
    ACCURACY = "accuracy"
    """Top-1, a fraction of 1; higher is better."""
    TOP5 = "top5"
    """Top-5, a fraction of 1; higher is better."""
    MSE = "mse"
    """Mean squared error; lower is better; drop = relative increase."""
    AGREEMENT = "agreement"
    """Share of samples whose arg-max equals the original's; the original scores 1; higher is better."""
    OUTPUT_ERROR = "output_error"
    """||y - y0||^2 / ||y0 - mean(y0)||^2 against the original's outputs; the original scores 0; drop = the value."""
    MIOU = "miou"
    """Intersection over union of each class over the whole split, the mean of the classes; higher is better."""
    PIXEL_ACCURACY = "pixel_accuracy"
    """Share of all counted pixels whose class is right; higher is better."""
    PCK = "pck"
    """Share of all labelled joints found within a distance (``DataSpec.pck_threshold``); higher is better."""


IGNORED_CLASS = 255
"""In a segmentation's class map: this pixel is not counted."""

FRACTIONS = frozenset({*Metric} - {Metric.MSE, Metric.OUTPUT_ERROR})
"""The metrics that are shares of 1, the higher the better; a drop of one is a difference."""


METRICS_OF_TASK: dict[Task, tuple[Metric, ...]] = {
    Task.CLASSIFICATION: (Metric.ACCURACY, Metric.TOP5),
    Task.REGRESSION: (Metric.MSE,),
    Task.FIDELITY: (Metric.OUTPUT_ERROR, Metric.AGREEMENT),
    Task.SEGMENTATION: (Metric.MIOU, Metric.PIXEL_ACCURACY),
    Task.KEYPOINTS: (Metric.PCK,),
}
"""The metrics a task allows; the first is its default."""


class Cost(StrEnum):
    PARAMETERS = "parameters"
    MACS = "macs"
    BYTES = "bytes"
    LATENCY = "latency"


METHOD_NAMES = (
    *("svd", "svd_input", "spatial_svd", "tucker2", "cp3", "cp4", "tt"),
    *("tt_matrix", "r_tt", "r_cp", "r_tucker"),
    *("shuffled_tt", "shuffled_tucker", "shuffled_cp"),
    *("joint_tucker", "joint_mps"),
)
"""What ``JobSpec.methods`` may name: the keys of ``search.decompose``'s METHODS and JOINT_METHODS, without torch."""


class ExportFormat(StrEnum):
    PT2 = "pt2"
    ONNX = "onnx"
    SAFETENSORS = "safetensors"
    REPORT = "report"


class Storage(StrEnum):
    """Of the weights in the files that are written beside the float32 ones."""

    FLOAT16 = "float16"
    INT8 = "int8"


class Sampler(StrEnum):
    TPE = "tpe"
    NSGA2 = "nsga2"
    GP = "gp"
    RANDOM = "random"


class Space(StrEnum):
    GUIDED = "guided"
    """A few global knobs that the allocator turns into ranks: good in tens of trials."""
    FULL = "full"
    """One knob for each layer: for long runs."""


class Augmentation(StrEnum):
    NONE = "none"
    CROP = "crop"
    """Zero-pad by an eighth of the side and crop back at random."""
    CROP_FLIP = "crop_flip"


class Transform(Value):
    """From the stored array to the network's input: ``(x * scale - mean) / std`` per channel, then channels first."""

    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["as_is", "nhwc"] = "as_is"
    """``nhwc``: the stored images have channels last and are turned to channels first."""
    size: tuple[int, int] | None = None
    """Height and width that image files are resized to (arrays are never resized)."""
    augment: Augmentation = Augmentation.NONE

    @model_validator(mode="after")
    def _std_is_usable(self) -> "Transform":
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive in every channel, got {self.std}")
        if self.scale == 0:
            raise ValueError("scale is 0, which would erase the data; leave it out for 1.0")
        return self


class DataSpec(Value):
    """How an uploaded file is read as batches."""

    task: Task = Task.CLASSIFICATION
    format: Literal["auto", "npz", "safetensors", "parquet", "images"] = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: ``{"image": "img", "label": "fine_label"}`` for tables."""
    transform: Transform = Transform()
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows held out when the file has no validation split. None: half of the test split is used
    for validation, and a fifth of the training rows only where there is no test split either. A trained network has
    usually seen its training rows, and what compression costs does not show on those."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share held out for verification when the file has no test split; 0 takes half of validation."""
    seed: int = 0
    pck_threshold: Annotated[float, Field(gt=0, le=10)] | None = None
    """Keypoints: how far from its place a joint still counts as found, in units of its row's ``length`` (None: 0.5,
    which is PCKh@0.5 when the lengths are head sizes), or without lengths of the image's longer side (None: 0.05)."""
    mirror: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] | None = None
    """Keypoints: pairs of joints that change places in a mirrored image, left and right, by number from 0; ``[]`` where
    none do. ``crop_flip`` needs it."""

    @model_validator(mode="after")
    def _options_are_of_the_task(self) -> "DataSpec":
        if self.task is not Task.KEYPOINTS:
            given = [name for name in ("pck_threshold", "mirror") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} is for the task keypoints, but the task is {self.task.value}")
            return self
        if self.mirror is None and self.transform.augment is Augmentation.CROP_FLIP:
            raise ValueError(
                "augment crop_flip mirrors images, which swaps left and right joints: give their numbers with mirror, "
                "such as [[0, 1]] (or [] when none swap), or use augment crop"
            )
        joints = [joint for pair in self.mirror or () for joint in pair]
        if len({*joints}) < len(joints):
            raise ValueError(f"mirror names a joint twice, got {self.mirror}: each joint swaps with one other")
        return self


class Budget(Value):
    """What may be lost. Exactly one of ``max_drop`` and ``min_value``."""

    metric: Metric | None = None
    """None: the task's first metric."""
    max_drop: Annotated[float, Field(ge=0)] | None = None
    """In the metric's units (0.005 = half a point of accuracy); relative for losses."""
    min_value: float | None = None
    """The metric's own value that must be kept (for losses: not exceeded)."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = None
    """None: the point estimate decides. 0.95: the paired interval's worse end must keep the budget."""
    expect: float | None = None
    """The value you know the original to have; a baseline far from it fails early with advice."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "Budget":
        if (self.max_drop is None) == (self.min_value is None):
            raise ValueError("give exactly one of max_drop and min_value")
        return self


Options = dict[str, str | int | float | bool]


class SitePlan(Value):
    """What replaces one site: a method, its ranks (meaning belongs to the method) and options."""

    method: str
    ranks: tuple[Annotated[int, Field(ge=1)], ...]
    options: Options = Field(default_factory=dict)
    """Of ``tt_matrix``: ``{"in_modes": "4x8x8x4", "out_modes": "5x5x5x5"}``, which else follow from the layer's sizes.
    Other methods have none."""
    members: dict[str, tuple[Annotated[int, Field(ge=0)], ...]] = Field(default_factory=dict)
    """Of a site of several layers: each layer's place in the grid, counted from 0; empty: the site is one layer. With a
    method of one layer, the members hold one weight, and will hold one set of factors."""

    @model_validator(mode="after")
    def _places_fill_a_grid(self) -> "SitePlan":
        places = list(self.members.values())
        if places:
            sizes = [max(along) + 1 for along in zip(*places, strict=False)]
            alike = len({len(p) for p in places}) == 1
            if len(places) < 2 or not alike or not len({*places}) == len(places) == math.prod(sizes):
                raise ValueError(
                    "members must have places that fill a grid of two or more, counted from 0, each once; got "
                    f"{self.members}"
                )
        return self


Plan = dict[str, SitePlan]
"""Site name to its replacement; a layer that is in none stays as it is."""
Entry = TypeVar("Entry")
"""Of a plan."""


def entry_of(plan: Plan, layer: str) -> SitePlan | None:
    """What replaces a layer, alone or with others; None: it stays."""
    if layer in plan:
        return plan[layer]
    return next((entry for entry in plan.values() if layer in entry.members), None)


class Layers(Value):
    """Which layers may change; glob patterns on the user's own names, later ones win nothing: exclude beats include."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rank_multiple: Annotated[int, Field(ge=1, le=256)] = 1
    """Ranks are multiples of this, as the device likes them (often 8 or 16); a layer without such ranks is left alone.
    Those of ``fixed`` are taken as they are."""
    fixed: Plan = Field(default_factory=dict)
    """Sites whose replacement is given, not searched."""
    groups: Literal["auto"] | dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = "auto"
    """Which layers the joint methods may decompose together. ``auto``: all of one weight shape, placed in a grid by
    the numbers and words in which their names differ. Else a name for each group, and glob patterns of its layers."""


DEFAULT_EPOCHS = 10.0
"""Of the full rung, where neither epochs nor hours are given."""


class FineTune(Value):
    """The training recipe; 0 epochs means none. ``search.pace`` and ``search.recipe`` decide what is ``"auto"``."""

    epochs: Literal["auto"] | Annotated[float, Field(ge=0, le=10_000)] = "auto"
    """Epochs of the full rung (refining). auto: as many as ``search.hours`` leave time for, without them 10."""
    short_epochs: Literal["auto"] | Annotated[float, Field(ge=0, le=1_000)] = "auto"
    """Epochs of a promoted trial. auto: 1, or what ``search.hours`` leave time for."""
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = 128
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=10)] = "auto"
    """The schedule's peak. auto: by the optimizer, and higher for a longer training."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """auto: ``adamw`` for networks with attention, recurrence or embeddings, ``sgd`` (Nesterov) for others."""
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    temperature: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Of the original's soft outputs. auto: from 1 to 4, the higher the surer the original is of its answers."""
    distill: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the original's soft outputs; the rest is the labels' loss."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the averaged weights per step; 0 averages nothing."""
    sequential: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a rung's epochs that are spent block by block, towards the original's values inside (Su et al. 2018),
    before those end to end; 1: all."""
    sequential_learning_rate: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """Of Adam, block by block; the paper's long trainings take 1e-3, tens of steps a block 1e-2."""
    heatmap_sigma: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Keypoints: standard deviation of the Gaussians that labels are drawn as, in the heatmap's pixels."""

    @property
    def trains(self) -> bool:
        """Whether candidates are trained at all."""
        return self.epochs != 0


class SearchSpec(Value):
    trials: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Candidates tried over all stages (a promotion is the same candidate taken further)."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock time for the search and, where ``fine_tune.epochs`` is ``"auto"``, for refining.

    With a fixed number of epochs, the search leaves time for one such training. What has begun is never cut off."""
    hours_before: Annotated[float, Field(ge=0)] = 0.0
    """Of ``hours``, those that were used when the job was extended: shares are taken of the rest."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 2
    sampler: Sampler = Sampler.TPE
    space: Space = Space.GUIDED
    stages: Annotated[int, Field(ge=1, le=8)] = 1
    """MUSCO-style iterations: each starts from the best fine-tuned network of the one before."""
    checks: Annotated[int, Field(ge=1, le=100)] = 3
    """Refined candidates that may fail the final check before the job gives up; extending a job adds to it."""
    seed: int = 0
    calibration_samples: Annotated[int, Field(ge=8)] = 1024


class JobSpec(Value):
    """Everything that decides a job's result, besides the model and the data."""

    budget: Budget
    minimize: tuple[Cost, ...] = (Cost.PARAMETERS,)
    methods: Literal["auto"] | tuple[str, ...] = "auto"
    layers: Layers = Layers()
    fine_tune: FineTune = FineTune()
    search: SearchSpec = SearchSpec()
    export: tuple[ExportFormat, ...] = tuple(ExportFormat)
    storage: tuple[Storage, ...] = ()
    """Also write ``.pt2`` and ``.onnx`` with weights rounded to these, each measured on the verify split by itself."""

    @model_validator(mode="after")
    def _something_to_do(self) -> "JobSpec":
        for name, given, known in (("minimize", self.minimize, Cost), ("export", self.export, ExportFormat)):
            if not given:
                raise ValueError(f"{name} is empty: name at least one of {[c.value for c in known]}")
            if len({*given}) < len(given):
                raise ValueError(f"{name} names {[c.value for c in given]}: name each once")
        if len({*self.storage}) < len(self.storage):
            raise ValueError(f"storage names {[s.value for s in self.storage]}: name each once")
        if self.storage and not {ExportFormat.PT2, ExportFormat.ONNX} & {*self.export}:
            raise ValueError(
                f"storage is of .pt2 and .onnx files: add pt2 or onnx to export {[f.value for f in self.export]}"
            )
        return self


# ------------------------------------------------------------------------------------------------ what inspection finds


class TensorInfo(Value):
    name: str
    dtype: str
    shape: tuple[int | None, ...]
    """None where the size may vary (the batch)."""


class LayerInfo(Value):
    name: str
    kind: str
    """Class of the lifted module: ``Conv2d``, ``Linear``, …"""
    weight: tuple[int, ...]
    """Shape of the weight."""
    output: tuple[int, ...]
    """Shape of one sample's output."""
    parameters: int
    macs: int
    """Of one sample."""
    compressible: bool
    reason: str = ""
    """Why not, when it is not."""
    options: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
    """stride, padding, dilation, groups where there are any; of an Embedding, how many look-ups a sample makes."""


class ModelInfo(Value):
    format: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: tuple[LayerInfo, ...]
    parameters: int
    macs: int
    bytes: int
    skipped: tuple[str, ...] = ()
    """What runs but cannot be compressed, and why, one sentence each."""
    batch: Literal["any"] | int = "any"


class SplitSizes(Value):
    train: int
    select: int
    verify: int


class DataInfo(Value):
    format: str
    task: Task
    inputs: tuple[TensorInfo, ...]
    target: TensorInfo | None
    classes: int | None
    splits: SplitSizes
    """What the search will use: train to learn, select to choose, verify to check at the end."""
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ what is measured


BEYOND_CHANCE = 2.0
"""Standard errors of a quotient of two latencies that chance explains: so far from 1, one is slower than the other."""


class Costs(Value):
    parameters: int
    macs: int
    bytes: int
    latency_ms: float | None = None
    dense_latency_ms: float | None = None
    """The original's, measured interleaved with ``latency_ms``."""
    latency_noise: float = 0.0
    """Standard error of ``latency_ms / dense_latency_ms``, as a share of it."""

    def of(self, cost: Cost) -> float:
        """The figure for one objective; latency falls back to nan when it was not measured."""
        if cost is Cost.LATENCY:
            return float("nan") if self.latency_ms is None else self.latency_ms
        return float(getattr(self, cost.value))


class CurvePoint(Value):
    ranks: tuple[int, ...]
    parameters: int
    macs: int
    error: float
    """Relative output error E||y - y^||^2 / E||y - E y||^2 on the calibration set; of a group, its members' mean."""
    errors: tuple[float, ...] = ()
    """Of a group: each member's."""
    rise: float | None = None
    """Of a group: predicted rise of the loss, the sum of what its members' own errors bring."""


class SiteChoice(Value):
    """One site's error-versus-cost curves."""

    site: str
    members: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Of a group: its layers, in the order of ``CurvePoint.errors``, and their places in the grid."""
    dense_parameters: int
    dense_macs: int
    curves: dict[str, tuple[CurvePoint, ...]]
    """Method to its points, cheapest first. None costs more than the dense layer and, of those that the method offers,
    none is dominated; the points of a plan that is fixed, that the stage starts from, and of the analytic ranks that a
    search starts at are there in any case."""
    options: dict[str, Options] = Field(default_factory=dict)
    """Method to the options that its curve was measured with, where it has any."""
    evbmf: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Method to the ranks that analytic variational Bayes chooses."""
    sensitivity: float = 1.0
    """Predicted rise of the loss per unit of relative output error of this site (measured, >= 0)."""
    rises: tuple[tuple[float, float], ...] = ()
    """Measured ``(relative output error, rise of the loss)``, both positive, by rising error; empty: only the
    sensitivity is known, and the loss is taken as proportional to the error."""

    def entry(self, method: str, point: CurvePoint) -> SitePlan:
        """What a plan says that takes this point."""
        return SitePlan(method=method, ranks=point.ranks, options=self.options.get(method, {}), members=self.members)


class Profile(Value):
    stage: int
    metric: Metric
    value: float
    """The metric of this stage's starting network on the select split."""
    verify_value: float
    """The original's metric on the verify split (stage 0)."""
    max_drop: float
    """The budget as a drop on the select split (``min_value`` already turned into one)."""
    costs: Costs
    """Of the *original* network, whatever the stage."""
    sites: tuple[SiteChoice, ...]
    """Of the layers, one by one; together they are all that may change."""
    groups: tuple[SiteChoice, ...] = ()
    """Of layers together, each of which is one of ``sites`` too: an alternative to its members' own choices."""
    seconds: float
    notes: tuple[str, ...] = ()
    epoch_seconds: float = 0.0
    """Of training a network of the original's size, from a few timed steps; 0 where nothing trains."""


class Rung(StrEnum):
    CHEAP = "cheap"
    """Decompose, reconstruct, recalibrate, evaluate: no gradient."""
    SHORT = "short"
    """The same, then a short fine-tuning."""
    FULL = "full"
    """The whole recipe, checked on the verify split."""


LEARNING_RATE_SCALE = "learning_rate_scale"
"""A trial's own factor on the recipe's learning rate, among its parameters: the sampler sets it, training reads it."""


class TrialState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Interval(Value):
    low: float
    high: float


class EpochRecord(Value):
    epoch: float
    loss: float
    value: float | None
    """The metric on the select split, when it was evaluated at this epoch."""
    learning_rate: float


class Outcome(StrEnum):
    """How a run ended; the text is the advice shown to people."""

    OK = "ok"
    DIVERGED = "fine-tuning diverged: the best weights before it were kept; lower learning_rate"
    NON_FINITE = "the compressed network gave non-finite outputs: its ranks are too low for this data"
    OUT_OF_MEMORY = "ran out of memory: lower batch_size or calibration_samples, or give the worker more"
    LOST_REFERENCE = "the starting network of this stage is gone: extend the job, or start another, to run it again"


class TrialResult(Value):
    """What one rung of one trial measured."""

    rung: Rung
    outcome: Outcome = Outcome.OK
    value: float | None
    """The metric on the select split; None when the outcome is not usable."""
    drop: float | None
    loss: float | None = None
    costs: Costs
    seconds: float
    epochs: float = 0.0
    epoch_seconds: float = 0.0
    """That an epoch of training took, without what comes before and after; 0 where there was none."""
    curve: tuple[EpochRecord, ...] = ()
    verify_value: float | None = None
    verify_drop: float | None = None
    verify_interval: Interval | None = None
    """95 % paired interval of ``verify_drop``."""
    keeps_budget: bool | None = None
    """Decided on the verify split; only the full rung says."""
    notes: tuple[str, ...] = ()
    left_dense: Plan = Field(default_factory=dict)
    """What was asked of the sites that stay dense, where latency is minimised: it measured slower there."""

    def built(self, asked: Mapping[str, Entry]) -> dict[str, Entry]:
        """What there is of the plan that was asked, as values or as JSON."""
        return {site: entry for site, entry in asked.items() if site not in self.left_dense}


class TrialRecord(Value):
    """A candidate and all that is known of it: the history that the search reads."""

    number: int
    stage: int
    parent: int | None
    """The trial whose fine-tuned network this stage starts from; None: the original."""
    params: dict[str, str | int | float | bool]
    """The sampler's own parameters."""
    plan: Plan
    """What there is, once it is built."""
    state: TrialState
    rung: Rung
    """The rung it is at (running) or reached (done)."""
    results: dict[Rung, TrialResult] = Field(default_factory=dict)

    @property
    def asked(self) -> Plan:
        """The plan that was proposed, with the sites that were then left dense."""
        return self.plan | {site: e for result in self.results.values() for site, e in result.left_dense.items()}


# ------------------------------------------------------------------------------------------------ what to do next


class ProfileWork(Value):
    kind: Literal["profile"] = "profile"
    stage: int
    parent: int | None


class TrialWork(Value):
    """A new candidate (``rung`` cheap), or an old one taken to the next rung (same number)."""

    kind: Literal["trial"] = "trial"
    number: int
    stage: int
    parent: int | None
    params: dict[str, str | int | float | bool]
    plan: Plan
    rung: Rung
    epochs: Annotated[float, Field(ge=0)] = 0.0
    """To train for at this rung."""


class RefineWork(Value):
    kind: Literal["refine"] = "refine"
    number: int
    epochs: Annotated[float, Field(ge=0)]


class ExportWork(Value):
    kind: Literal["export"] = "export"
    number: int


class Finished(Value):
    kind: Literal["finished"] = "finished"
    ok: bool
    code: str
    """Stable: ``kept_budget``, ``nothing_smaller``, ``no_compressible_layer``, …"""
    reason: str
    """A sentence that says what happened and what to do."""
    best: int | None = None


AskedWork = Annotated[
    ProfileWork | TrialWork | RefineWork | ExportWork | Finished,
    Field(discriminator="kind"),
]
