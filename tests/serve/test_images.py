# SPDX-License-Identifier: Apache-2.0
"""Images in a conversation, of a server whose engine and library are scripted."""

import base64
import contextlib
import errno
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import Client, Reply, Scripted

from hourllava.serve.sources import SourcePolicy


def ask(client: Client, url: str) -> Reply:
    """A question about an image."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return client.chat([{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}])


def seen(scene: Scripted) -> Any:
    """The image that the model was given last."""
    return scene.prepared[-1][0][0]["content"][0]["image"]


def test_text_and_images_go_to_the_chat_template(client: Client, scene: Scripted) -> None:
    data = BytesIO()
    Image.new("RGB", (4, 3), "red").save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}, {"type": "text", "text": "What?"}]
    message = client.chat([{"role": "user", "content": content}]).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "It was red.", "refusal": None}
    ((messages,),) = scene.prepared
    image = messages[0]["content"][0].pop("image")
    assert messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((4, 3), "RGB", (255, 0, 0))


def test_an_image_that_the_server_may_not_read(
    client: Client, scene: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.png").write_bytes(b"x")
    scene.service.policy = SourcePolicy(tmp_path)
    monkeypatch.setattr(Path, "open", locked)
    reply = ask(client, str(tmp_path / "a.png"))
    assert (reply.status, reply.error["code"]) == (400, "source_unusable")
    assert "it cannot be read (Permission denied)" in reply.error["message"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("data:image/png;base64,!!", "not base64"),
        ("data:image/png;base64,AAAA", "no picture that can be read"),
        ("data:text/html;base64,AAAA", "holds no picture"),
        ("/etc/hostname", "files of this machine are not served"),
        ("http://example.org/a.png", "reads nothing from example.org"),
        ("data:image/png;base64,BOMB", "9000 x 9000 pixels"),
    ],
)
def test_images_that_cannot_be_had(url: str, why: str, client: Client) -> None:
    if url.endswith("BOMB"):
        data = BytesIO()
        Image.new("1", (9000, 9000)).save(data, "PNG")
        url = url.replace("BOMB", base64.b64encode(data.getvalue()).decode())
    reply = ask(client, url)
    assert reply.status == 400
    assert why in reply.error["message"]


def test_an_image_in_the_directory_that_is_served(client: Client, scene: Scripted, tmp_path: Path) -> None:
    Image.new("RGB", (5, 2)).save(tmp_path / "a.png")
    scene.service.policy = SourcePolicy(tmp_path)
    assert ask(client, f"file://{tmp_path}/a.png").status == 200
    assert seen(scene).size == (5, 2)


def test_a_photograph_is_turned_upright(client: Client, scene: Scripted, tmp_path: Path) -> None:
    scene.service.policy = SourcePolicy(tmp_path)
    exif = Image.Exif()
    exif[0x112] = 6  # the camera lay on its side
    Image.new("RGB", (5, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert ask(client, f"{tmp_path}/a.jpg").status == 200
    assert seen(scene).size == (2, 5)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *given: Any) -> None:
        pass


@contextlib.contextmanager
def on_the_web(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are while the block lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_image_on_the_web(client: Client, scene: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as an image may be, and not as a video."""
    scene.service.policy = SourcePolicy(domains=("127.0.0.1",))
    Image.new("RGB", (5, 2)).save(tmp_path / "a.png")
    with on_the_web(tmp_path) as address:
        assert ask(client, f"{address}/a.png").status == 200
        assert seen(scene).size == (5, 2)
        monkeypatch.setattr("hourllava.serve.pictures.MAX_BYTES", 20)
        reply = ask(client, f"{address}/a.png")
        assert (reply.status, reply.error["code"]) == (413, "too_large")
