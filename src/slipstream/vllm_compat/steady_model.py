"""The model's decode graphs with attention that reads a group's common tokens once. See `steady_prefixes`.

vLLM's own decode graphs have its attention in them. These are recorded from the same model, with the same inputs, while
`prefix_kernel` stands in for the attention of its layers; nothing of vLLM's stays changed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slipstream.vllm_compat.steady_graphs import Graphs, gpu

logger = logging.getLogger(__name__)

ROOM = 256 * 2**20
"""Bytes that chunks' results may take. vLLM does not count them as its own, and they stay while it sleeps."""

DEVICES = ((9, 0),)
"""Compute capabilities of devices on which it was measured to be quicker."""

SAVED = 0.2
"""Share of a step's keys and values that need not be read again, from which reading them once is quicker."""

WORTH = 20e6
"""Bytes of a layer's keys and values that must be saved in a step. Going through chunks takes about 7 microseconds
longer to begin and to end than vLLM's attention does; an H200 reads 30 MB meanwhile, and vLLM's attention less where
heads are narrow."""

CHUNK, CHUNKS = 256, 16
"""Least tokens of a chunk, and most chunks of a sequence."""


def obstacle(runner: Any, sizes: list[int], anywhere: bool = False) -> str | None:
    """Why the attention of a model runner that has decode graphs of these sizes is not to be `prefix_kernel`'s.

    With `anywhere` the device may be another one than those of `DEVICES`.
    """
    if not anywhere and torch.cuda.get_device_capability(runner.device) not in DEVICES:
        return f"reading it once was not measured on {torch.cuda.get_device_name(runner.device)}"
    layers = list(_layers(runner).values())
    known = importlib.import_module("vllm.v1.attention.backends.flash_attn").FlashAttentionImpl
    if any(type(layer.impl) is not known for layer in layers):
        return "not all layers use FlashAttention"
    one = layers[0].impl
    width = one.head_size
    for layer in layers:
        impl, cache = layer.impl, layer.kv_cache
        if (impl.num_heads, impl.num_kv_heads, impl.head_size) != (one.num_heads, one.num_kv_heads, width):
            return "layers have heads of several shapes"
        if impl.alibi_slopes is not None or impl.sinks is not None or impl.logits_soft_cap:
            return "scores are biased or capped"
        if impl.sliding_window != (-1, -1) or impl.attn_type != "decoder":
            return "layers attend to a window, or to what comes later"
        if cache.dtype not in (torch.float16, torch.bfloat16) or cache.dim() != 4 or cache.shape[-1] != 2 * width:
            return f"keys and values are kept as {cache.dtype} in {cache.dim()} dimensions"
        if cache.stride(-1) != 1:
            return "keys and values are not contiguous"
    if width not in (32, 64, 128) or one.num_heads // one.num_kv_heads > kernel().ROWS:
        return f"heads of width {width}, {one.num_heads} to {one.num_kv_heads}"
    if type(importlib.import_module("vllm.model_executor.offloader.base").get_offloader()).__name__ != "NoopOffloader":
        return "weights are moved to the GPU while it computes"
    need = 4 * sizes[0] * one.num_heads * chunks_of(runner.max_model_len)[1] * width
    if need > ROOM:
        return f"chunks' results of {sizes[0]} sequences would take {need / 2**20:.0f} MiB"
    return None


