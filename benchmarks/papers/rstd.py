"""RsTD (Li et al. 2018): kernels in random low-rank subspaces, and where their own low rank comes from.

Table 2 trains a small CNN from scratch with its convolutions in low-rank form, at many ratios and seeds: a tensor train
of the kernel in its own order, the same train shuffled (``shuffled_tt``), and Tucker-2 of the channels. Table 1 trains
the dense CNN on plain, blurred and pixel-shuffled images and tells how much of its kernels lies in few directions.
CIFAR-10 at half its size and a part of its images: what one thread does in minutes.
"""

import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import prepare
from benchmarks.papers.table import Settings, Table
from search.decompose import METHODS
from tenfold.layers import factorized_like
from tenfold.layers.shuffled import Shuffled

TRAIN, TEST = 3000, 2000
EPOCHS = 3.0
BATCH = 100
LEARNING_RATE = 3e-3
RATIOS = (2, 10, 50)
FORMS = ("tensor train", "shuffled tensor train", "tucker2")
WIDTHS = ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1))
"""In and out channels and stride of each convolution; the first stays dense."""
TOP = 0.25
"""The part of the singular values whose energy table 1 gives."""

Split = tuple[Tensor, Tensor]


def run(settings: Settings, done: Callable[[Table], None]) -> None:
    train, test = _data(settings.device)
    spectra(settings, train, test, done)
    accuracies(settings, train, test, done)


def accuracies(settings: Settings, train: Split, test: Split, done: Callable[[Table], None]) -> None:
    """Claims (a) and (b): accuracy by ratio, its spread over seeds, and how far the ratios are apart."""
    columns = ("form", "ratio", "parameters", "accuracy, %", "seeds' deviation, points", "below dense, points")
    table = Table("CIFAR-10 at 16 x 16, trained from scratch in low-rank form", columns, settings=_facts(settings))

    def add(form: str, ratio: int | None) -> float:
        found, size = [], 0
        for seed in settings.seeds:
            network = _network(seed, form, ratio).to(settings.device)
            size = sum(p.numel() for layer in _convolutions(network)[1:] for p in layer.parameters())
            found.append(100 * _trained(network, train, test, seed, settings))
        mean = statistics.fmean(found)
        table.rows.append(
            {
                "form": form,
                "ratio": ratio,
                "parameters": size,
                "accuracy, %": mean,
                "seeds' deviation, points": statistics.stdev(found) if len(found) > 1 else None,
                "below dense, points": table.rows[0]["accuracy, %"] - mean if table.rows else 0.0,
            }
        )
        done(table)
        return mean

    add("dense", None)
    by_form: dict[str, list[float]] = {form: [] for form in FORMS}
    for ratio in RATIOS:
        for form in FORMS:
            by_form[form].append(add(form, ratio))
    falls = {form: max(found) - min(found) for form, found in by_form.items()}
    steadier = "shows" if falls[FORMS[1]] < falls[FORMS[0]] else "does not show"
    table.notes += [
        "Parameters and ratios are those of the four convolutions that change, counted on the modules.",
        *(f"{form}: the best and the worst ratio are {fall:.1f} points apart." for form, fall in falls.items()),
        f"This run {steadier} the claim that accuracy is steadier over the ratios when kernels are shuffled.",
    ]
    done(table)


def spectra(settings: Settings, train: Split, test: Split, done: Callable[[Table], None]) -> None:
    """Claim (c): of kernels trained on images with more and with less spatial similarity."""
    columns = ("images", "of", "unfolding", "effective rank, % of full", f"energy in top {TOP:.0%}, %", "accuracy, %")
    table = Table("Spectra of kernels by training images", columns, settings=_facts(settings))
    kinds = {"plain": train[0], "blurred": _blurred(train[0]), "pixels shuffled": _permuted(train[0])}
    tests = {"plain": test[0], "blurred": _blurred(test[0]), "pixels shuffled": _permuted(test[0])}
    for kind, images in kinds.items():
        kernels, changes, scores = [], [], []
        for seed in settings.seeds:
            network = _network(seed, "dense", None).to(settings.device)
            before = [_weight(layer) for layer in _convolutions(network)[1:]]
            scores.append(100 * _trained(network, (images, train[1]), (tests[kind], test[1]), seed, settings))
            after = [_weight(layer) for layer in _convolutions(network)[1:]]
            kernels += after
            changes += [b - a for a, b in zip(before, after, strict=True)]
        for name, tensors in (("kernel", kernels), ("what training added", changes)):
            for unfolding, matrices in _unfoldings(tensors).items():
                rank, energy = (statistics.fmean(v) for v in zip(*map(_concentration, matrices), strict=True))
                row = (kind, name, unfolding, 100 * rank, 100 * energy, statistics.fmean(scores))
                table.rows.append(dict(zip(columns, row, strict=True)))
        done(table)
    table.notes += [
        "Means over the four later convolutions and the seeds; effective rank is exp of the entropy of the energies "
        "(Roy and Vetterli 2007).",
        *_trends(table),
    ]
    done(table)


