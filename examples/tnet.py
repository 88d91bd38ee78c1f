"""Train a small T-Net from scratch on drawn figures, and draw what it finds.

    python -m examples.tnet --ratio 4 --out tnet.png

All 24 3×3 kernels of a stacked hourglass are slices of one low-rank tensor (Kossaifi et al. 2019); ``--form dense``
trains the same network with kernels of its own beside it. About two minutes on one thread.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.figures import JOINTS, LIMBS, Figures, Floats, hits, render
from benchmarks.tnet.hourglass import StackedHourglass, compact
from benchmarks.tnet.kernels import Dense, Factored, JointMPS, JointTucker, LayerwiseTucker, Shape
from benchmarks.tnet.training import find, steps_of, train

FORMS: dict[str, type[Factored]] = {
    "tucker": JointTucker,
    "mps": JointMPS,
    "layerwise": LayerwiseTucker,
    "dense": Dense,
}

SHAPE: Shape = (2, 2, 3, 2, 32, 32, 3, 3)
"""2 stacks of depth 2, 3 pathways, 2 convolutions a block, 32 features, 3×3."""

ENLARGED = 4
"""How many times larger than the images the picture is."""

FOUND, MISSED, BONE = (80, 255, 80), (255, 60, 60), (255, 255, 255)

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=sorted(FORMS), default="tucker")
    parser.add_argument("--ratio", type=float, default=4.0, help="parameters of dense kernels ÷ those of the form")
    parser.add_argument("--figures", type=int, default=3000, help="to train on")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tnet.png"), help="the picture of joints found")
    arguments = parser.parse_args()
    console.print(f"[bold]1[/] drawing {arguments.figures:,} figures, and 500 others to test on")
    figures, test = render(arguments.figures, seed=arguments.seed), render(500, seed=arguments.seed + 1)
    torch.manual_seed(arguments.seed)
    ratio = 1.0 if arguments.form == "dense" else arguments.ratio
    network = StackedHourglass(FORMS[arguments.form].at(SHAPE, ratio), len(JOINTS))
    kernels = sum(p.numel() for p in network.kernels.parameters())
    dense = Dense.parameters_of(SHAPE)
    console.print(
        f"[bold]2[/] training: {kernels:,} parameters stand for {dense:,} of 24 kernels ({dense / kernels:.2f}×)"
    )
    began = time.monotonic()
    fit(network, figures, arguments.epochs, arguments.seed)
    seconds = time.monotonic() - began
    small = compact(network)
    joints = find(small, test)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(test, joints).save(arguments.out)
    console.print(f"[bold]3[/] {arguments.out}: joints found [green]green[/], joints missed by half a head [red]red[/]")
    within = hits(joints, test)
    hardest = sorted(zip(within.mean(0), JOINTS, strict=True))[:3]
    console.print(
        f"tnet: {100 * within.mean():.1f} % of the joints of {len(test.heads)} new figures (PCKh@0.5) "
        f"after {seconds:.0f} s; hardest: "
        + ", ".join(f"{name.replace('_', ' ')} {100 * share:.0f} %" for share, name in hardest),
        soft_wrap=True,
    )


def fit(network: StackedHourglass, figures: Figures, epochs: float, seed: int) -> None:
    """Trains, with a bar that tells the loss of the last 50 steps."""
    losses: list[float] = []
    with Progress(
        TextColumn("   steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=steps_of(len(figures.images), epochs), loss=float("nan"))

        def step(loss: float) -> None:
            losses.append(loss)
            progress.update(task, advance=1, loss=float(np.mean(losses[-50:])))

        train(network, figures, epochs=epochs, seed=seed, step=step)


def picture(figures: Figures, joints: Floats, *, rows: int = 3, columns: int = 6) -> Image.Image:
    """The first figures with the bones that were found drawn over them."""
    side = figures.images.shape[1] * ENLARGED
    sheet = Image.new("RGB", (columns * side, rows * side))
    within = hits(joints, figures)
    for number in range(min(rows * columns, len(joints))):
        tile = Image.fromarray(figures.images[number]).resize((side, side), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        points = (ENLARGED * (joints[number] + 0.5)).tolist()
        for a, b in LIMBS:
            draw.line((*points[a], *points[b]), fill=BONE, width=2)
        for (x, y), right in zip(points, within[number], strict=True):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=FOUND if right else MISSED, outline=(0, 0, 0))
        sheet.paste(tile, (number % columns * side, number // columns * side))
    return sheet


if __name__ == "__main__":
    main()
