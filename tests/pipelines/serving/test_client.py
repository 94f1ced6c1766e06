"""What a client makes of a server's answers, and when it asks again."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from pipelines.inference.request import EditRequest, RequestError
from pipelines.serving.bodies import write_body
from pipelines.serving.client import Client, ServerError
from pipelines.shards.ingest.encode import ImageFormat, encode_image


@contextmanager
def answering(*answers: tuple[int, str] | None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives these answers one after another; None breaks the connection."""
    left, heard = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append({"authorization": self.headers.get("authorization", ""), "path": self.path})
            self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = left.pop(0) if len(left) > 1 else left[0]  # the last one again and again
            if answer is None:
                self.connection.close()
                return
            self.send_response(answer[0])
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(answer[1].encode())

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_POST  # noqa: N815 - the name of the base class

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", heard
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "name, mode",
    [("cmyk.jpg", "CMYK"), ("grey.jpg", "L"), ("palette.gif", "P"), ("alpha.webp", "RGBA"), ("wide.tif", "I;16")],
)
def test_a_picture_of_any_format_is_sent_as_a_png_of_the_same_pixels(tmp_path, name, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    image, exif = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode.replace("CMYK", "RGB")), Image.Exif()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    exif[0x0112] = 6
    image.convert(mode).save(tmp_path / name, exif=exif)
    (sent,) = write_body(EditRequest.of(images=[tmp_path / name]))["images"]
    form = ImageFormat(8, 3)
    wanted = encode_image((tmp_path / name).read_bytes(), form).pixels
    assert np.array_equal(encode_image(base64.b64decode(sent), form).pixels, wanted)
    assert Image.open(io.BytesIO(base64.b64decode(sent))).format == "PNG"


def test_a_file_that_is_no_picture_is_refused_before_it_is_sent(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RequestError, match=r"text\.png is not an image of a known kind"):
        write_body(EditRequest.of(images=[tmp_path / "text.png"]))


DONE = (200, json.dumps({"images": []}))


def test_a_lost_answer_is_asked_for_again():
    lost = [None, (500, "died"), (503, "{}"), (429, json.dumps({"message": "later"})), (502, "<html>")]
    with answering(*lost, DONE) as (url, heard):
        assert Client(url, "secret").ask({}) == {"images": []}
    assert heard == [{"authorization": "Bearer secret", "path": "/v1/images"}] * 6


def test_the_classes_of_a_model_are_asked_for_by_any_of_its_names():
    told = {"models": [{"id": "models:/digits@champion", "classes": ["a, b", "c"]}]}
    with answering((200, json.dumps(told))) as (url, heard):
        for name in ("models:/digits@champion", "digits", "champion"):
            assert Client(url).classes(name) == ("a, b", "c")
        with pytest.raises(RequestError, match="no model 'x'; served are: models:/digits@champion"):
            Client(url).classes("x")
    assert {each["path"] for each in heard} == {"/v1/models"}


@pytest.mark.parametrize(
    "status, message, expected",
    [(422, "no class 'x'", "no class 'x'"), (401, "a token", "a token; give --token"), (404, "", "404")],
)
def test_a_refusal_is_the_users_to_mend_and_is_not_asked_again(status, message, expected):
    refused = answering((status, json.dumps({"message": message})))
    with refused as (url, heard), pytest.raises(RequestError, match=expected):
        Client(url).ask({})
    assert [each["authorization"] for each in heard] == [""]


def test_a_server_that_stays_silent_is_an_error_after_a_while():
    with answering((503, "busy")) as (url, _), pytest.raises(ServerError, match="does not answer: 503 busy"):
        Client(url, patience_s=0.3).ask({})
    said: list[str] = []
    with pytest.raises(ServerError, match="does not answer"):
        Client("http://127.0.0.1:9", patience_s=0.3, notice=said.append).ask({})
    (line,) = said  # at once, and once
    assert line.startswith("http://127.0.0.1:9 does not answer (")
    assert line.endswith("): it is asked again for 0 s")
    with answering((200, "<html>")) as (url, _), pytest.raises(RequestError, match="something else than JSON"):
        Client(url).ask({})
