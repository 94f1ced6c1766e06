"""Images of two classes, which differ by the direction of a bright bar in noise."""

import torch


def bars(n):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = -1 + 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    images[labels == 0, :, 3:5] += 1.5
    images[labels == 1, :, :, 3:5] += 1.5
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), labels
