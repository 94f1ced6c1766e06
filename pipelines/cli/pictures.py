"""`ddpm sample`, `inpaint`, `edit` and `likelihood`: whatever a trained model can do with pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.common import (
    LARGEST_SEED,
    MODEL,
    Json,
    Overrides,
    answer_json,
    connect_for_model,
    finite,
    new_folder,
    terminal,
)

if TYPE_CHECKING:
    from pipelines.inference import Request

Reference = Annotated[str, typer.Argument(help=MODEL)]
Images = Annotated[list[Path], typer.Argument(help="Pictures, brought to the model's size and channels")]
Out = Annotated[
    Path, typer.Option("--out", callback=new_folder, help="Folder for the PNGs, grid.png and manifest.json")
]
Labels = Annotated[str | None, typer.Option(help="Class names or indices, comma-separated")]
Prompts = Annotated[list[str] | None, typer.Option(help="A text, for a model trained on text; repeat for more")]
PromptFile = Annotated[Path | None, typer.Option(help="File with a prompt on each line")]
Negative = Annotated[str | None, typer.Option(help="Text to move away from, by the guidance scale")]
Encoder = Annotated[str | None, typer.Option(help="Text encoder; default: the one that the model was trained on")]
Sampler = Annotated[str | None, typer.Option(help="Kind of sampler, such as dpm_solver; default: the model's own")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own")]
Eta = Annotated[
    float | None, typer.Option(min=0, max=1, callback=finite, help="Noise of a DDIM step; 0 is deterministic")
]
Guidance = Annotated[
    float | None, typer.Option(min=0, callback=finite, help="Guidance scale; default: the model's own")
]
Interval = Annotated[str | None, typer.Option(help="LOW,HIGH: part of t / T in which guidance is applied")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE of any other sampling setting, such as clip=null")
]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise; the pictures of one seed are numbered")
]
Seeds = Annotated[str | None, typer.Option(help="A seed for each row of pictures, comma-separated, instead of --count")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images to draw at a time; the images depend on it by rounding alone")
]
Film = Annotated[bool, typer.Option("--film", help="Write film.png and film.webp: x_t and the predicted x_0")]
Url = Annotated[str | None, typer.Option(help="Ask this server of `ddpm serve`; MODEL is a name or reference there")]
Token = Annotated[
    str | None,
    typer.Option(envvar="DDPM_SERVE_TOKEN", help="Of the server; default: that of the servers of this machine"),
]
Config = Annotated[
    list[str] | None, typer.Option("--override", help="KEY=VALUE of the configuration, such as tracking.uri=…")
]


def sample(
    model: Reference,
    out: Out,
    labels: Annotated[
        str | None, typer.Option(help="Class names or indices, comma-separated; default: all classes")
    ] = None,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    negative_prompt: Negative = None,
    text_encoder: Encoder = None,
    count: Annotated[int, typer.Option(min=1, help="Images per label or prompt, or in total without them")] = 1,
    seed: Seed = 0,
    seeds: Seeds = None,
    interpolate: Annotated[str | None, typer.Option(help="A,B: seeds between whose noise to interpolate")] = None,
    frames: Annotated[int, typer.Option(min=2, help="Images of an interpolation, both ends included")] = 8,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    interval: Interval = None,
    setting: Set = None,
    film: Film = False,
    batch_size: BatchSize = 64,
    url: Url = None,
    token: Token = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw images. Example: ddpm sample models:/digits@champion --labels 0,1,2 --guidance 2 --steps 50 --out samples"""
    from pipelines.inference import Sample

    request = Sample.of(
        labels=_words(labels),
        prompts=_prompts(prompts, prompt_file),
        negative_prompt=negative_prompt,
        text_encoder=text_encoder,
        count=count,
        seed=seed,
        seeds=_numbers("--seeds", seeds),
        interpolate=_numbers("--interpolate", interpolate, 2),
        frames=frames,
        sampling=_sampling(sampler, steps, eta, guidance, interval, setting),
        batch_size=batch_size,
    )
    if url is not None:
        _ask(url, token, model, request, labels, out, film, as_json)
        return
    _draw(model, request, labels, out, film, overrides, as_json)


