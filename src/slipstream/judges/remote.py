"""A judge behind an API like OpenAI's."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slipstream.checks import number
from slipstream.judges.base import FAILED, BasePairwiseJudge, Text, as_text

OPENAI = "https://api.openai.com/v1"
SYSTEM_PROMPT = """\
Two assistants were given the same input. Decide which of their answers serves the person who asked better: correct \
first, then helpful and clear. Neither the order of the answers nor their length is a reason.

<input>
{prompt}
</input>

<answer_0>
{response0}
</answer_0>

<answer_1>
{response1}
</answer_1>

Reply with one character and nothing else: 0 if answer 0 is better, 1 if answer 1 is better."""
# It will not answer otherwise next time: the address, the key or the model's name is wrong.
MISCONFIGURED = (401, 403, 404)
RETRIES = 2


class Failure(Exception):
    """A judgement that did not come about; the message is its reason."""


class OpenAIPairwiseJudge(BasePairwiseJudge):
    """Asks a language model which completion is better, through `/chat/completions` of OpenAI or of any server that
    speaks its protocol (`vllm serve` does).

    An answer other than 0 or 1, an error of the service that two retries did not mend, or no answer in time is a failed
    judgement: -1, and its reason is in `take_failures`, which trainers log. Each process of a run asks for itself.
    Needs the `openai` package.

    Args:
        model: Name of the model.
        system_prompt: What is asked: a text with {prompt}, {response0} and {response1}, other braces doubled; the
            answer must be 0 or 1. None: a question of ours.
        max_requests: Judgements asked for in the life of the judge, at most, so that a bill has a limit: a call that
            would go beyond it is an error, which ends a run. Each process counts its own. None: no limit.
        base_url: Where the API is; None: the environment's OPENAI_BASE_URL, else OpenAI.
        api_key: None: the environment's OPENAI_API_KEY; a server elsewhere may need none.
        concurrency: Requests at the same time, at most.
        timeout: Seconds that one judgement may take, retries included.
        batch_timeout: Seconds that one call of `judge` may take; what is not judged by then has failed.
        both_orders: Let trainers ask about each pair twice, in either order; costs twice as much.
        seed: Of the order in which completions are shown. The same pair is always shown in the same order.
        request_options: Further fields of each request; None: {"temperature": 0.0}, which some models do not take.

    Raises:
        ValueError: a value is out of range, the key is missing, or `system_prompt` lacks one of its fields.
        ImportError: the `openai` package is not installed.
    """

    def __init__(
        self,
        model: str = "gpt-4o-mini",
        system_prompt: str | None = None,
        max_requests: int | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        batch_timeout: float = 300.0,
        both_orders: bool = False,
        seed: int = 0,
        request_options: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ImportError("OpenAIPairwiseJudge needs the openai package: pip install openai")
        self.model = model
        self.system_prompt = SYSTEM_PROMPT if system_prompt is None else system_prompt
        _check_template(self.system_prompt)
        if max_requests is not None:
            number("max_requests", max_requests, least=1, integer=True)
        number("concurrency", concurrency, least=1, integer=True)
        number("timeout", timeout, above=0)
        number("batch_timeout", batch_timeout, above=0)
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY")
        if self._api_key is None and self.base_url == OPENAI:
            raise ValueError("api_key=None, and the environment has no OPENAI_API_KEY: set one of them.")
        self.max_requests, self.concurrency = max_requests, concurrency
        self.timeout, self.batch_timeout = timeout, batch_timeout
        self.both_orders = both_orders
        self.seed = seed
        self.request_options = {"temperature": 0.0} if request_options is None else request_options
        self.requests = 0
        self._failures: Counter[str] = Counter()
        self._has_answered = False

    def judge(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], shuffle_order: bool = True
    ) -> list[int]:
        """See `BasePairwiseJudge`.

        Raises:
            RuntimeError: `max_requests` would not be enough (nothing is asked then); or the service refused the key or
                does not know the address or the model (401, 403, 404), and has never answered this judge.
        """
        if self.max_requests is not None and self.requests + len(prompts) > self.max_requests:
            # As failed judgements, a run would go through all its steps without learning anything from them.
            raise RuntimeError(
                f"max_requests={self.max_requests}: {self.requests} have been made, and {len(prompts)} more are asked "
                "for. A run asks once for each pair of training and of evaluation, twice with both_orders=True: raise "
                "it, or leave it None for no limit."
            )
        texts = [
            (as_text(prompt), as_text(first), as_text(second))
            for prompt, (first, second) in zip(prompts, completions, strict=True)
        ]
        swapped = [shuffle_order and self._swaps(*text) for text in texts]
        asked = [
            self.system_prompt.format(prompt=prompt, response0=b if swap else a, response1=a if swap else b)
            for (prompt, a, b), swap in zip(texts, swapped, strict=True)
        ]
        # A loop in a thread of its own: the caller may already have one running (a notebook has).
        with ThreadPoolExecutor(1, thread_name_prefix="judge") as pool:
            answers = pool.submit(asyncio.run, self._ask_all(asked)).result()
        self._failures.update(str(answer) for answer in answers if isinstance(answer, Failure))
        return [
            FAILED if isinstance(answer, Failure) else answer ^ swap
            for answer, swap in zip(answers, swapped, strict=True)
        ]

    def take_failures(self) -> dict[str, int]:
        """How many judgements have failed since this was last asked, by reason."""
        taken, self._failures = dict(self._failures), Counter()
        return taken

    def _swaps(self, prompt: str, first: str, second: str) -> bool:
        # From the pair alone and not from a generator's state: a run that is resumed judges as it would have.
        key = "\0".join((str(self.seed), prompt, first, second)).encode()
        return bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1)

    async def _ask_all(self, questions: list[str]) -> list[int | Failure]:
        import openai

        slots = asyncio.Semaphore(self.concurrency)
        # The package wants some key, and has no deadline that a server could not put off byte by byte: that is ours.
        async with openai.AsyncOpenAI(
            api_key=self._api_key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=RETRIES
        ) as client:

            async def ask(question: str) -> int | Failure:
                try:
                    async with slots:
                        return await self._ask_one(client, question)
                except Failure as failure:
                    return failure

            tasks = [asyncio.create_task(ask(question)) for question in questions]
            late: set[asyncio.Task[int | Failure]] = set()
            if tasks:
                # An exception that is no Failure ends it all.
                _, late = await asyncio.wait(tasks, timeout=self.batch_timeout, return_when=asyncio.FIRST_EXCEPTION)
            for task in late:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        answers: list[int | Failure] = []
        for task, result in zip(tasks, results, strict=True):
            if task in late:
                result = Failure(f"not judged after batch_timeout={self.batch_timeout} seconds")
            elif isinstance(result, BaseException) and not isinstance(result, Failure):
                raise result
            answers.append(result)
        return answers

    async def _ask_one(self, client: Any, question: str) -> int:
        """The answer, 0 or 1."""
        import openai

        self.requests += 1
        messages = [{"role": "user", "content": question}]
        try:
            async with asyncio.timeout(self.timeout):
                answer = await client.chat.completions.create(
                    model=self.model, messages=messages, extra_body=self.request_options
                )
        except (TimeoutError, openai.APITimeoutError):
            raise Failure(f"no answer after timeout={self.timeout} seconds") from None
        except openai.APIStatusError as error:
            if error.status_code in MISCONFIGURED and not self._has_answered:
                raise RuntimeError(
                    f"{self.base_url} answered {error.status_code} for model {self.model!r}: "
                    f"{error.response.text[:200]!r}. Check base_url, api_key and model."
                ) from error
            raise Failure(f"HTTP {error.status_code}") from error
        except openai.APIConnectionError as error:
            raise Failure("no connection") from error
        except (openai.APIError, json.JSONDecodeError) as error:
            raise Failure(f"the answer cannot be read ({type(error).__name__})") from error
        try:
            content = answer.choices[0].message.content
        except (AttributeError, LookupError, TypeError) as error:
            raise Failure("the answer is not a chat completion") from error
        self._has_answered = True
        vote = content.strip() if isinstance(content, str) else content
        if vote not in ("0", "1"):
            raise Failure("the answer is neither 0 nor 1")
        return int(vote)


def _check_template(template: str) -> None:
    fields = {"prompt": "<P>", "response0": "<A>", "response1": "<B>"}
    try:
        text = template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"system_prompt cannot be filled in ({type(error).__name__}: {error}): its fields are {{prompt}}, "
            "{response0} and {response1}, and other braces must be doubled."
        ) from error
    missing = [f"{{{name}}}" for name, value in fields.items() if value not in text]
    if missing:
        raise ValueError(f"system_prompt has no {', '.join(missing)}: the judge would not see it.")
