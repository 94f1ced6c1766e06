"""`ddpm sample`, `inpaint`, `edit` and `likelihood`: pictures from trained models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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
    new_folder,
    terminal,
)
from pipelines.inference.request import (
    EditRequest,
    InpaintRequest,
    Option,
    Request,
    SampleRequest,
    options,
    plain_value,
    read_fields,
)

if TYPE_CHECKING:
    from pipelines.inference.files import PictureSource
    from pipelines.inference.pictures import Pictures

Reference = Annotated[str, typer.Argument(help=MODEL)]
Out = Annotated[
    Path, typer.Option("--out", callback=new_folder, help="Folder for the PNGs, grid.png and manifest.json")
]
PromptFile = Annotated[Path | None, typer.Option(help="File with a prompt on each line")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE for any other sampling setting, such as clip=null")
]
Url = Annotated[str | None, typer.Option(help="Use this `ddpm serve` server; MODEL is a name or reference there")]
Token = Annotated[
    str | None,
    typer.Option(envvar="DDPM_SERVE_TOKEN", help="Token of the server; default: that of servers on this machine"),
]
Config = Annotated[
    list[str] | None, typer.Option("--override", help="KEY=VALUE of the configuration, such as tracking.uri=…")
]


def _draw(
    kind: type[Request],
    model: Reference,
    out: Out,
    prompt_file: PromptFile = None,
    setting: Set = None,
    url: Url = None,
    token: Token = None,
    overrides: Overrides = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Draw the pictures of a request, here or on a server, and write them.

    Args:
        given: values of the options of the request.
    """
    if prompt_file is not None:
        given["prompts"] = [*(given["prompts"] or []), *_lines(prompt_file)]
    settings = dict(_setting(text) for text in setting or [])

    def request(classes: Sequence[str] = ()) -> Request:
        fields = read_fields(kind, given, classes)
        return kind.of(**{**fields, "sampling": {**fields.get("sampling", {}), **settings}})

    from pipelines.inference.files import write
    from pipelines.inference.inputs import check_given

    check_given(request())
    if url is None:
        pictures, source = _drawn_here(model, request, out, overrides)
    else:
        pictures, source = _drawn_by(url, token, model, request)
    written = write(pictures, out, source, as_drawn=url is None)
    by = "" if url is None else f", drawn by {source.reference}"
    terminal.stage(kind.task, f"{len(written.files)} images and {written.grid}{by}")
    answer_json(as_json, written.to_plain())


def _verb(kind: type[Request], says: str) -> Callable[..., None]:

    def verb(**given: Any) -> None:
        _draw(kind, **given)

    own = dict(inspect.signature(_draw, eval_str=True).parameters)
    of_request = [_parameter(option) for option in options(kind)]
    if "images" in kind.model_fields:  # a variable number of arguments
        own["overrides"] = own["overrides"].replace(annotation=Config)
    first, last = [own.pop(name) for name in ("model", "out")], [own[name] for name in list(own)[1:-1]]
    parameters = sorted([*first, *of_request, *last], key=lambda each: each.default is not inspect.Parameter.empty)
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    verb.__name__, verb.__doc__ = kind.task, says
    verb.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return verb


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = str if option.several else option.type
    says, shown = option.meaning[0].upper() + option.meaning[1:], None
    if option.several == "repeat":
        kind, says = list[option.type], f"{says}; repeat for more"  # type: ignore[name-defined]
    elif option.several:
        shown = f"<{option.several.lower()}>"
    if option.type is Path:
        more: Any = typer.Argument(help=says)
    else:
        name = f"--{option.name.replace('_', '-')}"
        more = typer.Option(name, min=option.low, max=option.high, metavar=shown, help=says)
    default = inspect.Parameter.empty if option.required else option.default
    kind = kind | None if default is None else kind
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, more]
    )