def inpaint(
    model: Reference,
    images: Images,
    mask: Annotated[
        list[str],
        typer.Option(
            help="Picture whose white pixels are filled, box:X,Y,WIDTH,HEIGHT or half:left|right|top|bottom; repeat "
            "for one for each image, or for several of one image"
        ),
    ],
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(help="trained, repaint or replacement; default: trained if the model was, else repaint"),
    ] = None,
    labels: Labels = None,
    prompts: Prompts = None,
    negative_prompt: Negative = None,
    text_encoder: Encoder = None,
    count: Annotated[int, typer.Option(min=1, help="Results for each image")] = 1,
    seed: Seed = 0,
    seeds: Seeds = None,
    sampler: Sampler = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the method, before jumps of repaint")] = None,
    resamplings: Annotated[int | None, typer.Option(min=1, help="How often repaint samples each section")] = None,
    jump_length: Annotated[int | None, typer.Option(min=1, help="Length of repaint's jumps, in steps")] = None,
    guidance: Guidance = None,
    interval: Interval = None,
    setting: Set = None,
    film: Film = False,
    batch_size: BatchSize = 64,
    url: Url = None,
    token: Token = None,
    overrides: Config = None,
    as_json: Json = False,
) -> None:
    """Fill what a mask hides. Example: ddpm inpaint models:/digits@champion seven.png --mask half:left --out filled"""
    from pipelines.inference import Inpaint

    request = Inpaint.of(
        images=images,
        masks=mask,
        method=method,
        method_settings=_given(resamplings=resamplings, jump_length=jump_length),
        labels=_words(labels),
        prompts=prompts or None,
        negative_prompt=negative_prompt,
        text_encoder=text_encoder,
        count=count,
        seed=seed,
        seeds=_numbers("--seeds", seeds),
        sampling=_sampling(sampler, steps, None, guidance, interval, setting),
        batch_size=batch_size,
    )
    if url is not None:
        _ask(url, token, model, request, labels, out, film, as_json)
        return
    _draw(model, request, labels, out, film, overrides, as_json)


def edit(
    model: Reference,
    images: Images,
    out: Out,
    strength: Annotated[
        float,
        typer.Option(min=0, max=1, callback=finite, help="How far to go: 0 keeps the image, 1 keeps nearly nothing"),
    ] = 0.5,
    invert: Annotated[
        bool, typer.Option("--invert", help="Start from the noise that gives the image, found by DDIM inversion")
    ] = False,
    source_labels: Annotated[str | None, typer.Option(help="Classes of the images, for --invert")] = None,
    labels: Labels = None,
    prompts: Prompts = None,
    negative_prompt: Negative = None,
    text_encoder: Encoder = None,
    count: Annotated[int, typer.Option(min=1, help="Results for each image")] = 1,
    seed: Seed = 0,
    seeds: Seeds = None,
    sampler: Sampler = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a whole sampling, of which an edit does its part")
    ] = None,
    guidance: Guidance = None,
    interval: Interval = None,
    setting: Set = None,
    film: Film = False,
    batch_size: BatchSize = 64,
    url: Url = None,
    token: Token = None,
    overrides: Config = None,
    as_json: Json = False,
) -> None:
    """Draw images anew from noised ones. Example: ddpm edit models:/digits@champion 3.png --labels 8 --out edited"""
    from pipelines.inference import Edit

    request = Edit.of(
        images=images,
        strength=strength,
        invert=invert,
        source_labels=_words(source_labels),
        labels=_words(labels),
        prompts=prompts or None,
        negative_prompt=negative_prompt,
        text_encoder=text_encoder,
        count=count,
        seed=seed,
        seeds=_numbers("--seeds", seeds),
        sampling=_sampling(sampler, steps, None, guidance, interval, setting),
        batch_size=batch_size,
    )
    if url is not None:
        _ask(url, token, model, request, labels, out, film, as_json)
        return
    _draw(model, request, labels, out, film, overrides, as_json)


def likelihood(
    model: Reference,
    data: Annotated[str, typer.Argument(help="Address of a dataset, whose test split is taken, or a folder of images")],
    out: Annotated[Path, typer.Option("--out", callback=new_folder, help="Folder for likelihood.json and terms.html")],
    method: Annotated[str, typer.Option(help="bound, with its terms by timestep, or ode")] = "bound",
    images: Annotated[int, typer.Option(min=2, help="Images, spread evenly over the data")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise and of the interval")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images to look at at a time")] = 16,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Give bits per dimension of images. Example: ddpm likelihood runs:/ID s3://ddpm/datasets/digits --out bits"""
    from pipelines.inference import likelihood as bits

    chosen = bits.parse_method(method)
    config = connect_for_model(model, overrides, more=["s3"] if data.startswith("s3://") else [])

    from pipelines import references
    from pipelines.evaluation.devices import task_device
    from pipelines.storage import Storage

    storage = Storage.of(config)
    resolved = references.resolve(model, tracking_uri=config.tracking.uri, storage=storage, device=str(task_device()))
    read = bits.read_data(data, resolved.model, images, config, storage, lambda text: terminal.stage("note", text))
    with terminal.live():
        found = bits.measure(
            resolved.model, read, chosen, seed=seed, batch_size=batch_size, progress=terminal.counter(method, "images")
        )
    files = bits.write(found, out, resolved)
    terminal.stage("bits/dim", found.line())
    terminal.stage("written", ", ".join(str(path) for path in files))
    answer_json(as_json, {**found.to_plain(), "files": [str(path) for path in files]})


