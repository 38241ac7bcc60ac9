"""A replica's process for tests: starting it, talking to its socket, pushing weights into it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from slipstream.serving import wire
from slipstream.weights.buckets import specs_of
from slipstream.weights.layout import layout
from slipstream.weights.transports.shared_memory import Writer

START_SECONDS = 120
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
OFFSET = 64  # of the layout in a shared file, after the nonce


class ReplicaProcess:
    """A replica that this process started; `log` has its output."""

    def __init__(self, model, folder: Path, **engine):
        self.socket, self.log = folder / "replica.sock", folder / "replica.log"
        settings = {"engine": {"model": str(model)} | ENGINE | engine, "log_level": "warning", "parent": os.getpid()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "slipstream.serving.replica", "--socket", str(self.socket)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.process.stdin.write(json.dumps(settings).encode())
        self.process.stdin.close()
        self.client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://replica", timeout=60
        )
        until(self.socket.exists, START_SECONDS, self)
        self._transactions = iter(range(1, 1000))

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(60)

    def post(self, path, message=None, method="POST"):
        """The answer to a message."""
        headers = {"content-type": wire.MSGPACK}
        return self.client.request(
            method, path, content=b"" if message is None else wire.encode(message), headers=headers
        )

    def info(self):
        return msgspec.msgpack.decode(self.post("/info", method="GET").content, type=wire.ReplicaReport)

    @contextmanager
    def streaming(self, message):
        """Frames of an answer as they come."""
        headers = {"content-type": wire.MSGPACK}
        with self.client.stream("POST", "/generate", content=wire.encode(message), headers=headers) as answer:
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code} {answer.read()!r}")
            reader = wire.FrameReader()

            def frames():
                for piece in answer.iter_raw():
                    yield from reader.feed(piece)
                reader.finish()

            yield frames()

    def generate(self, *prompts, version=None, **sampling):
        """The completions of each prompt (`PromptMessage`), in order."""
        message = wire.GenerateMessage(
            prompts=list(prompts), sampling=wire.SamplingMessage(**sampling), version=version
        )
        with self.streaming(message) as frames:
            return completions(message, frames)

    def begin(self, version, specs, path="", transport="shared_memory", mode="keep"):
        """Begin an update; returns its transaction and the answer."""
        begin = wire.BeginMessage(version=version, tensors=specs, transport=transport, mode=mode)
        transaction = next(self._transactions)
        message = wire.ReplicaBegin(transaction=transaction, update="an update", begin=begin, path=path, offset=OFFSET)
        return transaction, self.post("/weights/begin", message)

    def push(self, version, tensors, mode="keep", spoil=None):
        """Push `tensors` (name, tensor) through shared memory; the commit's answer. `spoil` changes the checksums."""
        tensors = list(tensors)
        specs = specs_of(tensors, "float32")
        with shared_file(specs) as (path, nonce):
            transaction, answer = self.begin(version, specs, path, mode=mode)
            assert answer.status_code == 200, answer.text
            with Writer(path, nonce, OFFSET, specs) as writer:
                checksums = writer.write(tensors)
            if spoil is not None:
                checksums = spoil(checksums)
            return self.post("/weights/commit", wire.CommitMessage(transaction=transaction, checksums=checksums))


@contextmanager
def shared_file(specs):
    """A file in shared memory as the server makes it: its path and its nonce."""
    path, nonce = f"/dev/shm/slipstream-test-{secrets.token_hex(8)}", secrets.token_bytes(32)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(file, OFFSET + layout(specs)[1])
        os.pwrite(file, nonce, 0)
        yield path, nonce
    finally:
        os.close(file)
        os.unlink(path)


def prompt(ids, **options):
    return wire.PromptMessage(ids=wire.pack_ids(ids), **options)


def completions(message, frames):
    """Completions out of frames: one list a prompt."""
    found = {(f.prompt, f.sample): f.completion for f in frames if isinstance(f, wire.CompletionFrame)}
    return [[found[i, sample] for sample in range(p.n)] for i, p in enumerate(message.prompts)]


def until(true, seconds, replica=None):
    """Wait until `true()`; its value."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        output = replica.log.read_text(errors="replace")[-3000:] if replica else ""
        assert replica is None or replica.process.poll() is None, f"the replica ended:\n{output}"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{output}"
        time.sleep(0.02)
    return value
