"""A real server with one replica: completions, limits, weight transactions, OpenAI routes, many requests."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from pathlib import Path

import aiohttp
import calls
import httpx
import msgspec
import psutil
import pytest
import servers
from calls import LONG, call, generate, request

from slipstream.serving import wire

PROMPTS = [[10 + i, 20, 30, 40] for i in range(4)]


class TestGenerate:
    def test_completions_come_with_what_they_are(self, server):
        found = generate(server, request(PROMPTS, n=3, max_tokens=8))
        assert set(found) == {(p, s) for p in range(4) for s in range(3)}
        serving = calls.info(server).version
        for completion in found.values():
            assert len(completion.logprobs) == len(completion.ids) <= 8
            assert completion.weight_version == serving
            assert (completion.finish_reason == "length") == (len(completion.ids) == 8 and completion.ids[-1] != 1)
        assert generate(server, request(PROMPTS, n=3, max_tokens=8)) == found  # the seeds make them
        assert generate(server, request(PROMPTS, n=3, seed=7, max_tokens=8)) != found

    def test_each_sample_has_its_seed(self, server):
        together = generate(server, request(PROMPTS[:1], n=4, seed=50))
        alone = [generate(server, request(PROMPTS[:1], seed=50 + i))[0, 0].ids for i in range(4)]
        assert [together[0, i].ids for i in range(4)] == alone

    def test_a_prompt_may_have_a_limit_of_its_own(self, server):
        message = request(PROMPTS[:2], max_tokens=8)
        whole = generate(server, message)
        message.prompts[0].max_tokens = 2
        limited = generate(server, message)
        assert limited[0, 0].ids == whole[0, 0].ids[:2]
        assert limited[1, 0] == whole[1, 0]
        message.sampling.extra = {"min_tokens": 5}
        assert len(generate(server, message)[0, 0].ids) == 2
        message.sampling.extra = {}
        message.prompts[0].max_tokens = 0
        refused = call(server, "POST", "/generate", message)
        assert refused.status_code == 400
        assert "prompts[0].max_tokens=0" in refused.text

    def test_json_is_as_good(self, server):
        body = {"prompts": [{"ids": PROMPTS[0], "seed": 3}], "sampling": {"max_tokens": 8, "logprobs": False}}
        answer = calls.CLIENT.post(f"{server.url}/generate", json=body, headers=server.headers)
        assert answer.headers["content-type"] == wire.FRAMES
        [frame] = calls.frames_of(answer.content)
        assert frame.completion.logprobs is None
        assert frame.completion.ids == generate(server, request(PROMPTS[:1], seed=3, max_tokens=8))[0, 0].ids

    def test_text_and_messages_come_back_as_ids(self, server):
        message = request([], max_tokens=4)
        message.prompts = [
            wire.PromptMessage(text="1+1="), wire.PromptMessage(ids=[9, 9]),
            wire.PromptMessage(messages=[{"role": "user", "content": "hi"}]),
        ]  # fmt: skip
        frames = calls.frames_of(call(server, "POST", "/generate", message).content)
        prompts = {frame.prompt: frame.ids for frame in frames if isinstance(frame, wire.PromptFrame)}
        assert set(prompts) == {0, 2}
        assert len(prompts[0]) == 4
        assert len(prompts[2]) == 5  # <user>hi<end><assistant>

    def test_text_that_cannot_fit_is_refused_without_reading_it(self, server):
        """A tokenizer takes seconds for megabytes, in which nobody else would be answered."""
        text = "1+2=3 " * 1_000_000
        for prompt, where in (
            (wire.PromptMessage(text=text), "prompt 1 has 6000000 characters"),
            (wire.PromptMessage(messages=[{"role": "user", "content": text}]), "prompt 1 has 6000004 characters"),
        ):
            message = request(PROMPTS[:1], max_tokens=4)
            message.prompts.append(prompt)
            answer = call(server, "POST", "/generate", message)
            assert (answer.status_code, where in answer.json()["detail"]) == (400, True), answer.text
            assert "max_model_len=256 tokens" in answer.json()["detail"]
        message.prompts[1:] = [wire.PromptMessage(text="1" * 2000)]  # might fit, and does not
        answer = call(server, "POST", "/generate", message)
        assert (answer.status_code, "prompt 1 has 2000 tokens" in answer.json()["detail"]) == (400, True), answer.text
        message.prompts[1:] = [wire.PromptMessage(text=text, n=50)]
        answer = call(server, "POST", "/generate", message)
        assert (answer.status_code, "tokens are asked for" in answer.json()["detail"]) == (413, True), answer.text
        assert len(generate(server, request(PROMPTS, max_tokens=4))) == 4

    def test_completions_come_as_they_finish(self, server):
        message = request(PROMPTS, max_tokens=4, extra=LONG)
        message.prompts[0].ids = PROMPTS[0]
        slow = msgspec.structs.replace(message, sampling=wire.SamplingMessage(max_tokens=200, extra=LONG))
        headers = {**server.headers, "content-type": wire.MSGPACK}
        with calls.CLIENT.stream(
            "POST", f"{server.url}/generate", content=wire.encode(slow), headers=headers
        ) as answer:
            assert answer.status_code == 200
            began = time.perf_counter()
            # Another call is answered while this one runs.
            assert len(generate(server, message)) == 4
            quick = time.perf_counter() - began
            rest = b"".join(answer.iter_raw())
        assert len(calls.frames_of(rest)) == 4
        assert quick < time.perf_counter() - began

    def test_who_goes_away_is_not_worked_for(self, server):
        slow = request(PROMPTS, n=2000, max_tokens=250, extra=LONG)  # takes longer than is waited for
        headers = {**server.headers, "content-type": wire.MSGPACK}
        with calls.CLIENT.stream(
            "POST", f"{server.url}/generate", content=wire.encode(slow), headers=headers
        ) as answer:
            assert answer.status_code == 200
            assert calls.info(server).replicas[0].running > 0
        servers.until(lambda: calls.info(server).replicas[0].running == 0, 30, server)

    @pytest.mark.parametrize(
        ("change", "status", "reason"),
        [
            ({"version": 77}, 409, "version 77 of the weights is asked for, but version"),
            ({"prompts": [{"ids": [5] * 250}], "sampling": {"max_tokens": 16}}, 400, "prompt 0 has 250 tokens"),
            ({"prompts": [{"ids": [5]}, {"ids": [200]}]}, 400, "prompt 1 has the token id 200"),
            ({"prompts": [{"ids": [5], "text": "a"}]}, 400, "prompts[0]: give one of ids, text and messages"),
            ({"prompts": [{"ids": []}]}, 400, "prompts[0].ids is empty"),
            ({"prompts": [{"ids": [-1]}]}, 400, "prompts[0].ids: token ids are from 0"),
            ({"prompts": [{"ids": [2**40]}]}, 400, "prompts[0].ids: token ids are from 0"),
            ({"prompts": [{"ids": [5], "n": 0}]}, 400, "prompts[0].n=0 is not allowed"),
            ({"prompts": [{"ids": [5], "n": 65_537}]}, 413, "65537 completions are asked for in one request"),
            ({"prompts": [{"ids": [5]}] * 16_385}, 413, "16385 prompts are asked for"),
            ({"sampling": {"max_tokens": 2**40}}, 413, "tokens are asked for in one request"),
            ({"sampling": {"temperature": -1.0}}, 400, "sampling.temperature=-1.0 is not allowed"),
            ({"sampling": {"extra": {"best": 1}}}, 400, "no option 'best'"),
            ({"sampling": {"extra": {"min_tokens": 10**30}}}, 400, "can't serialize ints"),
            ({"prompts": [{"messages": [{"role": "user", "content": 10**30}]}]}, 400, "can't serialize ints"),
            ({"verion": 1}, 400, "unknown field `verion`"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_told(self, server, change, status, reason):
        body = {"prompts": [{"ids": [5]}], "sampling": {"max_tokens": 4}} | change
        answer = calls.CLIENT.post(f"{server.url}/generate", json=body, headers=server.headers)
        assert answer.status_code == status
        assert reason in answer.json()["detail"]

    @pytest.mark.parametrize("extra", [{"min_tokens": None}, {"stop": 5}, {"stop_token_ids": 5}, {"logit_bias": [1]}])
    def test_vllms_own_options_of_a_wrong_type_are_refused(self, server, extra):
        answer = call(server, "POST", "/generate", request(PROMPTS, extra=extra))
        assert answer.status_code == 400, answer.text
        assert next(iter(extra)) in answer.json()["detail"]

    def test_numbers_that_are_not_finite_are_refused_wherever_they_are(self, server):
        answer = call(server, "POST", "/generate", request(PROMPTS, extra={"logit_bias": {5: float("nan")}}))
        assert answer.status_code == 400
        assert "sampling.extra: 'logit_bias' has a number that is not finite" in answer.json()["detail"]

    def test_the_body_has_a_limit(self, tiny_model):
        server = servers.start_server(tiny_model, "--max-body-size", 1, wait=False)
        try:
            big = b"x" * (1 << 20) + b"x"
            for path in ("/generate", "/weights/begin", "/communicator/store", "/v1/completions"):
                answer = calls.CLIENT.post(server.url + path, content=big, headers=server.headers)
                assert answer.status_code == 413, path
                assert "more than 1048576 bytes" in answer.json()["detail"]
            in_pieces = calls.CLIENT.post(
                f"{server.url}/generate", content=iter([big[:-9], big[-9:]]), headers=server.headers
            )
            assert in_pieces.status_code == 413
        finally:
            server.stop()


class TestWeights:
    def test_a_push_through_shared_memory(self, server, tiny_model):
        model, tensors = calls.weights(tiny_model, 1)
        reply = calls.push(server, 5, tensors)
        assert reply.version == 5
        assert 0 < reply.paused_seconds < 60
        assert calls.info(server).version == 5
        [completion] = generate(server, request(PROMPTS[:1], temperature=0.0, version=5, extra=LONG)).values()
        assert completion.ids == calls.greedy(model, PROMPTS[0], 16)
        assert completion.weight_version == 5

    def test_a_push_through_http(self, server, tiny_model):
        model, tensors = calls.weights(tiny_model, 2)
        reply = calls.begin(server, 6, tensors, "body")
        assert (reply.path, reply.nonce) == ("", b"")
        assert calls.commit(server, reply.transaction, calls.put(server, reply.transaction, tensors)).version == 6
        [completion] = generate(server, request(PROMPTS[:1], temperature=0.0, version=6, extra=LONG)).values()
        assert completion.ids == calls.greedy(model, PROMPTS[0], 16)

    def test_the_file_is_the_users_alone_and_used_again(self, server, tiny_model):
        _, tensors = calls.weights(tiny_model, 3)
        paths, nonces = set(), set()
        for version in (7, 8):
            reply = calls.begin(server, version, tensors)
            path = Path(reply.path)
            assert path.parent == Path("/dev/shm")
            assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o600, os.getuid())
            calls.commit(server, reply.transaction, calls.write(reply, tensors))
            paths.add(path)
            nonces.add(reply.nonce)
        assert (len(paths), len(nonces)) == (1, 2)

    def test_what_does_not_arrive_whole_changes_nothing(self, server, tiny_model):
        model, tensors = calls.weights(tiny_model, 4)
        calls.push(server, 9, tensors)
        _, others = calls.weights(tiny_model, 5)
        reply = calls.begin(server, 10, others)
        sums = calls.write(reply, others)
        sums[3] += 1
        refused = calls.commit(server, reply.transaction, sums)
        assert refused.status_code == 400
        assert "checksum" in refused.json()["detail"]
        assert calls.info(server).transaction is None
        reply = calls.begin(server, 10, others)
        calls.write(reply, others)
        assert calls.abort(server, reply.transaction) == {"aborted": True}
        assert calls.abort(server, reply.transaction) == {"aborted": False}
        late = calls.commit(server, reply.transaction, sums)
        assert late.status_code == 409
        assert f"transaction {reply.transaction} is not open" in late.json()["detail"]
        [completion] = generate(server, request(PROMPTS[:1], temperature=0.0, version=9, extra=LONG)).values()
        assert completion.ids == calls.greedy(model, PROMPTS[0], 16)

    def test_what_does_not_fit_is_refused_before_a_byte_moves(self, server, tiny_model):
        before = calls.info(server)
        _, tensors = calls.weights(tiny_model, 6)
        for wrong, reason in (
            (tensors[:-1], "missing"), ([*tensors, ("what", tensors[0][1])], "what"),
            ([(name, t[:1]) for name, t in tensors], "cannot take"),
        ):  # fmt: skip
            answer = calls.begin(server, 11, wrong)
            assert answer.status_code == 400
            assert reason in answer.json()["detail"]
        for change, reason in (
            ({"transport": "carrier"}, "transport='carrier' is not one of"), ({"mode": "abort"}, "mode='abort'"),
            ({"version": -1}, "version=-1"), ({"tensors": [wire.TensorSpec("a", "float8", (1,))]}, "dtype 'float8'"),
            ({"tensors": [wire.TensorSpec("a", "float32", (-1,))]}, "negative"),
            ({"tensors": [wire.TensorSpec("a", "float32", (2**62, 2**62))]}, "too large"),
            ({"tensors": [wire.TensorSpec("a", "float32", (0, 2**63))]}, "too large"),
            ({"transport": "group"}, "needs a process group"),
        ):  # fmt: skip
            message = msgspec.structs.replace(wire.BeginMessage(version=11, tensors=calls.specs_of(tensors)), **change)
            answer = call(server, "POST", "/weights/begin", message)
            assert answer.status_code in (400, 409)
            assert reason in answer.json()["detail"]
        assert calls.info(server) == before

    def test_a_body_goes_where_it_was_announced(self, server, tiny_model):
        _, tensors = calls.weights(tiny_model, 7)
        shared = calls.begin(server, 12, tensors)
        path = f"/weights/body?transaction={shared.transaction}&offset=0"
        assert call(server, "PUT", path, content=b"x").status_code == 409
        calls.abort(server, shared.transaction)
        reply = calls.begin(server, 12, tensors, "body")
        for query, status in (
            (f"transaction={reply.transaction}&offset=999999999", 400),
            (f"transaction={reply.transaction}&offset=-1", 400),
            (f"transaction={reply.transaction}", 400), ("transaction=99999&offset=0", 409), ("", 400),
            (f"transaction={reply.transaction}&offset={'9' * 5000}", 400),
        ):  # fmt: skip
            assert call(server, "PUT", f"/weights/body?{query}", content=b"x").status_code == status, query
        calls.abort(server, reply.transaction)

    def test_an_update_under_way_is_not_pushed_aside(self, server, tiny_model):
        """A silent one is, see tests/faults."""
        _, tensors = calls.weights(tiny_model, 8)
        first = calls.begin(server, 13, tensors)
        refused = calls.begin(server, 14, tensors)
        assert refused.status_code == 423
        assert f"transaction {first.transaction}, last heard of" in refused.json()["detail"]
        assert calls.commit(server, first.transaction, calls.write(first, tensors)).version == 13

    @pytest.mark.parametrize("mode", ["keep", "wait"])
    def test_requests_that_run_meanwhile_know_their_weights(self, server, tiny_model, mode):
        _, tensors = calls.weights(tiny_model, 9)
        message = request(PROMPTS, n=8, max_tokens=200, extra=LONG)
        headers = {**server.headers, "content-type": wire.MSGPACK}
        for _ in range(5):  # on a busy machine there may be no token yet when the new weights come
            version = calls.info(server).version
            reply = calls.begin(server, version + 1, tensors, mode=mode)
            sums = calls.write(reply, tensors)
            with calls.CLIENT.stream(
                "POST", f"{server.url}/generate", content=wire.encode(message), headers=headers
            ) as answer:
                assert calls.commit(server, reply.transaction, sums).version == version + 1
                found = [frame.completion for frame in calls.frames_of(b"".join(answer.iter_raw()))]
            assert [len(completion.ids) for completion in found] == [200] * 32
            served = {tuple(v for _, v in c.version_runs or ((0, c.weight_version),)) for c in found}
            if (version + 1,) not in served:
                break
        expected = (version,) if mode == "wait" else (version, version + 1)
        assert served <= {expected, expected[:1]}


class TestOpenAI:
    def test_its_client_talks_to_us(self, server, tiny_model):
        from openai import AuthenticationError, OpenAI

        client = OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
        assert [model.id for model in client.models.list()] == [str(tiny_model)]
        done = client.completions.create(model=str(tiny_model), prompt="1+1=", max_tokens=5, temperature=0)
        assert done.usage.completion_tokens <= 5
        chat = client.chat.completions.create(
            model=str(tiny_model), messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0
        )
        assert chat.choices[0].message.role == "assistant"
        parts = client.completions.create(
            model=str(tiny_model), prompt="1+1=", max_tokens=5, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()

    def test_its_errors_come_through(self, server):
        answer = calls.CLIENT.post(f"{server.url}/v1/completions", json={"model": "other"}, headers=server.headers)
        assert answer.status_code in (400, 404, 422)
        assert calls.CLIENT.get(f"{server.url}/v1/nothing", headers=server.headers).status_code == 404

    @pytest.mark.parametrize(
        ("path", "body", "status", "reason"),
        [
            ("completions", {"prompt": [[5]] * 16_385, "max_tokens": 1}, 413, "at most 16384 (--max-prompts)"),
            ("completions", {"prompt": ["5"] * 9, "n": 8000, "max_tokens": 1}, 413, "72000 completions are asked for"),
            ("completions", {"prompt": [5] * 9, "n": "70000", "max_tokens": 1}, 413, "70000 completions are asked for"),
            ("completions", {"prompt": [5] * 200, "n": 2, "max_tokens": 2**28}, 413, "536871312 tokens are asked for"),
            ("completions", {"prompt": "5" * 5000, "n": 60_000}, 413, "315360000 tokens are asked for"),
            (
                "chat/completions", {"messages": [{"role": "user", "content": "5" * 5000}], "n": 60_000}, 413,
                "315600000 tokens are asked for",
            ),
            (
                "chat/completions", {"messages": [{"role": "user", "content": "5"}], "max_completion_tokens": 2**29},
                413, "tokens are asked for",
            ),
            ("completions", {"prompt": "5", "n": " 2"}, 400, "Expected `int | null`"),
            ("completions", {"prompt": "5", "n": 2.5}, 400, "Expected `int | null`"),
        ],
    )  # fmt: skip
    def test_it_takes_no_more_than_our_own_routes(self, server, path, body, status, reason):
        """vLLM makes a request of each completion before it does anything else, and would fill the memory with them."""
        answer = calls.CLIENT.post(f"{server.url}/v1/{path}", json=body, headers=server.headers)
        assert answer.status_code == status
        assert reason in answer.json()["detail"]

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": ' + b"[" * 100_000])
    def test_what_cannot_be_read_is_refused(self, server, body):
        headers = {**server.headers, "content-type": "application/json"}
        for path in ("completions", "chat/completions"):
            answer = calls.CLIENT.post(f"{server.url}/v1/{path}", content=body, headers=headers)
            assert answer.status_code == 400
            assert answer.json()["detail"]


class TestMany:
    def test_calls_beyond_the_servers_files_are_refused_and_the_others_answered(self, server):
        """Each takes two: the client's connection and one to the replica. Some are left for those who come then."""
        [replica], process = server.replicas(), psutil.Process(server.process.pid)
        completion = {"model": calls.info(server).model, "prompt": [5, 7], "max_tokens": 2, "ignore_eos": True}
        ours = {"prompts": [{"ids": [5, 7]}], "sampling": {"max_tokens": 2, "extra": LONG}}

        async def run():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=server.url, headers=server.headers, limits=limits, timeout=120
            ) as client:

                def ask(count):
                    # Which of the routes comes first is chance, on a busy machine for all of the answers.
                    both = (("/generate", ours), ("/v1/completions", completion)) * (count // 2)
                    return [asyncio.create_task(client.post(path, json=body)) for path, body in both]

                # One that is refused tells that the files are taken. The 60 have 108 of 160 then, at most: two each if
                # they were let in, one while they wait for an answer. That leaves one for each who comes now.
                asked = ask(60)
                assert (await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED))[0]
                more = ask(48)
                assert (await asyncio.wait(more, timeout=60, return_when=asyncio.FIRST_COMPLETED))[0]
                replica.resume()
                return await asyncio.gather(*asked, *more)

        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 160, hard))
        replica.suspend()
        try:
            answers = asyncio.run(run())
        finally:
            replica.resume()
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert {answer.status_code for answer in answers} == {200, 503}
        assert all("ulimit -n" in a.json()["detail"] for a in answers if a.status_code == 503)
        assert calls.info(server).replicas[0].state == "ready"
        assert [replica] == server.replicas()
        assert len(generate(server, request(PROMPTS, max_tokens=4))) == 4

    def test_ten_thousand_completions_in_one_call(self, server):
        found = generate(server, request(PROMPTS * 25, n=100, max_tokens=2))
        assert len(found) == 10_000
        assert all(1 <= len(completion.ids) <= 2 for completion in found.values())

    @pytest.mark.slow
    def test_ten_thousand_calls_at_the_same_time(self, server):
        """Each is answered, or refused with a reason: the server may have as many files as the operator has allowed."""

        headers = {**server.headers, "content-type": wire.MSGPACK}

        async def ask(session, index):
            body = wire.encode(request([[5 + index % 90, 7]], seed=index, max_tokens=1))
            async with session.post(f"{server.url}/generate", data=body, headers=headers) as answer:
                return answer.status, await answer.read()

        async def run():
            connector = aiohttp.TCPConnector(limit=0)
            async with asyncio.timeout(240), aiohttp.ClientSession(connector=connector) as session:
                return await asyncio.gather(*(ask(session, index) for index in range(10_000)))

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            ended = asyncio.run(run())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reasons = [json.loads(content)["detail"] for status, content in ended if status == 503]
        assert all("ulimit -n" in reason for reason in reasons)
        answered = [calls.frames_of(content) for status, content in ended if status == 200]
        assert len(answered) + len(reasons) == 10_000
        assert len(answered) >= min(10_000, hard // 2 - 100)
        assert all(len(frame.completion.ids) == 1 for [frame] in answered)
        report = calls.info(server).replicas[0]
        assert (report.state, report.running) == ("ready", 0)
        assert len(generate(server, request(PROMPTS, max_tokens=4))) == 4
