"""Calls to a server, as a client makes them."""

from __future__ import annotations

import httpx
import servers
import torch
from transformers import AutoModelForCausalLM

from slipstream.serving import wire
from slipstream.serving.wire import TensorSpec
from slipstream.weights.buckets import Packer
from slipstream.weights.layout import layout
from slipstream.weights.transports.shared_memory import Writer

# Making a client takes longer than most calls. Connections are not kept: servers come and go.
CLIENT = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
LONG = {"ignore_eos": True}  # completions of exactly max_tokens tokens


def call(server, method, path, message=None, kind=None, **options):
    """The answer as a `kind`, or the response itself if it is an error or `kind` is None.

    Raises:
        AssertionError: the server is gone, or going; its output is the message.
    """
    headers = {**server.headers, "content-type": wire.MSGPACK, "accept": wire.MSGPACK}
    content = wire.encode(message) if message is not None else options.pop("content", None)
    try:
        answer = CLIENT.request(method, server.url + path, content=content, headers=headers, **options)
    except httpx.TransportError as error:
        raise AssertionError(f"{method} {path}: {error!r}; {servers.account(server)}") from error
    return answer if kind is None or answer.status_code != 200 else wire.decode(answer.content, kind)


def request(prompts, n=1, seed=0, max_tokens=16, version=None, **sampling):
    """A message that asks for `n` completions of each list of ids; `extra` holds vLLM's own options."""
    return wire.GenerateMessage(
        prompts=[
            wire.PromptMessage(ids=ids, n=n, seed=None if seed is None else seed + 1000 * i)
            for i, ids in enumerate(prompts)
        ],
        sampling=wire.SamplingMessage(max_tokens=max_tokens, **sampling),
        version=version,
    )


def frames_of(content):
    """All frames of a whole answer."""
    reader = wire.FrameReader()
    frames = list(reader.feed(content))
    reader.finish()
    return frames


def generate(server, message):
    """Completions by (prompt, sample)."""
    answer = call(server, "POST", "/generate", message)
    assert answer.status_code == 200, answer.text
    frames = [frame for frame in frames_of(answer.content) if isinstance(frame, wire.CompletionFrame)]
    found = {(frame.prompt, frame.sample): frame.completion for frame in frames}
    assert len(found) == len(frames)
    return found


def weights(model, seed, scale=0.05):
    """A model whose weights differ from those in the folder `model`, and its tensors without tied ones."""
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return made, [(name, parameter.detach()) for name, parameter in made.named_parameters()]


def specs_of(tensors):
    return [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in tensors]


def begin(server, version, tensors, transport="shared_memory", mode="keep"):
    message = wire.BeginMessage(version=version, tensors=specs_of(tensors), transport=transport, mode=mode)
    return call(server, "POST", "/weights/begin", message, wire.BeginReply)


def commit(server, transaction, checksums):
    message = wire.CommitMessage(transaction=transaction, checksums=checksums)
    return call(server, "POST", "/weights/commit", message, wire.CommitReply)


def abort(server, transaction):
    return call(server, "POST", "/weights/abort", wire.AbortMessage(transaction=transaction)).json()


def write(reply, tensors):
    """Write through shared memory; the checksums."""
    with Writer(reply.path, reply.nonce, reply.offset, specs_of(tensors)) as writer:
        return writer.write(tensors)


def push(server, version, tensors):
    reply = begin(server, version, tensors)
    return commit(server, reply.transaction, write(reply, tensors))


def put(server, transaction, tensors, size=1 << 16):
    """Send through HTTP bodies; the checksums."""
    total = layout(specs_of(tensors))[1]
    packer = Packer(specs_of(tensors), tensors, size, lambda index: torch.empty(size, dtype=torch.uint8))
    for index, bucket in enumerate(packer):
        assert index * size + len(bucket) <= total
        answer = call(
            server, "PUT", f"/weights/body?transaction={transaction}&offset={index * size}",
            content=bucket.numpy().tobytes(),
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
    return packer.totals()


def info(server):
    return call(server, "GET", "/server_info", None, wire.ServerInfo)


@torch.no_grad()
def greedy(model, prompt, tokens):
    """The `tokens` most likely tokens after `prompt`, by transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=[]
    )
    return out[0, len(prompt) :].tolist()
