"""Covey's own models once more, for PyTorch: what `models/architectures` is for Keras, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as f


class Watch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.smooth, self.movements, self.exercise = nn.AvgPool1d(4), nn.Conv1d(6, 48, 5), nn.Linear(48, 7)

    def forward(self, x: Any) -> Any:
        return self.exercise(f.relu(self.movements(self.smooth(x.transpose(1, 2)))).amax(2))


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strokes, self.shapes = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.digit = nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = f.max_pool2d(f.relu(self.strokes(x)), 2)
        return self.digit(f.max_pool2d(f.relu(self.shapes(x)), 2).flatten(1))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sounds = nn.Conv2d(1, 32, (10, 4), 2, bias=False)
        deep = [nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False) for _ in range(3)]
        mix = [nn.Conv2d(32, 32, 1, bias=False) for _ in range(3)]
        self.deep, self.mix = nn.ModuleList(deep), nn.ModuleList(mix)
        self.even = nn.ModuleList(nn.GroupNorm(4, 32) for _ in range(4))
        self.word = nn.Linear(32, 12)

    def forward(self, x: Any) -> Any:
        x = f.pad(x.unsqueeze(1).contiguous(memory_format=torch.channels_last), (1, 1, 4, 5))
        x = f.relu(self.even[0](self.sounds(x)))
        for deep, mix, even in zip(self.deep, self.mix, self.even[1:], strict=True):
            x = f.relu(even(mix(deep(x))))
        return self.word(x.mean((2, 3)))


def _unit(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, cap: bool = True) -> Any:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6() if cap else nn.Identity())


class _Inverted(nn.Module):
    """An inverted residual block (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        first = [_unit(inputs, inner, 1)] if expansion > 1 else []
        last = [_unit(inner, inner, 3, stride, inner), _unit(inner, outputs, 1, cap=False)]
        self.body, self.residual = nn.Sequential(*first, *last), stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        return x + self.body(x) if self.residual else self.body(x)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks: list[Any] = [_unit(3, 16, 3, 2)]
        width = 16
        for expansion, outputs, count, stride in (
            *((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 3, 2), (6, 24, 4, 2)),
            *((6, 32, 3, 1), (6, 56, 3, 2), (6, 112, 1, 1)),
        ):
            for index in range(count):
                blocks.append(_Inverted(width, outputs, stride if index == 0 else 1, expansion))
                width = outputs
        self.backbone = nn.Sequential(*blocks, _unit(width, 1280, 1)).requires_grad_(False)
        self.head = nn.Linear(1280, 4)

    def forward(self, x: Any) -> Any:
        self.backbone.eval()
        with torch.no_grad():
            features = self.backbone(x).mean((2, 3))
        return self.head(f.layer_norm(features, features.shape[1:]))


class Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.next = nn.GRU(3, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        return self.next(self.memory(x)[0][:, -1])


class Gestures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv1d(3, 16, 8, 4), nn.MultiheadAttention(16, 2, batch_first=True)
        self.even = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.wide, self.narrow, self.gesture = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        x = self.patches(f.pad(x.transpose(1, 2), (2, 2))).transpose(1, 2)
        y = self.even[0](x)
        x = x + f.dropout(self.attention(y, y, y, need_weights=False)[0], 0.1)
        x = x + self.narrow(f.gelu(self.wide(self.even[1](x))))
        return self.gesture(self.even[2](x).mean(1))


def anomaly() -> Any:
    """An autoencoder of four dense layers."""
    return nn.Sequential(
        *(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 16), nn.Tanh()),
        nn.Linear(16, 8),
    )


MODELS: dict[str, Callable[[], Any]] = {
    "watch": Watch,
    "digits": Digits,
    "keywords": Keywords,
    "pictures": Pictures,
    "anomaly": anomaly,
    "forecast": Forecast,
    "gestures": Gestures,
}
