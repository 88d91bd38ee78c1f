"""Small networks of every family that the lift must carry over exactly."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.intake.architectures import resnet_cifar


class VGGLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(16 * 4, 32), nn.ReLU(True), nn.Dropout(0.3), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels, momentum=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class MobileLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(InvertedResidual(8, 3), InvertedResidual(8, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


class SmallViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x)))[:, 0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Decoder(nn.Module):
    """Its two attentions have sequences first; the last has keys and values of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.pool = nn.MultiheadAttention(16, 2, kdim=6, vdim=10)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        x, memory = self.embed(tokens).transpose(0, 1), images.transpose(0, 1)
        x = self.decoder(x, memory, tgt_is_causal=False)
        return self.head(self.pool(x, memory[..., :6], memory[..., 6:])[0][0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down2 = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
            nn.LeakyReLU(),
        )
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.plain = nn.InstanceNorm2d(8)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        return self.out(torch.cat([a, F.elu(self.plain(self.up(self.down2(a))))], 1))


class LSTMNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.fc(y[:, -1])


class GRUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.rnn = nn.RNN(8, 8, batch_first=True, nonlinearity="relu")
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(x)
        y, _ = self.rnn(y)
        return self.fc(y.mean(1)), h.transpose(0, 1)


class TiedLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.mix = nn.Linear(12, 12)
        self.out = nn.Linear(12, 30, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(torch.tanh(self.mix(self.embed(tokens))))}


class Twice(nn.Module):
    """The same layer called twice, a matmul with a parameter, a layer inside no_grad, a parametrised layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 4) * 0.3)
        self.frozen = nn.Linear(6, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.shared(x)))
        with torch.no_grad():
            z = self.frozen(x)
        return self.normed(x @ self.weight + z)


class Conv1And3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, stride=2, dilation=2, groups=2)
        self.three = nn.Conv3d(1, 3, 2)
        self.bn = nn.BatchNorm3d(3)
        self.drop = nn.Dropout3d(0.2)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.one(x).flatten(1).sum(1, keepdim=True) + self.drop(self.bn(self.three(v))).flatten(1)


def _image(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 8, 8),)


def _tokens(high: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, high, (n, 7)),)


def _series(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 5, 6),)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "resnet20": (lambda: resnet_cifar(20), lambda n: (torch.randn(n, 3, 16, 16),)),
    "vgg": (VGGLike, _image),
    "mobile": (MobileLike, _image),
    "vit": (SmallViT, _image),
    "encoder": (Encoder, _tokens(20)),
    "decoder": (Decoder, lambda n: (torch.randint(0, 20, (n, 7)), torch.randn(n, 5, 16))),
    "unet": (UNet, _image),
    "lstm": (LSTMNet, _series),
    "gru": (GRUNet, _series),
    "tied": (TiedLM, _tokens(30)),
    "twice": (Twice, lambda n: (torch.randn(n, 6),)),
    "conv1and3": (Conv1And3, lambda n: (torch.randn(n, 2, 9), torch.randn(n, 1, 4, 4, 4))),
}
"""Name to a maker and to inputs of n samples."""


def settle(model: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]]) -> nn.Module:
    """Batch norms with statistics that are not the initial ones, then eval."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(*inputs(4))
    return model.eval()
