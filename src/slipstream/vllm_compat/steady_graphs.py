"""Decode steps as CUDA graphs: their recording, and what they read and leave. See `steady_runner`.

S is the number of sequences that vLLM has room for, P that of a graph, which is at least the step's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def gpu(module: str, name: str) -> Any:
    """What a module of vLLM's V2 model runner calls `name`."""
    return getattr(importlib.import_module(f"vllm.v1.worker.gpu.{module}"), name)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a sampling graph computes.

    Attributes:
        padded: P.
        scaled: Whether any temperature is another than 0 and 1.
        logps: Whether log-probabilities of the sampled tokens are wanted.
        ranks: Whether the tokens' ranks are wanted, which vLLM tells beside log-probabilities.
    """

    padded: int
    scaled: bool
    logps: bool
    ranks: bool


@dataclasses.dataclass
class Samples:
    """What a sampling graph leaves: (P, 1) token ids, and (P,) log-probabilities and ranks where they are wanted."""

    tokens: Tensor
    logps: Tensor | None
    ranks: Tensor | None


def only_decodes(description: Any) -> bool:
    """Whether vLLM's graph of this description is for steps of a token a sequence alone.

    One for steps of any kind (`cudagraph_mode="FULL"`) may be for more tokens than vLLM has room for sequences.
    """
    return bool(description.uniform_token_count == 1)


class Graphs:
    """The graphs around the model's, recorded for all sizes when one is first asked for.

    The largest comes first, as in vLLM's own recording: the others' logits find room in the memory of its logits. And
    all come before the first completions: under the torch that vLLM 0.26 needs, a thread that draws random numbers on
    the GPU, for a reward, fails while another thread records (pytorch's issue 172390).

    Attributes:
        sizes: P of vLLM's graphs, in descending order.
        rows: int32 (1 + S,): how many sequences a step has, and their rows of vLLM's states.
        temperature, seeds: (S,) by row of vLLM's states. vLLM's own lie in buffers that take turns.
        one: int32 (S,): ones.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.manager, self.tables = runner, runner.cudagraph_manager, runner.block_tables
        self.states, self.sampler = runner.req_states, runner.sampler
        self.sizes = sorted({graph.num_tokens for graph in self.manager.graphs if only_decodes(graph)}, reverse=True)
        most, device = runner.max_num_reqs, runner.device
        integers = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        self.rows, self.sampled, self.updated = integers(1 + most), integers(most), integers(most)
        self.nobody, self.one, self.none = integers(most) - 1, integers(most) + 1, integers(most)
        self.temperature = torch.zeros(most, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(most, dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device)
        self._before: dict[int, torch.cuda.CUDAGraph] = {}
        self._after: dict[Wanted, tuple[torch.cuda.CUDAGraph, Samples]] = {}

    def before(self, padded: int) -> torch.cuda.CUDAGraph:
        """Makes what the model's graph for `padded` sequences reads, of the sequences in `rows`."""
        if padded not in self._before:
            for size in self.sizes:
                prepare = self._prepare(size)
                self._before[size] = self.record(prepare, prepare)[0]
            logger.info("steady steps: graphs of %d sizes, up to %d sequences", len(self.sizes), self.sizes[0])
        return self._before[padded]

    def after(self, wanted: Wanted) -> tuple[torch.cuda.CUDAGraph, Samples]:
        """Samples from what the model's graph left. The samples are the same tensors every time."""
        if wanted not in self._after:
            for size in self.sizes:
                of = dataclasses.replace(wanted, padded=size)
                warm, real = (functools.partial(self._samples, of, rows) for rows in (self.nobody, self.updated))
                self._after[of] = self.record(warm, real)
        return self._after[wanted]

    def inputs(self, padded: int) -> Callable[[], None]:
        """What makes the model's inputs, but for the attention's metadata."""
        from slipstream.vllm_compat import steady_kernel

        tables, buffers = self.tables, self.runner.input_buffers
        return lambda: steady_kernel.inputs(
            self.rows, self.states.num_computed_tokens.gpu, self.states.last_sampled_tokens,
            tables.block_tables[0].gpu, tables.kernel_block_sizes[0], padded,
            ids=buffers.input_ids, positions=buffers.positions, seq_lens=buffers.seq_lens,
            slots=tables.slot_mappings[0], starts=buffers.query_start_loc, blocks=tables.input_block_tables[0],
            sampled=self.sampled, updated=self.updated,
        )  # fmt: skip

    def _prepare(self, padded: int) -> Callable[[], None]:
        runner, tables, inputs = self.runner, self.tables, self.inputs(padded)
        # What vLLM's metadata is made of: the buffers that the kernel fills, and the most that lengths may be.
        batch = gpu("input_batch", "InputBatch").make_dummy(padded, padded, runner.input_buffers)
        batch.seq_lens_cpu_upper_bound = torch.full((padded,), runner.max_model_len, dtype=torch.int32)
        mode = importlib.import_module("vllm.config.compilation").CUDAGraphMode.FULL

        def prepare() -> None:
            inputs()
            runner.model_state.prepare_attn(
                batch, mode, (tables.input_block_tables[0][:padded],), tables.slot_mappings[:, :padded],
                runner.attn_groups, runner.kv_cache_config,
            )  # fmt: skip

        return prepare

    def _samples(self, wanted: Wanted, updated: Tensor) -> Samples:
        """vLLM's sampling of the model's graph's outputs, and what follows from it for the next step."""
        padded = wanted.padded
        logits = self.runner.model.compute_logits(self.manager.hidden_states[:padded])
        rows, buffers, states = self.sampled[:padded], self.runner.input_buffers, self.states
        if wanted.scaled:
            gpu("sample.gumbel", "apply_temperature")(logits, rows, self.temperature)
        tokens = gpu("sample.gumbel", "gumbel_sample")(
            logits, rows, self.temperature, self.seeds, buffers.positions[:padded],
            apply_temperature=False, use_fp64=self.sampler.use_fp64_gumbel,
        ).view(-1, 1)  # fmt: skip
        samples = Samples(tokens, None, None)
        if wanted.ranks:
            scores = gpu("sample.logprob", "compute_topk_scores")(logits, 0, tokens[:, 0])
            samples.logps, samples.ranks = scores.logprobs[:, 0], scores.selected_token_ranks
        elif wanted.logps:
            from slipstream.vllm_compat.token_logps import token_logps

            samples.logps = token_logps(logits, tokens)
        gpu("input_batch", "post_update")(
            updated[:padded], states.num_computed_tokens.gpu, states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts, tokens, self.one[:padded], self.none[:padded],
            buffers.query_start_loc[: padded + 1], states.all_token_ids.gpu, states.total_len.gpu,
        )  # fmt: skip
        return samples

    def record(self, warm: Callable[[], Any], work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record `work`, after `warm` has compiled its kernels."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.runner.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            warm()
            # Other threads, which compute rewards, may use the GPU meanwhile.
            graph.capture_begin(pool=self.manager.pool, capture_error_mode="thread_local")
            try:
                left = work()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph, left
