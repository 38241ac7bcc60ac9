"""The sequences of a batch that only decodes, as arrays. See `steady`.

Legend: R sequences of the batch ("rows").
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from slipstream.vllm_compat.steady_prefixes import Prefixes
from slipstream.vllm_compat.steady_requests import decodes, ends, undisturbed

LOOKAHEAD = 64
"""Tokens that the cache has room for when a sequence is given new blocks, memory allowing."""

SWITCH = "SLIPSTREAM_STEADY_DECODE"
"""The environment variable that turns it off: 0."""

TOKEN = np.dtype([("id", np.int64), ("logprob", np.float32), ("rank", np.int64)])
"""A sampled token; the two others where log-probabilities are asked for."""

_WIDTH = 256


class Batch:
    """The running sequences, and what has happened to them that vLLM's own objects do not know yet.

    Attributes:
        alive: (R,) not yet finished.
        computed: (R,) tokens whose keys and values are in the cache, or will be when the steps under way end.
        outputs: (R,) tokens sampled, or being sampled.
        room: (R,) tokens that the sequence's blocks have room for.
        to_schedule: (R,) tokens that it may still be given.
        to_sample: (R,) tokens that it has not yet got of those.
        scheduled, sampled: (R,) steps since vLLM's object was last settled.
        tokens, count: (R, width) tokens since then, and (R,) how many.
    """

    def __init__(
        self, scheduler: Any, requests: list[Any], unsent: dict[str, list[np.ndarray]], prefixes: bool = False
    ) -> None:
        self.scheduler, self.requests, self.unsent = scheduler, requests, unsent
        self.vllm = importlib.import_module("vllm.v1.core.sched.output")
        self.manager = scheduler.kv_cache_manager
        [self.cache] = self.manager.coordinator.single_type_managers
        self.asynchronous = isinstance(
            scheduler, importlib.import_module("vllm.v1.core.sched.async_scheduler").AsyncScheduler
        )
        self.block = scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.names = [r.request_id for r in requests]
        rows = len(requests)
        self.alive = np.ones(rows, bool)
        self.computed = np.array([r.num_computed_tokens for r in requests])
        self.outputs = np.array([r.num_output_tokens + r.num_output_placeholders for r in requests])
        blocks = [self.manager.get_block_ids(name)[0] for name in self.names]
        self.room = np.array([len(held) for held in blocks]) * self.block
        longest = [min(r.num_prompt_tokens + r.max_tokens, scheduler.max_model_len) for r in requests]
        self.to_schedule = longest - np.array([r.num_tokens + r.num_output_placeholders for r in requests])
        # Tokens of steps that vLLM itself has scheduled come through its own code: they are not counted here.
        self.to_sample = self.to_schedule.copy()
        self.scheduled, self.sampled, self.count = (np.zeros(rows, np.int64) for _ in range(3))
        self.tokens = np.zeros((rows, _WIDTH), TOKEN)
        self.ends = np.array(sorted({end for r in requests for end in ends(r.sampling_params)}))
        self.active = np.arange(rows)
        self.under_way: list[tuple[Any, np.ndarray]] = []
        """Steps that are scheduled and have no tokens yet, and their rows."""
        self.prefixes = self._prefixes(blocks) if prefixes else None
        self._prepare()

    @classmethod
    def of(cls, scheduler: Any, unsent: dict[str, list[np.ndarray]], prefixes: bool = False) -> Batch | None:
        """The scheduler's running sequences, if all there is to do is to give each of them a token.

        With `prefixes` its steps say which of them begin with the same blocks (`slipstream_prefixes`).
        """
        running = scheduler.running
        if not running or not undisturbed(scheduler):
            return None
        if len(running) > scheduler.max_num_scheduled_tokens or not all(map(decodes, running)):
            return None
        if not scheduler.use_v2_model_runner:
            # Of others vLLM sends all tokens once more.
            before = scheduler.prev_step_scheduled_req_ids
            if not all(r.request_id in before for r in running):
                return None
        return cls(scheduler, list(running), unsent, prefixes)

    def schedule(self) -> Any | None:
        """The next step, or None where vLLM's own code has to decide."""
        scheduler, rows = self.scheduler, self.active
        if len(scheduler.running) != self.alive.sum() or not undisturbed(scheduler):
            return None
        if not self.to_schedule[rows].all():
            rows = rows[self.to_schedule[rows] > 0]
            if not len(rows):
                return None
            self.active = rows
            self._prepare()
        self.manager.new_step_starts()
        blocks = self._new_blocks(rows)
        if blocks is None:
            return None
        scheduler.current_step += 1
        output = self._output(rows, blocks)
        self.computed[rows] += 1
        self.outputs[rows] += 1
        self.to_schedule[rows] -= 1
        self.scheduled[rows] += 1
        if scheduler.defer_block_free:
            scheduler.sched_step_seq += 1
        scheduler.finished_req_ids = set()
        scheduler.reset_preempted_req_ids = set()
        return output

    def _prepare(self) -> None:
        """What steps of the same sequences share. Nobody changes it."""
        self.active_names = [self.names[row] for row in self.active]
        self.one_each = dict.fromkeys(self.active_names, 1)
        self.active_prefixes = None if self.prefixes is None else self.prefixes.part(self.active)
        if not self.scheduler.use_v2_model_runner:
            self.scheduler.prev_step_scheduled_req_ids = set(self.active_names)

    def _new_blocks(self, rows: np.ndarray) -> list[Any] | None:
        """Blocks for sequences whose next token has no room, None for the others; or None: memory is short."""
        blocks: list[Any] = [None] * len(rows)
        (full,) = np.nonzero(self.computed[rows] >= self.room[rows])
        if not len(full):
            return blocks
        free = self.manager.block_pool.get_num_free_blocks()
        ahead = LOOKAHEAD if len(full) * (LOOKAHEAD // self.block + 1) <= free else 0
        if len(full) > free:
            return None
        for place in full:
            row = int(rows[place])
            # No further than the sequence can get.
            more = min(ahead, int(self.to_schedule[row]) - 1)
            need = int(self.computed[row]) + 1 + more
            # Not `allocate_slots`: that hashes and caches what was sampled, which takes longer than all else here.
            new = self.cache.allocate_new_blocks(self.names[row], need, need)
            blocks[place] = ([block.block_id for block in new],)
            self.room[row] = self._room(self.requests[row])
        return blocks

    def _room(self, request: Any) -> int:
        return len(self.manager.get_block_ids(request.request_id)[0]) * self.block

    def _prefixes(self, blocks: list[list[int]]) -> Prefixes:
        # A block that a sequence still writes to is nobody else's.
        full = (min(r.num_prompt_tokens, r.num_computed_tokens) // self.block for r in self.requests)
        return Prefixes.of([held[:count] for held, count in zip(blocks, full, strict=True)], self.block)

    def _output(self, rows: np.ndarray, blocks: list[Any]) -> Any:
        output = self.vllm.SchedulerOutput.make_empty()
        output.scheduled_cached_reqs = self.vllm.CachedRequestData(
            req_ids=self.active_names,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=blocks,
            num_computed_tokens=self.computed[rows].tolist(),
            num_output_tokens=self.outputs[rows].tolist(),
        )
        output.num_scheduled_tokens = self.one_each
        output.total_num_scheduled_tokens = len(rows)
        output.finished_req_ids = self.scheduler.finished_req_ids
        output.preempted_req_ids = self.scheduler.reset_preempted_req_ids
        output.new_block_ids_to_zero = self.scheduler._get_new_block_ids_to_zero()
        output.free_encoder_mm_hashes = self.scheduler.encoder_cache_manager.get_freed_mm_hashes()
        if hasattr(output, "ec_manager_metadata"):  # since 0.27
            output.ec_manager_metadata = self.scheduler.encoder_cache_manager.get_manager_metadata()
        if hasattr(output, "num_common_prefix_blocks"):
            output.num_common_prefix_blocks = [0]  # a hint; the batch has many prompts
        if self.active_prefixes is not None:
            output.slipstream_prefixes = self.active_prefixes
        output.slipstream_steady = not output.new_block_ids_to_zero  # for `steady_runner`
        self.under_way.append((output, rows))
        return output

    def made(self, scheduled: Any) -> bool:
        """Whether a step is of this batch, and has no tokens yet."""
        return any(step is scheduled for step, _ in self.under_way)

    def update(self, scheduled: Any, sampled: Any, own: Any) -> dict[int, Any]:
        """Take a step's tokens. Sequences that may end with theirs go through vLLM's `own` code."""
        [rows] = [rows for step, rows in self.under_way if step is scheduled]
        self.under_way = [(step, rows) for step, rows in self.under_way if step is not scheduled]
        tokens = self._sampled_tokens(scheduled, sampled)
        alive = self.alive[rows]
        if not alive.all():  # it had been scheduled once more before its end was known
            rows, tokens = rows[alive], tokens[alive]
        self.to_sample[rows] -= 1
        may_end = (self.to_sample[rows] <= 0) | np.isin(tokens["id"], self.ends)
        going = rows[~may_end]
        self.tokens[going, self.count[going]] = tokens[~may_end]
        self.count[going] += 1
        self.sampled[going] += 1
        for row in going[self.count[going] == _WIDTH]:
            self.settle(int(row))
        ending = rows[may_end]
        if len(ending):
            return self._hand_over(ending, scheduled, sampled, own)
        if self.scheduler.defer_block_free:
            self.scheduler.processed_step_seq += 1
            self.scheduler._drain_deferred_frees()
        return {}

    def _sampled_tokens(self, scheduled: Any, sampled: Any) -> np.ndarray:
        """The step's tokens, in its order of sequences."""
        names = list(scheduled.num_scheduled_tokens)
        tokens = np.zeros(len(sampled.sampled_token_ids), TOKEN)
        tokens["id"] = [i for [i] in sampled.sampled_token_ids]
        if sampled.logprobs is not None:
            # The sampled token's is the first, whatever else a request outside of the batch wanted.
            tokens["logprob"], tokens["rank"] = sampled.logprobs.logprobs[:, 0], sampled.logprobs.sampled_token_ranks
        if sampled.req_ids != names:
            index = sampled.req_id_to_index
            tokens = tokens[[index[name] for name in names]]
        return tokens

    def _hand_over(self, ending: np.ndarray, scheduled: Any, sampled: Any, own: Any) -> dict[int, Any]:
        for row in ending:
            self.settle(int(row))
        part = copy.copy(scheduled)
        part.num_scheduled_tokens = {self.names[row]: 1 for row in ending}
        part.total_num_scheduled_tokens = len(ending)
        with self._without_hashes([self.requests[row] for row in ending]):
            told: dict[int, Any] = own(part, sampled)
        self.drop_finished(ending)
        return told

    @contextlib.contextmanager
    def _without_hashes(self, requests: list[Any]) -> Iterator[None]:
        """Inside, vLLM neither hashes nor caches what these requests have sampled. Most end there."""
        hashers = [request._block_hasher for request in requests]
        self.manager.cache_blocks = lambda *args, **options: None
        for request in requests:
            request._block_hasher = None
        try:
            yield
        finally:
            del self.manager.cache_blocks
            for request, hasher in zip(requests, hashers, strict=True):
                request._block_hasher = hasher

    def drop_finished(self, rows: Any = None) -> None:
        """Forget sequences that vLLM's own code has ended."""
        among = np.flatnonzero(self.alive) if rows is None else rows
        ended = [row for row in among if self.requests[row].is_finished()]
        if ended:
            self.alive[ended] = False
            self.active = self.active[self.alive[self.active]]
            self._prepare()

    def settle(self, row: int) -> None:
        """Tell vLLM's object of a sequence what has happened to it, but for its blocks' hashes."""
        request = self.requests[row]
        scheduled, sampled = int(self.scheduled[row]), int(self.sampled[row])
        request.num_computed_tokens += scheduled
        request.num_in_flight_tokens += scheduled - sampled
        if self.asynchronous:
            request.num_output_placeholders += scheduled - sampled
        if self.scheduler.defer_block_free:
            request.last_sched_seq = self.scheduler.sched_step_seq
        self.scheduled[row] = self.sampled[row] = 0
        if count := int(self.count[row]):
            tokens = self.tokens[row, :count].copy()
            ids = tokens["id"].tolist()
            request._output_token_ids.extend(ids)
            request._all_token_ids.extend(ids)
            self.unsent.setdefault(request.request_id, []).append(tokens)
            self.count[row] = 0
