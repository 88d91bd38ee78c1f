"""Does this data fit this network?"""

from search.data.split import Data
from search.errors import BadData
from search.spec import IGNORED_CLASS, ModelInfo, Task, TensorInfo

__all__ = ["check_fit", "fitted"]

Shape = tuple[int | None, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_fit(data: Data, model: ModelInfo) -> None:
    """Raise BadData unless the network can take the data's batches and its output can be held against the targets."""
    for wanted, given in _paired(data, model):
        _check_input(wanted, given)
    _check_target(data, model)


def fitted(data: Data, model: ModelInfo) -> Data:
    """``data`` with its inputs in the order in which the network takes them. Raises BadData as ``check_fit`` does."""
    check_fit(data, model)
    return data.reordered(tuple(given.name for _, given in _paired(data, model)))


def _paired(data: Data, model: ModelInfo) -> list[tuple[TensorInfo, TensorInfo]]:
    """The network's inputs with the data's: one with one, several by name."""
    wanted, given = model.inputs, data.info.inputs
    if len(wanted) == len(given) == 1:
        return [(wanted[0], given[0])]
    by_name = {info.name: info for info in given}
    names = [info.name for info in wanted]
    if len(wanted) != len(given) or set(names) != set(by_name):
        raise BadData(
            "wrong_inputs",
            f"the network takes {names} and the data has {sorted(by_name)}; "
            "name the arrays inputs.<name>_train and so on, one for each input.",
        )
    return [(info, by_name[info.name]) for info in wanted]


def _check_input(wanted: TensorInfo, given: TensorInfo) -> None:
    shape, sample = wanted.shape[1:], given.shape[1:]
    if len(shape) != len(sample) or not _agree(shape, sample):
        raise BadData(
            "wrong_shape",
            f"one sample of {given.name} is {_text(sample)} after the transform, but the network's input "
            f"{wanted.name} takes {_text(shape)}; {_shape_advice(shape, sample)}.",
        )
    kind = wanted.dtype.removeprefix("torch.")
    if kind != given.dtype and not (kind in FLOATS and given.dtype in FLOATS):
        advice = "declare transform.scale, or store the data as float32 or uint8" if kind in FLOATS else "store it so"
        raise BadData(
            "wrong_dtype",
            f"{given.name} gives {given.dtype} but the network's input {wanted.name} takes {kind}; {advice}.",
        )


def _shape_advice(shape: Shape, sample: Shape) -> str:
    if len(shape) == 3 and len(sample) == 3 and shape[0] == sample[2] and shape[0] != sample[0]:
        return "set layout to nhwc: the stored images have channels last"
    if len(shape) == 3 and len(sample) == 3 and sample[0] in (1, 3) and shape[0] in (1, 3) and shape[0] != sample[0]:
        return f"the network wants {shape[0]} channels: convert the images before uploading"
    if len(shape) == 3 and len(sample) == 2:
        return "add the channel dimension, or set layout to nhwc for grey images without one"
    if len(shape) == 3 and len(sample) == 3:
        return "resize the images (transform.size for image files) or export the network for this size"
    return "reshape the arrays, or upload the network that goes with them"


def _text(shape: Shape) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _check_target(data: Data, model: ModelInfo) -> None:
    output = model.outputs[-1 if data.task is Task.KEYPOINTS else 0].shape
    match data.task:
        case Task.CLASSIFICATION:
            _check_labels(data, output)
        case Task.SEGMENTATION:
            _check_class_maps(data, output)
        case Task.KEYPOINTS:
            _check_heatmaps(data, output)
        case Task.REGRESSION if data.info.target is not None:
            target = data.info.target.shape
            if len(target) != len(output) or not _agree(output[1:], target[1:]):
                raise BadData(
                    "wrong_target",
                    f"y has shape {_text(target)} but the network gives {_text(output)}; store y in the output's "
                    "shape.",
                )


def _check_labels(data: Data, output: Shape) -> None:
    classes = output[-1] if len(output) == 2 else None
    if classes is None:
        advice = "segmentation" if len(output) == 4 else "regression or fidelity"
        raise BadData(
            "wrong_target",
            f"classification needs logits (batch, classes), but the network's first output is {_text(output)}; "
            f"set task to {advice}.",
        )
    _check_classes(data, classes)


def _check_class_maps(data: Data, output: Shape) -> None:
    classes = output[1] if len(output) == 4 else None
    if classes is None or not 2 <= classes <= IGNORED_CLASS:
        raise BadData(
            "wrong_target",
            f"segmentation needs logits (batch, classes, height, width) of 2 to {IGNORED_CLASS} classes, but the "
            f"network's first output is {_text(output)}; export it with such an output first (two classes have two "
            "logits), or set task to regression or fidelity.",
        )
    _check_classes(data, classes)
    if data.info.target is not None and not _agree(output[2:], data.info.target.shape[1:]):
        raise BadData(
            "wrong_target",
            f"y has maps of {_text(data.info.target.shape[1:])} but the network's are {_text(output[2:])}; resize the "
            "maps to these (nearest neighbour), or upsample in the network.",
        )


def _check_heatmaps(data: Data, output: Shape) -> None:
    joints = data.info.target.shape[1] if data.info.target is not None else None
    if len(output) != 4 or not _agree(output[1:2], (joints,)):
        raise BadData(
            "wrong_target",
            f"y has {joints} joints, which needs heatmaps (batch, {joints}, height, width), but the network's last "
            f"output is {_text(output)}; check that data and network belong together (the last output counts).",
        )


def _check_classes(data: Data, classes: int) -> None:
    if data.info.classes is not None and data.info.classes > classes:
        ignored = f", and {IGNORED_CLASS} marks pixels that do not count" if data.task is Task.SEGMENTATION else ""
        raise BadData(
            "labels_out_of_range",
            f"the labels go up to {data.info.classes - 1} but the network has {classes} outputs (0 to "
            f"{classes - 1}); check that labels count from 0{ignored} and that data and network belong together.",
        )


def _agree(wanted: Shape, given: Shape) -> bool:
    return all(w is None or w == g for w, g in zip(wanted, given, strict=True))
