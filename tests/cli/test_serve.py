# SPDX-License-Identifier: Apache-2.0
"""`hourllava serve`: what keeps it from serving is one line, before anything is made."""

import socket
import sys
from pathlib import Path

import pytest

from hourllava.cli import main
from hourllava.cli.serve import listen, read_key


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "0.0.0.0"], "nobody would be asked for a key; add --api-key-file"),
        (["--host", "::"], "nobody would be asked for a key; add --api-key-file"),
        (["--host", "server.example"], "nobody would be asked for a key; add --api-key-file"),
        (["--api-key-file", "absent"], "it cannot be read (No such file"),
        (["--api-key-file", "."], "it cannot be read (Is a directory"),
        (["--local", "absent"], "there is no such directory"),
        (["--budget", "much"], "much: that is no size"),
        (["--upload-limit", "5 films"], "its unit films is unknown"),
        (["--model", "absent"], "there is no such model"),
        (["--budget", "1"], "a page takes"),
        (["--budget", "4000TiB"], "it cannot be allocated"),
        (["--memories", "file"], "it cannot be made"),
        (["--decoder", "localhost:8001"], "it is no address; give one as http://127.0.0.1:8001"),
        (["--decoder", "http://127.0.0.1:9"], "it cannot be reached (Connection refused); start `vllm serve"),
    ],
)
def test_what_cannot_be_served(
    arguments: list[str],
    why: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["serve", "--port", "0", "--model", model, *arguments]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("hourllava: ")
    assert why in err


def test_a_port_that_is_taken(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port), "--model", model]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"hourllava: --host 127.0.0.1 --port {port}: it cannot be listened at (")
    assert err.count("\n") == 1


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("fastapi", "prometheus_client"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve"]) == 1
    todo = "install what it needs: pip install 'hourllava[serve]'"
    line = f"hourllava: hourllava serve: fastapi, prometheus_client cannot be imported; {todo}\n"
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(
    "arguments", [["--port", "65536"], ["--port", "-1"], ["--port", "http"], ["--batch", "0"], ["--batch", "2000"]]
)
def test_wrong_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    assert "is no whole number from" in capfd.readouterr().err


def test_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"
    path.write_text("abcdef-12345~6.=\n")
    assert read_key(path) == "abcdef-12345~6.="
    for bad in ("", "\n", "short", "two words of it", "one-of-two\nlines-of-it", "käseküchle", "semi;colon;"):
        path.write_text(bad)
        assert main(["serve", "--api-key-file", str(path)]) == 1
        err = capfd.readouterr().err
        assert "it holds no key" in err
        assert err.count("\n") == 1


def test_addresses() -> None:
    for host in ("127.0.0.1", "localhost"):
        with listen(host, 0) as taken:
            assert taken.getsockname()[1] > 0