def chunks_of(longest: int) -> tuple[int, int]:
    """Tokens of a chunk, and chunks that a sequence of at most `longest` tokens may have, one of them begun early."""
    chunk = CHUNK
    while -(-longest // chunk) + 1 > CHUNKS:
        chunk *= 2
    return chunk, -(-longest // chunk) + 1


class SharedModel:
    """Graphs of a step's inputs and the model, for the sizes of which they are recorded.

    Attributes:
        sizes: Of the graphs, in descending order.
        groups: int32 (2, S): which sequences are read for together, as `prefix_kernel.attend` takes it.
        most: Sequences that are read for together at most.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.runner = graphs, graphs.runner
        self.layers = _layers(self.runner)
        impl, device = next(iter(self.layers.values())).impl, self.runner.device
        self.most = kernel().ROWS // (impl.num_heads // impl.num_kv_heads)
        self.sizes = _spread(graphs.sizes)
        self.groups = torch.zeros(2, self.runner.max_num_reqs, dtype=torch.int32, device=device)
        self.chunk, chunks = chunks_of(self.runner.max_model_len)
        of = torch.cuda.get_device_properties(device).multi_processor_count
        self.programs, self.of = kernel().PROGRAMS * of, impl.num_kv_heads
        self.bytes = 2 * impl.num_kv_heads * impl.head_size * 2  # of a token, in a layer
        shape = (self.sizes[0], impl.num_heads, chunks)
        self.units = torch.zeros(4, kernel().HEADER + self.sizes[0] * chunks, dtype=torch.int32, device=device)
        self.partial = torch.empty(*shape, impl.head_size, device=device)
        self.sums = torch.empty(*shape, 2, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def pays(self, saved: int) -> bool:
        """Whether to read so many tokens less in a step is worth it."""
        return saved * self.bytes >= WORTH

    def graph(self, count: int) -> tuple[int, torch.cuda.CUDAGraph] | None:
        """The smallest graph for a step of `count` sequences, and its size; None where all are too small.

        All are recorded when one is first asked for, as in `Graphs`. To compile what is recorded, the step that is
        asked for is made, once or more; it leaves the same each time.
        """
        size = next((size for size in reversed(self.sizes) if size >= count), None)
        if size is None:
            return None
        if size not in self._graphs:  # an interrupt may have ended the recording early
            for padded in self.sizes:
                work = self._work(padded)
                self._graphs[padded] = self.graphs.record(work, work)[0]
            logger.info("steady steps: prompts are read once for all of their completions")
        return size, self._graphs[size]

    def _work(self, padded: int) -> Callable[[], None]:
        runner, manager = self.runner, self.runner.cudagraph_manager
        prepare, buffers = self.graphs.inputs(padded), runner.input_buffers
        slots = gpu("attn_utils", "build_slot_mappings_by_layer")(
            runner.block_tables.slot_mappings[:, :padded], runner.kv_cache_config
        )
        context = importlib.import_module("vllm.forward_context").set_forward_context
        mode = importlib.import_module("vllm.config.compilation").CUDAGraphMode.NONE
        given = {
            "input_ids": buffers.input_ids[:padded],
            "positions": buffers.positions[:padded],
            **runner.model_state.prepare_dummy_inputs(padded, padded),
        }

        def work() -> None:
            prepare()
            kernel().plan(buffers.seq_lens, self.groups, padded, self.chunk, self.units, self.programs, self.of)
            with self._instead(), context(
                dict.fromkeys(self.layers, self), runner.vllm_config, num_tokens=padded, cudagraph_runtime_mode=mode,
                slot_mapping=slots, is_padding=buffers.is_padding[:padded],
            ):  # fmt: skip
                manager.hidden_states[:padded] = runner.model(**given)

        return work

    @contextlib.contextmanager
    def _instead(self) -> Iterator[None]:
        """Inside, the layers' attention is `prefix_kernel`'s."""
        try:
            for layer in self.layers.values():
                layer.impl.forward = self._attend
            yield
        finally:
            for layer in self.layers.values():
                vars(layer.impl).pop("forward", None)  # not there where an interrupt came first

    def _attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any, output: Tensor,
        **scales: Any,
    ) -> Tensor:  # fmt: skip
        runner, count = self.runner, len(query)
        kernel().attend(
            query, cache, runner.block_tables.input_block_tables[0], runner.input_buffers.seq_lens, self.groups,
            self.units, output.view(count, layer.impl.num_heads, layer.impl.head_size),
            scale=layer.impl.scale, partial=self.partial, sums=self.sums, programs=self.programs,
        )  # fmt: skip
        return output


def _layers(runner: Any) -> dict[str, Any]:
    """The model's attention layers, by name."""
    found = runner.vllm_config.compilation_config.static_forward_context
    return {name: found[name] for groups in runner.attn_groups for group in groups for name in group.layer_names}


def kernel() -> Any:
    """The module, which imports Triton."""
    from slipstream.vllm_compat import prefix_kernel

    return prefix_kernel


def _spread(sizes: list[int]) -> list[int]:
    """Some of the sizes, in descending order, each at most four fifths of the one before."""
    taken = sizes[:1]
    for size in sizes[1:]:
        if size <= 0.8 * taken[-1] and size >= 8:
            taken.append(size)
    return taken