def _draw(
    model: str, request: Request, labels: str | None, out: Path, film: bool, overrides: list[str] | None, as_json: bool
) -> None:
    """Draw what a request asks for, and write it."""
    from pipelines.inference import check_given

    check_given(request)
    config = connect_for_model(model, overrides, request.sampling.values())

    from pipelines.inference import Source, encoder_of, open_model, parse_labels, picture, write, written_as_drawn
    from pipelines.inference.files import FRAMES
    from pipelines.storage import Storage

    resolved = open_model(model, request, config, Storage.of(config))
    if labels is not None:  # the name of a class may have a comma in it
        request = request.model_copy(update={"labels": parse_labels(labels, resolved.model.spec.classes)})
    with terminal.live():
        pictures = picture(
            request,
            resolved.model,
            encode=encoder_of(resolved, request),
            film=FRAMES if film else 0,
            progress=terminal.counter(request.task, "steps"),
            notice=lambda text: terminal.stage("note", text),
            finished=written_as_drawn(out),
        )
    written = write(pictures, out, Source.of(resolved), as_drawn=True)
    terminal.stage(request.task, f"{len(written.files)} images and {written.grid}")
    answer_json(as_json, written.to_plain())


def _ask(
    url: str,
    token: str | None,
    model: str,
    request: Request,
    labels: str | None,
    out: Path,
    film: bool,
    as_json: bool,
) -> None:
    """Have a server draw what a request asks for, and write it."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url}: write the address of a server, http://HOST:PORT", param_hint="--url")
    from pipelines.inference import check_given, parse_labels, write
    from pipelines.loopback import is_loopback
    from pipelines.serving.client import Client
    from pipelines.serving.token import client_token
    from pipelines.stack import default_home

    check_given(request)
    local = client_token(token, default_home()) if is_loopback(url) else token  # the own token is for no other host
    client = Client(url, local, notice=lambda text: terminal.stage(request.task, text))
    if labels is not None and "," in labels:  # the name of a class may have a comma in it
        request = request.model_copy(update={"labels": parse_labels(labels, client.classes(model))})
    pictures, source = client.draw(request, model=model, film=film)
    written = write(pictures, out, source)
    terminal.stage(request.task, f"{len(written.files)} images and {written.grid}, drawn by {source.reference}")
    answer_json(as_json, written.to_plain())


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _words(text: str | None) -> list[str] | None:
    """Return the parts of a text between commas."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _numbers(option: str, text: str | None, count: int | None = None) -> list[int] | None:
    """Return whole numbers that are separated by commas.

    Raises:
        BadParameter: a part is none, or there are not `count` of them.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 20 for part in parts) or len(parts) != (count or len(parts)):
        raise typer.BadParameter(
            f"{text!r}: write {'A,B' if count == 2 else 'whole numbers such as 0,1,2'}", param_hint=option
        )
    return [int(part) for part in parts]


def _prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str] | None:
    """Return the prompts of the command line and of a file.

    Raises:
        BadParameter: the file cannot be read.
    """
    found = list(prompts or [])
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="--prompt-file") from error
    return found or None


def _sampling(
    sampler: str | None,
    steps: int | None,
    eta: float | None,
    guidance: float | None,
    interval: str | None,
    settings: Sequence[str] | None,
) -> dict[str, Any]:
    """Return the fields of `Sampling` that the command line sets.

    Raises:
        BadParameter: a text is not of the option's form.
    """
    fields = _given(kind=sampler, steps=steps, eta=eta, scale=guidance)
    if interval is not None:
        try:
            low, high = (float(part) for part in interval.split(","))
        except ValueError:
            raise typer.BadParameter(f"{interval!r}: write LOW,HIGH such as 0.2,0.8", param_hint="--interval") from None
        fields["interval"] = [low, high]
    for text in settings or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r}: write FIELD=VALUE such as clip=null", param_hint="--set")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
        except (ValueError, RecursionError) as error:
            raise typer.BadParameter(f"{name}: its value cannot be read: {error}", param_hint="--set") from error
    return fields
