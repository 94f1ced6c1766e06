"""Pictures from a model for one typed request: what the command line, a server and an evaluation have in common."""

from pipelines.inference.files import Written, write, write_samples
from pipelines.inference.pictures import Pictures, Row, encoder_of, open_model, picture
from pipelines.inference.request import Edit, Inpaint, Request, RequestError, Sample, parse_labels, read_request

__all__ = [
    "Edit",
    "Inpaint",
    "Pictures",
    "Request",
    "RequestError",
    "Row",
    "Sample",
    "Written",
    "encoder_of",
    "open_model",
    "parse_labels",
    "picture",
    "read_request",
    "write",
    "write_samples",
]
