"""Pictures from a model for one typed request: what the command line, a server and an evaluation have in common."""

from pipelines.inference.files import (
    FRAMES,
    Source,
    Written,
    film_strip,
    grid_of,
    write,
    write_samples,
    written_as_drawn,
)
from pipelines.inference.inputs import check_given
from pipelines.inference.pictures import (
    Pictures,
    Prepared,
    Row,
    as_request_error,
    count_pictures,
    encoder_of,
    open_model,
    picture,
    prepare,
)
from pipelines.inference.request import Edit, Inpaint, Request, RequestError, Sample, parse_labels, read_request

__all__ = [
    "FRAMES",
    "Edit",
    "Inpaint",
    "Pictures",
    "Prepared",
    "Request",
    "RequestError",
    "Row",
    "Sample",
    "Source",
    "Written",
    "as_request_error",
    "check_given",
    "count_pictures",
    "encoder_of",
    "film_strip",
    "grid_of",
    "open_model",
    "parse_labels",
    "picture",
    "prepare",
    "read_request",
    "write",
    "write_samples",
    "written_as_drawn",
]
