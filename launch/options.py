"""The options of ``tenfold-server run``, and the job that they ask for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.spec import Augmentation, Cost, Metric, Storage, Task
from tenfold import command_line

__all__ = ["add_arguments", "positive", "submission"]

EXIT_CODES = "exit status: 0 done, 1 the job failed, 2 misuse, 3 the model or the data was refused, 130 interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXIT_CODES
    parser.add_argument("model", type=Path, help="a .pt2 file (tenfold.export makes one), or weights alone")
    parser.add_argument("data", type=Path, help=".npz, .safetensors, .parquet, or a zip or tar of image folders")
    parser.add_argument(
        "--architecture",
        type=architecture,
        help='of weights alone: resnet20_cifar10, …, or JSON: {"name": …, "options": {…}}',
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--max-drop", type=_number(least=0), help="what may be lost, in the metric's units: 0.01 = one point"
    )
    what.add_argument("--min-value", type=_number(), help="instead: the value that must be kept")
    parser.add_argument("--metric", choices=[m.value for m in Metric], help="default: the task's first")
    parser.add_argument("--minimize", action="append", choices=[c.value for c in Cost], help="repeatable (parameters)")
    parser.add_argument("--trials", type=positive, help="candidates to try (default 30)")
    parser.add_argument(
        "--epochs",
        type=_number(least=0),
        help="epochs of the final fine-tuning (default: what --hours leave time for, else 10); 0 trains nothing",
    )
    parser.add_argument("--hours", type=_number(above=0), help="wall-clock time for search and fine-tuning")
    parser.add_argument(
        "--storage", action="append", choices=[s.value for s in Storage], help="also files with weights in fewer bits"
    )
    parser.add_argument(
        "--spec",
        type=_spec,
        default={},
        help="file of JSON with fields of the job's spec, such as methods, layers and fine_tune; options win over it",
    )
    parser.add_argument("--task", choices=[t.value for t in Task], default=Task.CLASSIFICATION.value)
    parser.add_argument("--scale", type=_number(), help="multiplies the stored values, such as 0.00392156862745098")
    parser.add_argument("--mean", type=_numbers, help="of each channel, after scaling: 0.49,0.48,0.45")
    parser.add_argument("--std", type=_numbers, help="of each channel, after scaling")
    parser.add_argument("--layout", choices=("as_is", "nhwc"), help="nhwc: images with channels last")
    parser.add_argument("--augment", choices=[a.value for a in Augmentation], help="of the training images")
    parser.add_argument(
        "--pck-threshold", type=_number(above=0), help="keypoints: a joint is found within so much of the length"
    )
    parser.add_argument(
        "--mirror", type=_pairs, help="keypoints: joints that swap in a mirrored image: 2-5,3-6 or none"
    )
    parser.add_argument(
        "--heatmap-sigma", type=_number(above=0), help="keypoints: of the original's heatmaps (default 1 pixel)"
    )
    parser.add_argument(
        "--workers", type=positive, help="trials at once, whatever --spec says (default: one for two cores, at most 4)"
    )
    parser.add_argument("--data-dir", type=Path, help="keep the service's data here (default: a scratch folder)")
    parser.add_argument("--out", "-o", type=Path, required=True, help="folder for the result")
    parser.add_argument("--json", action="store_true", help="the finished job as JSON on standard output")


def submission(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The command line as arguments of ``Client.submit``; what was not given is left to the service's defaults.

    Raises ValueError when no budget is given.
    """
    fields = command_line.job_fields(
        options.spec,
        budget={"max_drop": options.max_drop, "min_value": options.min_value, "metric": options.metric},
        minimize=options.minimize,
        storage=options.storage,
        search={"trials": options.trials, "hours": options.hours, "parallel": workers},
        fine_tune={"epochs": options.epochs, "heatmap_sigma": options.heatmap_sigma},
    )
    transform = _given(
        scale=options.scale, mean=options.mean, std=options.std, layout=options.layout, augment=options.augment
    )
    data = _given(pck_threshold=options.pck_threshold, mirror=options.mirror)
    return {
        **fields,
        "architecture": options.architecture,
        "data_spec": {"task": options.task, "transform": transform, **data},
    }


def architecture(text: str) -> dict[str, Any]:
    """A name, or JSON with the options of that architecture. Raises ``ValueError``."""
    return command_line.json_object(text) if text.startswith("{") else {"name": text}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}: at least 1")
    return value


def _number(**bounds: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            return command_line.in_range(float(text), **bounds)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return parse


def _spec(text: str) -> dict[str, Any]:
    try:
        return command_line.read_spec(Path(text))
    except (OSError, ValueError) as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _given(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _pairs(text: str) -> list[list[int]]:
    return [] if text == "none" else [[int(joint) for joint in pair.split("-")] for pair in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [_number()(part) for part in text.split(",")]
