"""From a slot to scored rollouts, through an engine that holds the policy's present weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from slipstream.generation.engine import Engine, EngineLostError, OnFinished, Request, Sampling
from slipstream.records import Completion, Prompt, Rollout
from slipstream.rollouts import custom
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.rewards import RewardRunner
from slipstream.rollouts.sampler import Slot, prompt_seed
from slipstream.rollouts.streamed import StreamedRewards
from slipstream.trainers import vision
from slipstream.trainers.conversing import converse
from slipstream.trainers.journal import Journal
from slipstream.trainers.learning import Learning
from slipstream.trainers.metrics import Metrics, length_metrics, mean_by_name, tool_metrics
from slipstream.weights.export import Weights

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Times that an engine may be lost over the same completions: then they may well be what it dies of.
MOST_LOSSES = 3


class Generating(Learning):
    """The half of a trainer that samples.

    Attributes:
        engine: Samples completions.
        eos_ids: Tokens that end a completion.
        journal: Keeps completions for people to read; None on ranks other than the first.
        longest: Tokens that prompt and completion may have together, and whose limit that is; None: unknown.
        renderer: Makes token ids of prompts.
        rewards: Runs the reward functions.
    """

    engine: Engine
    eos_ids: set[int]
    journal: Journal | None
    longest: tuple[int, str] | None
    metrics: Metrics
    renderer: PromptRenderer
    rewards: RewardRunner
    _pushed: tuple[int, int] | None
    _reference_pushed: bool
    _batch: tuple[tuple[int, int], list[Rollout]] | None
    _extra: dict[str, list[Any]]

    def _rollouts(self, slot: Slot) -> list[Rollout]:
        """This rank's rows of a slot; the first slot of a generation batch samples it."""
        key = (slot.epoch, slot.batch)
        if self._batch is None or self._batch[0] != key:
            self._batch = (key, self._sample_batch(slot))
        rows = self.args.micro_batch_rows
        first = slot.index % self._steps_per_generation * rows
        rollouts = self._batch[1][first : first + rows]
        if slot.index == self._sampler.slots_per_batch - 1:
            self._batch = None
        return rollouts

    def _sample_batch(self, slot: Slot) -> list[Rollout]:
        """Sample and score this rank's share of a generation batch."""
        size = self.args.num_generations
        positions = self._sampler.prompts(slot.epoch, slot.batch)
        share = self.args.micro_batch_rows * self._steps_per_generation
        first = self.accelerator.process_index * share
        # Completions of all ranks are numbered, those of a prompt side by side. A rank may start within a group.
        wanted: list[tuple[int, int, int]] = []
        number = first
        while number < first + share:
            start = number % size
            count = min(size - start, first + share - number)
            wanted.append((positions[number // size], start, count))
            number += count
        seed = (self.args.seed, "train", slot.epoch, slot.batch)
        rollouts, metrics = self._collect(self.train_dataset, wanted, seed, size)
        tokens = torch.tensor(sum(len(r.prompt.ids) + r.own_tokens for r in rollouts), dtype=torch.float64)
        total = self.accelerator.reduce(tokens.to(self.accelerator.device), "sum")
        self.state.num_input_tokens_seen += int(total.item())
        self.metrics.add(metrics)
        if self.journal:
            self.journal.take(rollouts, self.state.global_step + 1, "train", self._extra)
        return rollouts

    def _collect(
        self,
        dataset: Any,
        wanted: Sequence[tuple[int, int, int]],
        seed: tuple[Any, ...],
        group_size: int,
        real: int | None = None,
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Sample completions, and put to them whatever is known before a step; also returns the metrics of that.

        Args:
            dataset, wanted, seed: See `_generate`.
            group_size: Completions of each prompt.
            real: How many rows of this rank count, in an evaluation; None: training, where all do.
        """
        with self.rewards.streamed(self.renderer.completions, self.state) as streamed:
            rollouts = self._generate(dataset, wanted, seed, evaluation=real is not None, streamed=streamed)
            real = len(rollouts) if real is None else real
            for rollout in rollouts[real:]:
                rollout.in_loss = False
            scored = self.learns_from(rollouts)
            if self.needs_old_logps:
                self._annotate(self.model_wrapped, scored, "old_logps")
            if self._uses_reference(self.args):
                self._annotate_reference(scored)
            metrics = self._score(rollouts, group_size, real, streamed)
        if self.toolbox is not None:
            metrics |= tool_metrics(rollouts[:real], self.accelerator)
        return rollouts, metrics | length_metrics(rollouts[:real][self.own_rows], self.accelerator)

    def _score(
        self, rollouts: list[Rollout], group_size: int, real: int, streamed: StreamedRewards | None
    ) -> dict[str, float]:
        """Rewards and what follows from them; only the first `real` rows of this rank count in the metrics."""
        pending: dict[str, list[float]] = {}
        self._extra = {}
        with self.clock.phase("score"):
            self.rewards.score(
                rollouts,
                self.state,
                log_extra=lambda column, values: self._take_extra(column, values, len(rollouts)),
                log_metric=lambda name, value: pending.setdefault(name, []).append(float(value)),
                streamed=streamed,
            )
            metrics = self.credit(rollouts, group_size, real)
        return metrics | mean_by_name(pending)

    def _take_extra(self, column: str, values: Sequence[Any], expected: int) -> None:
        if len(values) != expected:
            raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {expected} completions.")
        self._extra[column] = list(values)

    def _generate(
        self,
        dataset: Any,
        wanted: Sequence[tuple[int, int, int]],
        seed: tuple[Any, ...],
        *,
        evaluation: bool,
        streamed: StreamedRewards | None = None,
    ) -> list[Rollout]:
        """Sample completions `start ... start + count - 1` of each `(row, start, count)`, in order."""
        sampled: list[tuple[Prompt, Completion, dict[str, Any]]]
        texts: Sequence[Any] | None = None
        if self.toolbox is not None:
            sampling = self.args.sampling(evaluation=evaluation)
            episodes = self._though_lost(lambda: converse(self, dataset, wanted, seed, sampling))
            sampled = [(e.prompt, e.completion(), e.extra()) for e in episodes]
            texts = [e.messages for e in episodes] if self.dialogue is not None else None
        elif self.rollout_func is not None:
            sampled = self._though_lost(lambda: self._ask_function(dataset, wanted))
        else:
            prompts = [self._prompt(dataset, row) for row, _, _ in wanted]
            requests = [
                Request(prompt.ids, count, prompt_seed(*seed, row) + start, images=prompt.images)
                for prompt, (row, start, count) in zip(prompts, wanted, strict=True)
            ]
            counts = [request.n for request in requests]
            begin = None if streamed is None else lambda: streamed.begin(prompts, counts)
            sampling = self.args.sampling(evaluation=evaluation)
            if self.packer.images:
                # The model would take one for an image that is not there.
                sampling = replace(sampling, ends=tuple(sorted(self.packer.placeholders)))
            answers = self._answers(requests, sampling, begin)
            sampled = [(p, c, {}) for p, group in zip(prompts, answers, strict=True) for c in group]
        if texts is None:
            texts = self.renderer.completions([p for p, _, _ in sampled], [c.ids for _, c, _ in sampled])
        rollouts = []
        for (prompt, completion, extra), text in zip(sampled, texts, strict=True):
            if not completion.ids:
                raise ValueError(
                    f"a completion of prompt {prompt.index} has no tokens, so there is nothing to train on: see that "
                    "generation_kwargs cannot end one at once (stop, min_tokens=1), or rollout_func."
                )
            truncated = completion.ids[-1] not in self.eos_ids
            rollout = Rollout(prompt, completion, text, truncated, extra=extra)
            if completion.logprobs is not None:
                # By way of numpy: torch takes twice as long to read a list.
                rollout.extra["sampler_logps"] = torch.from_numpy(np.array(completion.logprobs, dtype=np.float32))
            rollouts.append(rollout)
        return rollouts

    def _prompt(self, dataset: Any, row: int) -> Prompt:
        prompt = self.renderer.render(dataset[row], row)
        vision.check_prompt(prompt, self.longest, self.args, expected=self.packer.images)
        return prompt

    def ask_engine(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """The completions of each prompt; a subclass may let the reference have a part in some of them."""
        return self.engine.generate(requests, sampling, on_finished)

    def _answers(
        self, requests: Sequence[Request], sampling: Sampling, begin: Callable[[], OnFinished] | None = None
    ) -> list[list[Completion]]:
        """What the engine samples; seeds make a repetition the same.

        `begin` gives each attempt what hears of finished completions.
        """
        return self._though_lost(lambda: self.ask_engine(requests, sampling, begin and begin()))

    def _ask_function(
        self, dataset: Any, wanted: Sequence[tuple[int, int, int]]
    ) -> list[tuple[Prompt, Completion, dict[str, Any]]]:
        """What the user's function samples."""
        assert self.rollout_func is not None
        assert self.engine.version is not None  # the weights have been sent
        return custom.sample(self.rollout_func, self, dataset, wanted, self.engine.version)

    def _though_lost(self, sample: Callable[[], list[T]]) -> list[T]:
        """What `sample` returns with the engine ready; if that is lost on the way, what it returns when it is back.

        All ranks wait together, since they send the weights together.
        """
        for _ in range(MOST_LOSSES):
            lost: EngineLostError | None = None
            sampled: list[T] = []
            try:
                with self._engine_ready(), self.clock.phase("generate"):
                    sampled = sample()
            except EngineLostError as error:
                lost = error
                logger.warning("the engine was lost, waiting for it to come back: %s", error)
            if not self._on_any_rank(lost is not None):
                return sampled
            with self.clock.phase("wait"):
                self._recover()
        raise RuntimeError(
            f"the engine was lost {MOST_LOSSES} times while it sampled the same completions: see the server's log. "
            f"The last time: {lost or 'on another rank'}"
        ) from lost

    def _recover(self) -> None:
        """Wait for the engine on all ranks: if it does not come back for one of them, all say so."""
        absent: OSError | None = None
        try:
            self.engine.recover()
        except OSError as error:
            absent = error
        if self._on_any_rank(absent is not None):
            raise absent or ConnectionError("the engine did not come back for another rank; see its error")

    def _on_any_rank(self, happened: bool) -> bool:
        count = torch.tensor(float(happened), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    @property
    def _sleeps(self) -> bool:
        return self.args.use_vllm and self.args.vllm_enable_sleep_mode

    @contextlib.contextmanager
    def _engine_ready(self) -> Iterator[None]:
        """Awake and with the policy's present weights."""
        if not self._sleeps:
            self.push_weights()
            self.push_reference()
            yield
            return
        with self.clock.phase("wait"):
            # In two parts: while the weights arrive, the cache's memory is still the trainer's.
            self.engine.wake(["weights"])
        try:
            try:
                self.push_weights()
                self.push_reference()
            finally:
                # Also when that failed: an engine that is half awake cannot be put to sleep.
                with self.clock.phase("wait"):
                    self.engine.wake(["kv_cache"])
            yield
        finally:
            with self.clock.phase("wait"):
                self.engine.sleep(self.args.vllm_sleep_level)

    def push_weights(self) -> None:
        """Send the policy's weights to the engine, if they have changed since the last time."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        # The step alone does not see weights that were loaded from a checkpoint; autograd's version counters do.
        present = (self.state.global_step, sum(p._version for p in model.parameters()))
        if self.engine.version is None:
            # It has just started, was lost, or dropped its weights while it slept.
            self._reference_pushed = False
        elif present == self._pushed:
            return
        with self.clock.phase("sync"):
            report = self.engine.update_weights(self.state.global_step, Weights(model))
        self._pushed = present
        if report.reference_missing:
            self._reference_pushed = False
        self.metrics.add({"sync/bytes": report.nbytes, "sync/seconds": report.seconds})

    def push_reference(self) -> None:
        """Send the reference's weights to an engine that samples from it: once, or again where it lost them."""
        if not self.args.samples_from_reference or self._reference_pushed:
            return
        with self.clock.phase("sync"), self._reference_model() as model:
            self.engine.update_reference(Weights(self.accelerator.unwrap_model(model)))
        self._reference_pushed = True

    @contextlib.contextmanager
    def _reference_to_sample(self) -> Iterator[nn.Module]:
        """The reference, unwrapped, for an engine that runs the trainer's own models."""
        with self._reference_model() as model:
            yield self.accelerator.unwrap_model(model)