def _trends(table: Table) -> list[str]:
    """Whether more similar neighbours gave lower ranks, unfolding by unfolding."""
    notes = []
    for unfolding in ("outputs", "inputs", "taps"):
        ranks = [
            row["effective rank, % of full"]
            for row in table.rows
            if row["of"] == "what training added" and row["unfolding"] == unfolding
        ]
        plain, blurred, shuffled = ranks
        holds = "as claimed" if blurred < plain < shuffled else "not in the order claimed"
        notes.append(
            f"{unfolding}: effective rank of what training added {blurred:.1f} % blurred, {plain:.1f} % plain, "
            f"{shuffled:.1f} % shuffled: {holds}."
        )
    return notes


def _facts(settings: Settings) -> dict[str, object]:
    return {
        "epochs": settings.epochs or EPOCHS,
        "seeds": list(settings.seeds),
        "training images": TRAIN,
        "test images": TEST,
        "batch": BATCH,
        "optimizer": f"Adam, one cycle to {LEARNING_RATE}",
        "device": settings.device,
    }


def _data(device: str) -> tuple[Split, Split]:
    """Images (n, 3, 16, 16) of mean 0 and deviation 1, and labels; the first of both published splits."""
    with np.load(prepare("cifar10"), allow_pickle=False) as arrays:
        raw = {
            k: torch.from_numpy(arrays[k][: TRAIN if "train" in k else TEST]) for k in arrays.files if "val" not in k
        }

    def split(name: str) -> Split:
        x = F.avg_pool2d(raw[f"x_{name}"].permute(0, 3, 1, 2).float(), 2)
        return _standard(x).to(device), raw[f"y_{name}"].to(device)

    return split("train"), split("test")


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def _blurred(x: Tensor) -> Tensor:
    """A binomial filter of 5 x 5, at the same contrast as before."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    kernel = (row[:, None] * row).expand(3, 1, 5, 5)
    return _standard(F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=3))


def _permuted(x: Tensor) -> Tensor:
    """All images' pixels in one fixed random order: neighbours are alike no more."""
    order = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(0)).to(x.device)
    return x.flatten(2)[:, :, order].reshape(x.shape)


def _network(seed: int, form: str, ratio: int | None) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for i, (c_in, c_out, stride) in enumerate(WIDTHS):
        layer: nn.Module = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        if i and ratio is not None:
            layer = _compressed(layer, form, ratio, seed=100 * seed + i)
        blocks += [layer, nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1][1], 10))


def _compressed(layer: nn.Module, form: str, ratio: int, seed: int) -> nn.Module:
    """An untrained layer of the largest equal ranks that keep at most 1 / ratio of the parameters, or of the least."""
    name = "tucker2" if form == "tucker2" else "shuffled_tt"
    method, budget = METHODS[name], sum(p.numel() for p in layer.parameters()) / ratio
    most = [max(ranks) for ranks in zip(*method.ranks(layer), strict=True)]
    every = [tuple(min(rank, m) for m in most) for rank in range(1, max(most) + 1)]
    ranks = max(every, key=lambda r: (size := method.cost(layer, r, 1)[0]) * (1 if size <= budget else -1))
    new = factorized_like(layer, name, ranks)
    if isinstance(new, Shuffled):
        new.reseed(seed)
        if form == "tensor train":
            new.amounts.zero_()  # rotations by nothing: the kernel in its own order
    return new


def _convolutions(network: nn.Sequential) -> list[nn.Module]:
    return list(network)[0 : 3 * len(WIDTHS) : 3]


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().clone()


def _trained(network: nn.Module, train: Split, test: Split, seed: int, settings: Settings) -> float:
    """The accuracy of ``network`` on ``test`` after training."""
    steps = round((settings.epochs or EPOCHS) * (len(train[1]) // BATCH))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    for _, (x, y) in zip(range(steps), _batches(*train, seed), strict=False):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        answers = torch.cat([network(x).argmax(1) for x in test[0].split(500)])
    return float((answers == test[1]).float().mean())


def _batches(x: Tensor, y: Tensor, seed: int) -> Iterator[Split]:
    """Epoch after epoch in new orders, half of the images mirrored."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(y), generator=generator).to(x.device)
        for rows in order.split(BATCH)[: len(y) // BATCH]:
            mirrored = (torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5).to(x.device)
            yield torch.where(mirrored, x[rows].flip(3), x[rows]), y[rows]


def _unfoldings(kernels: list[Tensor]) -> dict[str, list[Tensor]]:
    return {
        "outputs": [k.flatten(1) for k in kernels],
        "inputs": [k.transpose(0, 1).flatten(1) for k in kernels],
        "taps": [k.flatten(2).flatten(0, 1).T for k in kernels],
    }


def _concentration(matrix: Tensor) -> tuple[float, float]:
    """Effective rank as a part of the full one, and the part of the energy in the top quarter of singular values."""
    energies = torch.linalg.svdvals(matrix.double().cpu()).square()
    energies = energies / energies.sum()
    rank = float(torch.special.entr(energies).sum().exp()) / len(energies)
    return rank, float(energies[: max(1, round(TOP * len(energies)))].sum())
