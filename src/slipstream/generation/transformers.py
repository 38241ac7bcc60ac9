"""Generation with the trainer's own model: no second copy of the weights, no vLLM, and a fraction of its speed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from slipstream.generation.engine import OnFinished, Request, Sampling, SyncReport
from slipstream.generation.guest import RandomStates
from slipstream.generation.logits import Distribution, inference, mixed_logits, neutral_settings
from slipstream.generation.requests import mixture_of, token_limit
from slipstream.generation.vllm_options import check_names, names
from slipstream.modeling import features
from slipstream.records import Completion, Images

_OWN_OPTIONS = names(
    "max_new_tokens max_length temperature top_p top_k min_p repetition_penalty do_sample num_beams "
    "num_return_sequences pad_token_id eos_token_id use_cache return_dict_in_generate output_scores"
)


class TransformersEngine:
    """`model.generate` behind the engine Protocol.

    Args:
        model: Returns the unwrapped training model. Called at every `generate`, so it may change (or be gathered).
        pad_token_id: Token that fills prompts up on the left.
        eos_token_ids: Tokens that end a completion.
        seed: Start of the random stream of unseeded calls.
        batch_size: Most completions sampled at the same time; None: all of a call.
        continuous_batching: Settings of transformers' ContinuousBatchingConfig: sample with its `generate_batch`, which
            pads nothing and takes up a sequence when another ends. It reports no log-probabilities here. None: off.
        reference: Returns a context manager that gives the reference model (of the policy's vocabulary) while it is
            entered, for requests with a mixture above 0. It may be the policy's own with its adapter off. None: there
            is no reference.

    Seeds: a call is reproducible from the first request's seed (and independent of the trainer's random states), but a
    completion's tokens also depend on what else is in the call. Only vLLM samples each completion from its own seed.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        pad_token_id: int,
        eos_token_ids: Sequence[int],
        seed: int = 0,
        batch_size: int | None = None,
        continuous_batching: Mapping[str, Any] | None = None,
        reference: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.version: int | None = None
        self._model = model
        self._pad = pad_token_id
        self._eos = frozenset(eos_token_ids)
        self._seed = seed
        self._calls = 0
        self._batch_size = batch_size
        self._continuous = continuous_batching
        self._reference = reference

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Sample `requests[i].n` completions for each request, in order. All end together: `on_finished` is not called.

        Raises:
            RuntimeError: No `update_weights` yet.
            ValueError: A sampling option that transformers does not have; or mixtures that differ, or need a reference
                that is not there.
            NotImplementedError: A prompt has images, which continuous batching does not take.
        """
        mixture = mixture_of(requests, has_reference=self._reference is not None)
        if self.version is None:
            raise RuntimeError("generate: no weight version is known yet; call update_weights first")
        check_sampling(sampling, continuous=self._continuous is not None)
        options = dict(sampling.extra)
        rows = [list(request.prompt_ids) for request in requests for _ in range(request.n)]
        limits = [token_limit(request, sampling) for request in requests for _ in range(request.n)]
        images = [request.images for request in requests for _ in range(request.n)]
        seed = next((request.seed for request in requests if request.seed is not None), None)
        if seed is None:
            seed = self._seed + 1_000_003 * self._calls
        self._calls += 1
        size = self._batch_size or max(1, len(rows))
        completions: list[Completion] = []
        states = RandomStates()
        try:
            torch.manual_seed(seed % 2**63)
            with self._source(mixture) as model:
                if self._continuous is not None and rows:
                    if any(images):
                        raise NotImplementedError("continuous batching takes token ids alone, and a prompt has images")
                    completions = self._sample_continuously(model, rows, limits, sampling, options)
                else:
                    for start in range(0, len(rows), size):
                        some = slice(start, start + size)
                        completions += self._sample_forms(
                            model, rows[some], limits[some], images[some], sampling, options, mixture
                        )
        finally:
            states.restore()
        ordered = iter(completions)
        return [[next(ordered) for _ in range(request.n)] for request in requests]

    @contextlib.contextmanager
    def _source(self, mixture: float) -> Iterator[Any]:
        """The model whose `generate` is called: the reference if nothing else is sampled from, else the policy."""
        if 0 < mixture < 1 and self._continuous is not None:
            raise ValueError(
                f"mixture={mixture!r} cannot be used with use_transformers_continuous_batching=True, which gives no "
                "place to mix logits: switch it off, or use vLLM."
            )
        given = self._reference if mixture == 1 else None
        with (
            given() if given else contextlib.nullcontext(self._model()) as model,
            inference(model),
            neutral_settings(model),
        ):
            yield model

    def _mixing(self, model: Any, mixture: float) -> AbstractContextManager[None]:
        if self._reference is None or mixture in (0, 1):
            return contextlib.nullcontext()
        return mixed_logits(model, self._reference, mixture)

    def _sample_forms(
        self,
        model: Any,
        rows: list[list[int]],
        limits: list[int],
        images: list[Images | None],
        sampling: Sampling,
        options: dict[str, Any],
        mixture: float,
    ) -> list[Completion]:
        """The completions of rows, of which those are sampled together whose images can be."""
        alike: dict[Hashable, list[int]] = {}
        for i, one in enumerate(images):
            alike.setdefault(features.form(one), []).append(i)
        sampled: dict[int, Completion] = {}
        for chosen in alike.values():
            own, most = [rows[i] for i in chosen], [limits[i] for i in chosen]
            beside = features.joined([images[i] for i in chosen], max(map(len, own)), left=True)
            with self._mixing(model, mixture):
                sampled.update(zip(chosen, self._sample(model, own, most, beside, sampling, options), strict=True))
        return [sampled[i] for i in range(len(rows))]

    def _sample(
        self,
        model: Any,
        rows: list[list[int]],
        limits: list[int],
        beside: dict[str, Tensor],
        sampling: Sampling,
        options: dict[str, Any],
    ) -> list[Completion]:
        assert self.version is not None
        width = max(map(len, rows))
        device = model.get_input_embeddings().weight.device
        # (rows, width): prompts end at the right edge, where generation starts
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        from transformers import GenerationConfig, LogitsProcessorList
        from transformers.integrations.fsdp import is_fsdp_managed_module

        # It shapes the distribution instead of transformers' own filters, to report log-probabilities under it.
        distribution = Distribution(sampling, mask)
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=sampling.temperature > 0,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos.union(sampling.ends)) or None,
            use_cache=True,  # training with gradient checkpointing switches it off in the model's config
            num_beams=1,
            repetition_penalty=1.0,
            **({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} if sampling.temperature > 0 else {}),
            **options,
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{name: value.to(device) for name, value in beside.items()},
            generation_config=config,
            logits_processor=LogitsProcessorList([distribution]),
            # Ranks that divide the weights compute every step together, also when their own rows have ended; below an
            # adapter transformers does not see that they do.
            synced_gpus=True if is_fsdp_managed_module(model) else None,
        )
        distribution.record(out)
        tokens = out[:, width:].tolist()
        logprobs = torch.stack(distribution.logprobs, dim=1).tolist()
        return [self._trim(*sampled, sampling) for sampled in zip(tokens, logprobs, limits, strict=True)]

    def _sample_continuously(
        self, model: Any, rows: list[list[int]], limits: list[int], sampling: Sampling, options: dict[str, Any]
    ) -> list[Completion]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        filters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=sampling.temperature > 0,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos.union(sampling.ends)) or None,
            **(filters if sampling.temperature > 0 else {}),
            **options,
        )
        assert self._continuous is not None
        batching = ContinuousBatchingConfig(**self._continuous)
        answers = model.generate_batch(rows, generation_config=config, continuous_batching_config=batching)
        # Requests are numbered in the order they were given, and come back in the order they ended.
        ordered = sorted(answers.values(), key=lambda answer: int(answer.request_id.rpartition("_")[2]))
        if [list(answer.prompt_ids) for answer in ordered] != rows:
            raise RuntimeError(f"continuous batching answered {len(ordered)} of {len(rows)} requests, or others")
        tokens = [list(answer.generated_tokens) for answer in ordered]
        return [self._trim(ids, [], limit, sampling) for ids, limit in zip(tokens, limits, strict=True)]

    def _trim(self, ids: list[int], logprobs: list[float], limit: int, sampling: Sampling) -> Completion:
        # Rows are sampled side by side until the last of them ends.
        ids, ends = ids[:limit], self._eos.union(sampling.ends)
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
        length = end or len(ids)
        version = self.version if self.version is not None else -1
        return Completion(
            ids[:length],
            logprobs[:length] if sampling.logprobs else None,
            version,
            "stop" if end else "length",
        )

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> SyncReport:
        """Note the version: the weights are the trainer's own, so nothing moves and `tensors` is not read."""
        begin = time.perf_counter()
        self.version = version
        return SyncReport(version, nbytes=0, tensors=0, seconds=time.perf_counter() - begin)

    def update_reference(self, tensors: Iterable[tuple[str, Tensor]]) -> SyncReport:
        """Move nothing: the reference is the trainer's own as well. Raise ValueError if there is none."""
        if self._reference is None:
            raise ValueError(
                "update_reference: the engine was made without a reference model: give `reference` to build_engine"
            )
        return SyncReport(0, nbytes=0, tensors=0, seconds=0.0)

    def recover(self) -> None:
        """Raise RuntimeError: it cannot be lost without this process."""
        raise RuntimeError("recover: the trainer's own model cannot be lost without it")

    def sleep(self, level: int = 1) -> None:
        """Raise RuntimeError: there is no memory of its own to free."""
        raise RuntimeError("sleep: generation with transformers has no memory of its own to free; set use_vllm=True")

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Raise RuntimeError: it never sleeps."""
        raise RuntimeError("wake: generation with transformers never sleeps")

    def close(self) -> None:
        """Forget the weights' version."""
        self.version = None


def check_sampling(sampling: Sampling, *, continuous: bool) -> None:
    """Raise ValueError if transformers' generation (or its continuous batching) cannot sample so."""
    from transformers import GenerationConfig

    if continuous and (sampling.min_p or sampling.repetition_penalty != 1):
        raise ValueError(
            "min_p and repetition_penalty cannot be used with use_transformers_continuous_batching=True: set "
            "min_p=None and repetition_penalty=1.0, or switch it off."
        )
    if sampling.regex is not None:
        raise ValueError("a regular expression for completions needs vLLM's structured outputs: set use_vllm=True")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    check_names("generation_kwargs", sampling.extra, known, _OWN_OPTIONS)