sample = _verb(
    SampleRequest,
    "Draw images. Example: ddpm sample models:/digits@champion --labels 0,1,2 --guidance 2 --steps 50 --out samples",
)
inpaint = _verb(
    InpaintRequest,
    "Fill masked regions. Example: ddpm inpaint models:/digits@champion seven.png --mask half:left --out filled",
)
edit = _verb(
    EditRequest,
    "Redraw noised images. Example: ddpm edit models:/digits@champion 3.png --labels 8 --out edited",
)


def likelihood(
    model: Reference,
    data: Annotated[
        str, typer.Argument(help="Address of a dataset, of which the test split is used, or a folder of images")
    ],
    out: Annotated[Path, typer.Option("--out", callback=new_folder, help="Folder for likelihood.json and terms.html")],
    method: Annotated[str, typer.Option(help="bound, with its terms by timestep, or ode")] = "bound",
    images: Annotated[int, typer.Option(min=2, help="Number of images, spread evenly over the data")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise and of the interval")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network batch")] = 16,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compute bits per dimension of images. Example: ddpm likelihood runs:/ID s3://ddpm/datasets/digits --out bits"""
    from pipelines.inference import likelihood as bits

    chosen = bits.parse_method(method)
    config = connect_for_model(model, overrides, more=["s3"] if data.startswith("s3://") else [])

    from pipelines.checkpoints import references
    from pipelines.evaluation.devices import task_device

    resolved = references.open_model(model, config, str(task_device()))
    read = bits.read_data(data, resolved.model, images, config, lambda text: terminal.stage("note", text))
    with terminal.live():
        found = bits.measure(
            resolved.model, read, chosen, seed=seed, batch_size=batch_size, progress=terminal.counter(method, "images")
        )
    files = bits.write(found, out, resolved)
    terminal.stage("bits/dim", found.line())
    terminal.stage("written", ", ".join(str(path) for path in files))
    answer_json(as_json, {**found.to_plain(), "files": [str(path) for path in files]})


def _drawn_here(
    model: str, request: Callable[[Sequence[str]], Request], out: Path, overrides: list[str] | None
) -> tuple[Pictures, PictureSource]:
    """Return the pictures of a request and their source; each batch is written as soon as it is drawn.

    Args:
        request: returns the request, for the classes of the model.
    """
    first = request(())
    config = connect_for_model(model, overrides, first.sampling.values())

    from pipelines.inference.files import PictureSource, written_as_drawn
    from pipelines.inference.pictures import encoder_of, open_model, picture

    resolved = open_model(model, first, config)
    asked = request(resolved.model.spec.classes)
    with terminal.live():
        pictures = picture(
            asked,
            resolved.model,
            encode=encoder_of(resolved, asked),
            progress=terminal.counter(asked.task, "steps"),
            notice=lambda text: terminal.stage("note", text),
            finished=written_as_drawn(out),
        )
    return pictures, PictureSource.of(resolved)


def _drawn_by(
    url: str, token: str | None, model: str, request: Callable[[Sequence[str]], Request]
) -> tuple[Pictures, PictureSource]:
    """Return the pictures of a request to a server and their source; see `_drawn_here`."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url}: write the address of a server, http://HOST:PORT", param_hint="--url")
    from pipelines.environment.loopback import is_loopback
    from pipelines.serving.client import Client
    from pipelines.serving.token import client_token
    from pipelines.stack import default_home

    local = (
        client_token(token, default_home()) if is_loopback(url) else token
    )  # the token of this machine is sent to no other host
    asked = request(())
    client = Client(url, local, notice=lambda text: terminal.stage(asked.task, text))
    if len(asked.labels or ()) > 1:  # possibly one class name with a comma in it
        asked = request(client.classes(model))
    return client.draw(asked, model=model)


def _lines(file: Path) -> list[str]:
    """Return the non-empty lines of a file.

    Raises:
        BadParameter: the file cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="--prompt-file") from error


def _setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of a setting.

    Raises:
        BadParameter: the text is not of the form FIELD=VALUE.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r}: write FIELD=VALUE such as clip=null", param_hint="--set")
    return name, plain_value(name, value)
