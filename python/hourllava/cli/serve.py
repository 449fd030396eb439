# SPDX-License-Identifier: Apache-2.0
"""`hourllava serve`: answers questions about videos over HTTP, until it is told to stop."""

import argparse
import ipaddress
import logging
import re
import socket
from importlib.util import find_spec
from pathlib import Path

from hourllava.cli.numbers import whole
from hourllava.errors import HourLlavaError

PACKAGES = ("fastapi", "uvicorn", "websockets", "prometheus_client")
KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,}")  # what a header and a cookie hold as it is


def add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava serve`."""
    parser = commands.add_parser(
        "serve",
        help="answer questions about videos over HTTP",
        description=(
            "Serve OpenAI's chat completions with videos, their memories and a page to use them by. Each video is "
            "watched once; questions of many clients are answered together. SIGTERM and Ctrl-C let running answers end."
        ),
    )
    parser.add_argument("--model", default="tiny", help="a preset or a model's directory (default: tiny)")
    parser.add_argument(
        "--memories",
        metavar="DIR",
        type=Path,
        default=Path("memories"),
        help="the repository of memories, made if it is not there (default: memories)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="the port, 0 for a free one (default: 8000)")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        default="4GiB",
        help="bytes of the model's device for pages of memories that are asked (default: 4GiB)",
    )
    parser.add_argument(
        "--decoder",
        metavar="URL",
        help="a vLLM server of the model's decoder, which writes the answers (default: they are written here)",
    )
    together = "answers that are written together (default: 8, with --decoder 64)"
    parser.add_argument("--batch", metavar="N", type=whole(1, 1024), help=together)
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help="the key that clients have to give is the one line of this file; needed where others can reach the host",
    )
    parser.add_argument(
        "--local", metavar="DIR", type=Path, help="clients may name files in this directory (default: none)"
    )
    parser.add_argument(
        "--domain",
        metavar="HOST",
        action="append",
        default=[],
        help="clients may name addresses of this host; may be given several times, * is any host (default: none)",
    )
    parser.add_argument(
        "--upload-limit", metavar="SIZE", default="16GiB", help="bytes of the largest video taken (default: 16GiB)"
    )
    parser.add_argument(
        "--keep-videos", action="store_true", help="keep videos that were sent or fetched when they have been watched"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit code.

    Raises:
        HourLlavaError: it cannot be served, or not safely.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        why = f"{', '.join(missing)} cannot be imported"
        raise HourLlavaError("hourllava serve", why, "install what it needs: pip install 'hourllava[serve]'")
    local = _is_loopback(args.host)
    key = None if args.api_key_file is None else read_key(args.api_key_file)
    if key is None and not local:
        why = "others can reach it, and nobody would be asked for a key"
        raise HourLlavaError(f"--host {args.host}", why, "add --api-key-file, or leave it at 127.0.0.1")
    if args.local is not None and not args.local.is_dir():
        raise HourLlavaError(f"--local {args.local}", "there is no such directory", "name one, or leave it out")
    with listen(args.host, args.port) as taken:
        return _serve(args, taken, key, local)


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        HourLlavaError: the file cannot be read, or holds no key.
    """
    what = f"--api-key-file {path}"
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise HourLlavaError(what, f"it cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError:
        key = ""
    if not KEY.fullmatch(key):
        todo = "write one line of at least 8 letters, digits or ._~+/=- to it, as `openssl rand -hex 32` gives"
        raise HourLlavaError(what, "it holds no key", todo)
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        HourLlavaError: the host is none of this machine's, or the port is taken.
    """
    what = f"--host {host} --port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = f"it cannot be listened at ({getattr(error, 'strerror', None) or error})"
        raise HourLlavaError(what, why, "choose another --port (0 is a free one), or another --host") from error


def _serve(args: argparse.Namespace, taken: socket.socket, key: str | None, local: bool) -> int:
    from hourllava.memory import parse_size
    from hourllava.model import best_device, load_model
    from hourllava.serve import Engine, RemoteDecoder, RemoteEngine
    from hourllava.serve.answering import Service
    from hourllava.serve.library import Library
    from hourllava.serve.metrics import Metrics
    from hourllava.serve.running import Server
    from hourllava.serve.sources import SourcePolicy

    logging.basicConfig(level=logging.WARNING, format="hourllava: %(message)s")
    policy = SourcePolicy(args.local, tuple(args.domain), parse_size(args.upload_limit))
    parse_size(args.budget)  # before the model is read
    decoder = None if args.decoder is None else RemoteDecoder(args.decoder)
    if decoder is not None:
        decoder.served()  # likewise
    model = load_model(args.model, device=best_device(), decoder=decoder is None)
    engine = Engine(model, args.batch or 8) if decoder is None else RemoteEngine(model, decoder, args.batch or 64)
    library = Library(model, args.memories, args.budget, policy, args.keep_videos)
    name = Path(args.model).name or str(args.model)
    service = Service(model, name, engine, library, Metrics(engine, library), policy, key, local)
    host, port = taken.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        _tell(args, name, address, key)

    Server(service, ready).run([taken])
    return 0


def _tell(args: argparse.Namespace, name: str, address: str, key: str | None) -> None:
    """Say what is served and where, for people: a table on a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, rows = (
        Console(),
        {
            "model": name,
            "memories": str(args.memories.resolve()),
            "budget": args.budget,
            "key": "asked for" if key else "none: this machine only",
            "page": f"{address}/",
            "API": f"{address}/v1",
            **({"decoder": args.decoder} if args.decoder else {}),
        },
    )
    if console.is_terminal:
        table = Table(show_header=False)
        for what, value in rows.items():
            table.add_row(what, escape(value))
        console.print(table)
    else:
        print("\n".join(f"{what}: {value}" for what, value in rows.items()))
    print(f"serving at {address}", flush=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
