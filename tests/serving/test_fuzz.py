"""Whatever is sent to the server, it answers as its description says, and goes on."""

from __future__ import annotations

import contextlib
import re

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)  # fmt: skip

from slipstream.serving import wire

CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
)  # fmt: skip

# An answer that comes in pieces has begun with 200 when vLLM looks at the values; it writes down what it refuses then.
REFUSED_IN_A_STREAM = r"Error in (chat )?completion stream generator\.\n[^\n]*Traceback"
OF_THE_CONNECTION = {"transfer-encoding", "connection", "upgrade"}  # headers: uvicorn answers wrong ones by itself


@pytest.fixture(autouse=True)
def still_there(server):
    """After each test the server answers, with the same replica."""
    [before] = server.replicas()
    yield
    assert [before] == server.replicas()
    answer = CLIENT.post(f"{server.url}/generate", headers=server.headers,
                        json={"prompts": [{"ids": [5]}], "sampling": {"max_tokens": 1}})  # fmt: skip
    assert answer.status_code == 200
    assert "Traceback" not in re.sub(REFUSED_IN_A_STREAM, "", server.output())


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_routes_do_what_they_say(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=server.headers, timeout=60)
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(mode))
        def check(case):
            tried.add(case.operation.label)
            for name in [name for name in case.headers or {} if name.lower() in OF_THE_CONNECTION]:
                del case.headers[name]
            case.call_and_validate(base_url=server.url, headers=server.headers, timeout=60, checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):  # what has no parameters cannot be called wrongly
            check()
    if mode is GenerationMode.POSITIVE:
        assert tried == {
            "GET /health", "GET /server_info", "POST /generate", "POST /reset_prefix_cache", "POST /communicator",
            "DELETE /communicator", "POST /weights/begin", "POST /weights/commit", "POST /weights/abort",
            "POST /weights/progress",
        }  # fmt: skip
    else:
        assert {"POST /generate", "POST /weights/begin"} <= tried


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
ROUTES = {
    "/generate": wire.GenerateMessage, "/weights/begin": wire.BeginMessage, "/weights/commit": wire.CommitMessage,
    "/weights/abort": wire.AbortMessage, "/weights/progress": wire.ProgressMessage,
    "/communicator": wire.CommunicatorMessage,
}  # fmt: skip
NAMES = sorted({name for kind in (*ROUTES.values(), wire.PromptMessage, wire.SamplingMessage, wire.TensorSpec)
                for name in kind.__struct_fields__})  # fmt: skip
NEARLY = st.recursive(
    ANYTHING, lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([*ROUTES, "/communicator/store"]),
    body=st.binary(max_size=200) | NEARLY.map(msgspec.msgpack.encode),
    kind=st.sampled_from([wire.MSGPACK, wire.JSON, "text/plain", "application/x-pickle"]),
)
def test_bodies_of_any_kind_are_refused_with_a_reason(server, path, body, kind):
    answer = CLIENT.post(server.url + path, content=body, headers={**server.headers, "content-type": kind})
    assert answer.status_code in (200, 400, 409), answer.text
    if answer.status_code != 200:
        assert answer.json()["detail"]


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(-1, 300), "temperature": st.floats(), "top_p": st.floats(),
        "top_k": st.integers(-2, 2**40),
        "min_p": st.floats(), "repetition_penalty": st.floats(0, 1e308), "logprobs": st.booleans(),
        "regex": st.sampled_from(["a+", "(", "[0-9]{2}", ""]),
        "extra": st.dictionaries(
            st.sampled_from(["stop", "bad_words", "min_tokens", "logit_bias", "stop_token_ids", "allowed_token_ids",
                             "presence_penalty", "n", "output_kind", "logprobs", "structured_outputs", "ignore_eos"]),
            ANYTHING, max_size=2,
        ),
    },
)  # fmt: skip
PROMPT = st.fixed_dictionaries(
    {},
    optional={
        "ids": st.lists(st.integers(-2, 130), max_size=5) | st.binary(max_size=9), "text": st.text(max_size=9),
        "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), ANYTHING), max_size=2),
        "n": st.integers(-1, 3), "seed": st.integers(-1, 2**64 - 1), "mixture": st.floats(),
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(sampling=SAMPLING, prompts=st.lists(PROMPT, max_size=3))
def test_nearly_right_requests_are_served_or_refused(server, sampling, prompts):
    body = msgspec.msgpack.encode({"prompts": prompts, "sampling": sampling})
    answer = CLIENT.post(
        f"{server.url}/generate", content=body, headers={**server.headers, "content-type": wire.MSGPACK}
    )
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        reader = wire.FrameReader()
        list(reader.feed(answer.content))
        reader.finish()


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"prompts":' + b"[" * 100_000, b"\x91" * 200_000, b'{"a":' * 100_000]
)
@pytest.mark.parametrize("kind", [wire.JSON, wire.MSGPACK])
def test_deep_nesting_is_refused(server, body, kind):
    for path in (*ROUTES, "/communicator/store"):
        answer = CLIENT.post(server.url + path, content=body, headers={**server.headers, "content-type": kind})
        assert answer.status_code == 400


OPENAI = {
    "prompt": st.lists(st.integers(-2, 130), max_size=5) | st.text(max_size=9) | ANYTHING,
    "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), ANYTHING), max_size=2) | ANYTHING,
    "model": ANYTHING, "n": st.integers(-1, 3) | ANYTHING, "max_tokens": st.integers(-1, 300) | ANYTHING,
    "max_completion_tokens": st.integers(-1, 20), "temperature": st.floats(-1, 3) | ANYTHING,
    "logprobs": st.integers(-2, 30) | ANYTHING, "top_logprobs": st.integers(-2, 30), "stop": ANYTHING,
    "seed": st.integers(-(2**70), 2**70), "stream": st.booleans(), "echo": st.booleans(),
    "logit_bias": st.dictionaries(st.text(max_size=3), ANYTHING, max_size=2), "stop_token_ids": ANYTHING,
    "prompt_logprobs": st.integers(-2, 30), "response_format": ANYTHING, "tools": ANYTHING,
    "structured_outputs": ANYTHING | st.dictionaries(
        st.sampled_from(["regex", "json", "choice", "grammar", "structural_tag"]), ANYTHING, max_size=2
    ),
    "chat_template_kwargs": ANYTHING,
}  # fmt: skip


RIGHT = {"prompt": [5], "messages": [{"role": "user", "content": "1"}], "max_tokens": 2}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["completions", "chat/completions"]), right=st.booleans(),
    body=st.fixed_dictionaries({}, optional=OPENAI),
)  # fmt: skip
def test_openai_bodies_are_served_or_refused(server, path, right, body):
    try:
        content = msgspec.json.encode(body | RIGHT if right else body)
    except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError):  # what JSON cannot carry
        reject()
    headers = {**server.headers, "content-type": "application/json"}
    answer = CLIENT.post(f"{server.url}/v1/{path}", content=content, headers=headers)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_refused_when_the_answer_has_begun_is_in_it(server, path):
    body = RIGHT | {"stream": True, "logprobs": 30 if path == "completions" else True}
    if path == "chat/completions":
        body["top_logprobs"] = 30
    answer = CLIENT.post(f"{server.url}/v1/{path}", json=body, headers=server.headers)
    assert answer.status_code in (200, 400)
    assert "greater than max allowed: 20" in answer.text, answer.text
