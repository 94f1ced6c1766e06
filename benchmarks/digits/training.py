"""The five models of the page, each trained once by a plain loop over ordinals and stored in the work folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.digits.data import Captions, drawn_template, load_captions
from benchmarks.images import Labelled
from ddpm.conditioning import Conditioning
from ddpm.ema import EMA
from ddpm.masks import inpainting_condition, random_mask
from ddpm.models.classifier import NoisyClassifier, class_loss, text_loss
from ddpm.models.unet import UNet, UNetConfig
from ddpm.noise import Purpose, normal, uniform
from ddpm.objectives import Objective
from ddpm.prediction import NetworkDenoiser
from ddpm.schedule import make_schedule
from ddpm.timesteps import StratifiedTimesteps

SEED = 0
BATCH = 128
LABEL_DROP = 0.1
HALF_LIFE = 8_000
SCHEDULE = make_schedule("cosine")
# The network of the experiment `digits`, with a learned variance, so that one model serves all likelihoods.
SHAPE = UNetConfig(
    in_channels=1,
    out_channels=2,
    channels=(32, 64),
    layers_per_block=2,
    attention=(False, True),
    head_dim=32,
    num_classes=10,
)
OBJECTIVE = Objective(prediction="eps", loss="hybrid")

# (ordinals, indices into the train split, timesteps, noise) -> loss of each sample
Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fit(
    network: nn.Module,
    losses: Losses,
    digits: Labelled,
    images: int,
    *,
    lr: float = 2e-3,
    keep_at: int | None = None,
    say: Callable[[str], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the averaged weights after `images` images, and those after `keep_at` images or None."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, early = EMA(network, HALF_LIFE), None
    timesteps = StratifiedTimesteps().make(SCHEDULE, BATCH, SEED)
    order, epoch = torch.empty(0, dtype=torch.long), 0
    for start in range(0, images, BATCH):
        while len(order) < BATCH:
            generator = torch.Generator().manual_seed(SEED + epoch)
            order, epoch = torch.cat([order, torch.randperm(len(digits.train), generator=generator)]), epoch + 1
        index, order = order[:BATCH], order[BATCH:]
        n = torch.arange(start, start + BATCH)
        t, _ = timesteps.sample(n)
        loss = losses(n, index, t, normal(SEED, n, Purpose.NOISE, (1, 8, 8))).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at {start} images")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (start + 1) / 5_000) * max(1 - start / images, 0.02)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network, start + BATCH, BATCH)
        if keep_at is not None and early is None and start + BATCH >= keep_at:
            early = {name: value.clone() for name, value in ema.state_dict().items()}
        if start // BATCH % 200 == 0:
            say(f"{start:>7,} of {images:,} images, loss {loss.item():.4f}")
    return ema.state_dict(), early


class Zoo:
    """The models of the page; a model that is missing in the work folder is trained when it is first used.

    Args:
        work: folder of the weights, with the number of training images in each file name.
        scale: factor on the number of training images; 1 for the page.
        steps: of samplers, where a table does not compare them.
        draws: of the bootstrap intervals.
    """

    def __init__(
        self,
        digits: Labelled,
        work: Path,
        scale: float,
        say: Callable[[str], None],
        steps: int = 50,
        draws: int = 200,
    ) -> None:
        self.steps, self.draws = steps, draws
        self.digits, self.work, self.scale, self.say = digits, work, scale, say
        self.images = {
            name: max(int(images * scale) // BATCH * BATCH, BATCH)
            for name, images in {
                "classes": 200_000, "classifier": 80_000, "inpainting": 200_000, "text": 200_000, "reader": 80_000,
            }.items()
        }  # fmt: skip

    @property
    def captions(self) -> Captions:
        """The captions of models on text, encoded when the first of these needs them."""
        return load_captions()

    def unet(self, config: UNetConfig, start: dict[str, Tensor] | None = None) -> UNet:
        """Return a new network, with given weights if any."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = UNet(config)
        if start is not None:
            network.load_state_dict(start)
        return network

    def classes(self) -> NetworkDenoiser:
        """Return the class-conditional model."""
        return self._denoiser(SHAPE, self._kept("classes", self._train_classes))

    def weak(self) -> NetworkDenoiser:
        """Return the class-conditional model after an eighth of the training, for autoguidance."""
        self.classes()
        return self._denoiser(SHAPE, load_file(self._path("classes", "-weak")))

    def _train_classes(self) -> dict[str, Tensor]:
        network, digits = self.unet(SHAPE), self.digits

        def losses(n: Tensor, index: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            cond = Conditioning(label=digits.train_labels[index], drop=drop(n))
            return OBJECTIVE.losses(network, SCHEDULE, digits.train[index], t, eps, cond)

        images = self.images["classes"]
        weights, early = fit(network, losses, digits, images, keep_at=images // 8, say=self._about("classes"))
        assert early is not None
        save_file(early, self._path("classes", "-weak"))
        return weights

    def classifier(self) -> NoisyClassifier:
        """Return the classifier of noisy images by class, on the same schedule."""
        return self._reader("classifier", 10, self._class_losses)

    def reader(self) -> NoisyClassifier:
        """Return the classifier of noisy images by text, on the same schedule."""
        return self._reader("reader", self.captions.dim, self._text_losses)

    def _class_losses(self, network: NoisyClassifier) -> Losses:
        digits = self.digits
        return lambda n, index, t, eps: class_loss(
            network, SCHEDULE, digits.train[index], t, eps, digits.train_labels[index]
        )

    def _text_losses(self, network: NoisyClassifier) -> Losses:
        digits, captions = self.digits, self.captions

        def losses(n: Tensor, index: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            pooled = captions.of(digits.train_labels[index], drawn_template(n)).pooled
            assert pooled is not None
            return text_loss(network, SCHEDULE, digits.train[index], t, eps, pooled)

        return losses

    def _reader(self, name: str, outputs: int, losses_of: Callable[[NoisyClassifier], Losses]) -> NoisyClassifier:
        def make() -> NoisyClassifier:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                return NoisyClassifier(SHAPE, outputs, text=name == "reader")

        def train() -> dict[str, Tensor]:
            network = make()
            return fit(network, losses_of(network), self.digits, self.images[name], say=self._about(name))[0]

        network = make()
        network.load_state_dict(self._kept(name, train))
        return network.eval().requires_grad_(False)

    def inpainting(self) -> NetworkDenoiser:
        """Return `classes` fine-tuned for inpainting, conditioned on random masks and the known pixels."""
        return self._denoiser(self._inpainting_shape(), self._kept("inpainting", self._train_inpainting))

    def _inpainting_shape(self) -> UNetConfig:
        return UNetConfig(**{**vars(SHAPE), "context_channels": 1})

    def _train_inpainting(self) -> dict[str, Tensor]:
        shape = self._inpainting_shape()
        start = shape.extend_for_inpainting(self._kept("classes", self._train_classes))
        network, digits = self.unet(shape, start), self.digits

        def losses(n: Tensor, index: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            x_0 = digits.train[index]
            label = Conditioning(label=digits.train_labels[index], drop=drop(n))
            cond = inpainting_condition(x_0, random_mask(SEED, n, (8, 8)), label)
            return OBJECTIVE.losses(network, SCHEDULE, x_0, t, eps, cond)

        return fit(network, losses, digits, self.images["inpainting"], lr=1e-3, say=self._about("inpainting"))[0]

    def text(self) -> NetworkDenoiser:
        """Return the model conditioned on captions only, without classes."""
        shape = UNetConfig(**{**vars(SHAPE), "num_classes": 0, "text_dim": self.captions.dim})
        digits, captions = self.digits, self.captions

        def train() -> dict[str, Tensor]:
            network = self.unet(shape)

            def losses(n: Tensor, index: Tensor, t: Tensor, eps: Tensor) -> Tensor:
                cond = captions.of(digits.train_labels[index], drawn_template(n)).dropped(drop(n))
                return OBJECTIVE.losses(network, SCHEDULE, digits.train[index], t, eps, cond)

            return fit(network, losses, digits, self.images["text"], say=self._about("text"))[0]

        return self._denoiser(shape, self._kept("text", train))

    def _denoiser(self, config: UNetConfig, weights: dict[str, Tensor]) -> NetworkDenoiser:
        network = self.unet(config, weights).eval().requires_grad_(False)
        return NetworkDenoiser(network, SCHEDULE, OBJECTIVE.prediction)

    def _kept(self, name: str, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self._path(name)
        if not path.exists():
            save_file(train(), path)
        return load_file(path)

    def _path(self, name: str, suffix: str = "") -> Path:
        return self.work / f"{name}-{self.images[name]}{suffix}.safetensors"

    def _about(self, name: str) -> Callable[[str], None]:
        return lambda text: self.say(f"{name}: {text}")


def drop(n: Tensor) -> Tensor:
    """Return which samples have their condition dropped, bool [B]."""
    return uniform(SEED, n, Purpose.LABEL_DROP)[:, 0] < LABEL_DROP
