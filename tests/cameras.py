# SPDX-License-Identifier: Apache-2.0
"""Cameras on this machine's own net, as FFmpeg sees them: RTSP and HTTP; each sends one film to whoever asks."""

import re
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=film
t=0 0
m=video 0 RTP/AVP 96
a=rtpmap:96 H264/90000
a=fmtp:96 packetization-mode=1
a=control:track
"""


class Camera(socketserver.ThreadingTCPServer):
    """Sends a film to one client after the other.

    Args:
        films: for the first client, the second, ...; the last one for all others: H.264 in MPEG-TS.
        promised: bytes that it says it will send by HTTP, if not those of the film.
        stays: it falls silent after the last byte, and hangs up only when the client has.
    """

    daemon_threads = True

    def __init__(
        self,
        handler: type[socketserver.BaseRequestHandler],
        *films: Path,
        promised: int | None = None,
        stays: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.films, self.promised, self.stays = list(films), promised, stays

    def next_film(self) -> Path:
        return self.films.pop(0) if len(self.films) > 1 else self.films[0]


class Http(socketserver.StreamRequestHandler):
    """Sends the bytes of a film."""

    server: Camera

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        data = self.server.next_film().read_bytes()
        length = self.server.promised or len(data)
        self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nContent-Length: {length}\r\n\r\n".encode())
        self.wfile.write(data)
        if self.server.stays:
            self.rfile.read()


class Rtsp(socketserver.StreamRequestHandler):
    """RTSP (RFC 2326) with RTP between its answers, as most cameras can; H.264 by RFC 6184, a NAL unit a packet."""

    server: Camera

    def handle(self) -> None:
        while lines := list(iter(lambda: self.rfile.readline().decode().strip(), "")):
            method, headers = lines[0].split()[0], dict(line.split(": ", 1) for line in lines[1:])
            status, answer, body = "200 OK", {"CSeq": headers["CSeq"], "Session": "1"}, ""
            if method == "DESCRIBE":
                body = SDP
                answer["Content-Type"] = "application/sdp"
            elif method == "SETUP" and "TCP" in headers["Transport"]:
                answer["Transport"] = "RTP/AVP/TCP;unicast;interleaved=0-1"
            elif method == "SETUP":
                status = "461 Unsupported transport"
            answer["Content-Length"] = str(len(body))
            head = "".join(f"{name}: {value}\r\n" for name, value in answer.items())
            self.wfile.write(f"RTSP/1.0 {status}\r\n{head}\r\n{body}".encode())
            if method == "PLAY":
                for packet in rtp_packets(self.server.next_film()):
                    self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                if self.server.stays:
                    self.rfile.read()
                return


def rtp_packets(film: Path) -> Iterator[bytes]:
    """The NAL units of a film's pictures, in order of decoding, with an RTP header each."""
    number = 0
    with av.open(str(film)) as container:
        for packet in container.demux(video=0):
            units = [unit for unit in re.split(b"\0\0\0?\1", bytes(packet)) if unit]
            for unit in units:
                last = unit is units[-1]
                yield struct.pack(">BBHII", 0x80, 96 | last << 7, number % 2**16, packet.pts % 2**32, 7) + unit
                number += 1


@contextmanager
def serving(camera: Camera) -> Iterator[int]:
    """The camera's port, as long as it is there."""
    thread = threading.Thread(target=camera.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield camera.server_address[1]
    finally:
        camera.shutdown()
        camera.server_close()
        thread.join()
