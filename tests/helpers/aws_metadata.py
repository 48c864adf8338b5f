"""AWS's metadata service on a port of loopback: it describes the machine, to a token alone as IMDSv2 does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loopback_server import QuietHandler, loopback_server

MAC = "02:29:96:8f:6a:2d"
NETWORKS = f"/latest/meta-data/network/interfaces/macs/{MAC}/vpc-ipv4-cidr-blocks"


@contextmanager
def aws_metadata(networks: str) -> Iterator[str]:
    """Host and port of a service that tells of a machine in these networks, one a line."""
    pages: Mapping[str, str] = {"/latest/meta-data/mac": MAC, NETWORKS: networks}

    class Handler(QuietHandler):
        def do_PUT(self) -> None:
            has_age = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit()
            self._reply("a-token" if self.path == "/latest/api/token" and has_age else None)

        def do_GET(self) -> None:
            self._reply(pages.get(self.path) if self.headers.get("X-aws-ec2-metadata-token") == "a-token" else None)

        def _reply(self, text: str | None) -> None:
            content = (text or "").encode()
            self.send_response(404 if text is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with loopback_server(Handler) as address:
        yield address
