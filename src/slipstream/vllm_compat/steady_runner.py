"""Steps that only decode as three CUDA graphs: their inputs, the model, and the sampling.

vLLM replays the model's graph, and makes its inputs, the attention's metadata and the samples around it from Python, in
forty launches a step that a small model's GPU waits for. In a step that `steady` has scheduled all of it follows from
what lies on the GPU already. So the inputs are one kernel (`steady_kernel`) and vLLM's own metadata kernel, recorded as
a graph; the sampling is vLLM's own kernels, recorded as another. Where enough of what sequences begin with is shared,
the first two are one graph, of `steady_model`. The state that they leave on the GPU is the one that vLLM's way leaves,
and on the host it keeps none that it does not get anew with every step: a step of either way may follow one of the
other.

Only for what was read and is tested: the V2 model runner of vLLM 0.26 on one GPU with FlashAttention, plain sampling
(temperature and seeds; no penalties, biases, top-k or top-p).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.vllm_compat.sampled_logprobs import MODE, Recorder
from slipstream.vllm_compat.steady_graphs import Graphs, Wanted, gpu, only_decodes
from slipstream.vllm_compat.steady_model import SAVED, SharedModel, obstacle

logger = logging.getLogger(__name__)

VERSIONS = ("0.26.",)
"""vLLM's versions whose model runner was read, and is tested, for what is done here."""


def install(worker: Any, version: str, recorder: Recorder | None = None) -> str | SteadyRunner:
    """Let the model runner of `worker` make steady steps by graphs. Returns what makes them, or why nothing can.

    Args:
        worker: vLLM's, in this process.
        version: Of vLLM.
        recorder: Is told what is sampled while it is on (see `sampled_logprobs`).
    """
    why = _obstacle(worker.model_runner, version)
    return why or SteadyRunner(worker.model_runner, recorder)


def _obstacle(runner: Any, version: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not version.startswith(VERSIONS):
        return f"vLLM {version} was not tried"
    if type(runner) is not gpu("model_runner", "GPUModelRunner"):
        return f"its model runner is a {type(runner).__module__}.{type(runner).__name__}"
    parallel = runner.parallel_config
    if parallel.world_size > 1 or runner.dp_size > 1 or runner.use_dcp or runner.pcp_manager is not None:
        return "the model is spread over devices"
    if runner.lora_config or runner.speculator or runner.is_pooling_model or parallel.enable_eplb:
        return "it has adapters, a speculator, a pooler or balanced experts"
    if runner.kv_connector is not gpu("kv_connector", "NO_OP_KV_CONNECTOR"):
        return "a connector sees every step"
    state = runner.model_state
    if type(state) is not gpu("model_states.default", "DefaultModelState") or state.rope_state or state.mm_pruner:
        return f"its model keeps a state of its own ({type(state).__name__})"
    if runner.supports_mm_inputs or runner.encoder_cache is not None:
        return "its model takes images"
    if type(runner.sampler) is not gpu("sample.sampler", "Sampler") or runner.sampler.compute_nans:
        return f"it samples with {type(runner.sampler).__name__}"
    envs = importlib.import_module("vllm.envs")
    if envs.VLLM_MOE_SKIP_PADDING or envs.VLLM_BATCH_INVARIANT:
        return "padding or batches are treated in a special way"
    groups = [group for groups in runner.attn_groups for group in groups]
    known: Any = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    builders = [type(group.get_metadata_builder(0)) for group in groups]
    if builders != [known.FlashAttentionMetadataBuilder] or runner.model_config.rswa_window:
        return "not all layers use FlashAttention in the same way"
    manager = runner.cudagraph_manager
    if manager is None or not any(map(only_decodes, manager.graphs)) or manager.use_aux_hidden_state_outputs:
        return "the engine has no CUDA graphs of decode steps alone (enforce_eager or cudagraph_mode)"
    return None


class SteadyRunner:
    """Stands before a model runner's own methods."""

    def __init__(self, runner: Any, recorder: Recorder | None) -> None:
        self.runner, self.recorder, self.graphs = runner, recorder, Graphs(runner)
        self.manager, self.states = runner.cudagraph_manager, runner.req_states
        self.shared: SharedModel | None = None
        """The model's graphs that read common tokens once, where its attention allows it."""
        self.names: list[str] | None = None
        """Of the last step's sequences, as the scheduler's list; None when the last step was vLLM's own."""
        self.simple = False
        self.scaled = self.ranks = False
        self.index: dict[str, int] = {}
        self.under_way: tuple[int, list[str]] | None = None
        """Padded size and sequences of a step that is not sampled yet."""
        self.saved = self.total = 0
        """Tokens whose keys and values need not be read again in each step, and all that sequences attend to."""
        self.steps = self.steps_shared = 0
        """Steps made here, and those of them that read common tokens once, for tests and the curious."""
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute, self.sample

    def share(self, anywhere: bool = False) -> str | None:
        """From now on, read what sequences begin with once for all of them, where steps come with their `Prefixes`.
        Returns why not, where that cannot be, or, unless `anywhere`, is not known to be quicker."""
        why = obstacle(self.runner, self.graphs.sizes, anywhere)
        if why is None:
            try:
                self.shared = SharedModel(self.graphs)
            except torch.OutOfMemoryError:  # the cache has been given all of it
                why = "the GPU has no memory left for chunks' results"
        return why

    @torch.inference_mode()
    def execute(self, step: Any, *args: Any, **options: Any) -> Any:
        """`execute_model`: None, as vLLM's where sampling follows."""
        self.under_way = None  # not None where an exception came before the sampling
        if getattr(step, "slipstream_steady", False):
            description = self._ready(step)
            if description is not None:
                padded = self._run(step, description)
                self.under_way = (padded, step.scheduled_cached_reqs.req_ids)
                self.steps += 1
                return None
        else:
            self.names = None
        return self._execute(step, *args, **options)

    @torch.inference_mode()
    def sample(self, grammar: Any) -> Any:
        """`sample_tokens`, of the step that `execute` began."""
        if self.under_way is None:
            return self._sample(grammar)
        (padded, names), self.under_way = self.under_way, None
        count = len(names)
        recorder = self.recorder if self.recorder is not None and self.recorder.on else None
        wanted = Wanted(padded, self.scaled, recorder is not None or self.ranks, self.ranks)
        graph, samples = self.graphs.after(wanted)
        graph.replay()
        # The next step's replay overwrites what the graph has left.
        tokens = samples.tokens[:count].clone()
        logps = None if samples.logps is None else samples.logps[:count].clone()
        if recorder is not None:
            recorder.logps = logps
            recorder.step(names, tokens, self.graphs.one[:count])
        ranks = None if samples.ranks is None else samples.ranks[:count].clone()
        return _output_class()(self.runner, names, self.index, tokens, logps if self.ranks else None, ranks)

    def _run(self, step: Any, description: Any) -> int:
        """Compute a step's hidden states. Returns for how many sequences."""
        shared, count = self.shared, len(step.scheduled_cached_reqs.req_ids)
        self.total += count
        # All graphs are recorded now, whichever this step takes: see `Graphs` on recording later.
        before = self.graphs.before(description.num_tokens)
        found = shared.graph(count) if shared is not None and shared.pays(self.saved) else None
        if found is not None and self.saved > SAVED * self.total:
            padded, graph = found
            graph.replay()
            self.steps_shared += 1
            return padded
        before.replay()
        self.manager.run_fullgraph(description)
        return int(description.num_tokens)

    def _ready(self, step: Any) -> Any | None:
        """Bring vLLM's states up to a step. Returns its graph's description, or None: vLLM makes this one."""
        cached = step.scheduled_cached_reqs
        names, count = cached.req_ids, len(cached.req_ids)
        description = self._description(count)
        if description is None:
            self.names = None
            return None
        if names is not self.names and names != self.names:
            # Those that have ended are still known, until `finish_requests`; those of the step are not touched by it.
            places, copy = self.states.req_id_to_index, gpu("buffer_utils", "async_copy_to_gpu")
            rows = np.fromiter((places[name] for name in names), np.int32, count)
            if self.names is None:
                # Sequences only leave until vLLM makes a step of its own again.
                self.simple = self._samples_plainly(rows)
                if self.simple:
                    states = self.runner.sampler.sampling_states
                    copy(states.temperature.np, out=self.graphs.temperature)
                    copy(states.seeds.np, out=self.graphs.seeds)
            if self.simple:
                copy(np.concatenate([np.array([count], np.int32), rows]), out=self.graphs.rows[: 1 + count])
                self._groups(step)
            self.names, self.index = names, {name: place for place, name in enumerate(names)}
        if not self.simple:
            return None
        self.runner.finish_requests(step)
        places, grown = self.states.req_id_to_index, False
        for name, blocks in zip(names, cached.new_block_ids, strict=True):
            if blocks is not None:
                self.runner.block_tables.append_block_ids(places[name], blocks, overwrite=False)
                grown = True
        if grown:
            self.runner.block_tables.apply_staged_writes()
        return description

    def _groups(self, step: Any) -> None:
        """Bring up who is read for together."""
        prefixes, self.saved = getattr(step, "slipstream_prefixes", None), 0
        if self.shared is not None and prefixes is not None:
            groups, self.saved = prefixes.read(self.shared.most)
            if self.saved:
                self.total = sum(step.scheduled_cached_reqs.num_computed_tokens)
                padded = np.pad(groups, ((0, 0), (0, self.shared.groups.shape[1] - groups.shape[1])))
                gpu("buffer_utils", "async_copy_to_gpu")(padded, out=self.shared.groups)

    def _description(self, count: int) -> Any | None:
        """vLLM's name for its graph of a step of `count` sequences."""
        found = self.manager.dispatch(count, count, 1, 0)
        return found if only_decodes(found) and found.cg_mode.name == "FULL" and found in self.manager.graphs else None

    def _samples_plainly(self, rows: np.ndarray) -> bool:
        """Whether nothing but temperatures and seeds decides what rows of vLLM's states sample."""
        sampler, states = self.runner.sampler, self.runner.sampler.sampling_states
        temperature, most = states.temperature.np[rows], states.max_num_logprobs(rows)
        self.scaled = bool(((temperature != 0) & (temperature != 1)).any())
        self.ranks = bool(most == 0)
        return not (
            most > 0
            or (self.ranks and sampler.logprobs_mode != MODE)
            or (states.top_k.np[rows] != states.vocab_size).any()
            or (states.top_p.np[rows] != 1).any()
            or (states.min_p.np[rows] != 0).any()
            or sampler.penalties_state.use_penalty[rows].any()
            or sampler.logit_bias_state.use_logit_bias[rows].any()
            or sampler.bad_words_state.num_bad_words.np[rows].any()
            or sampler.logprob_token_ids_state.num_token_ids.np[rows].any()
            or self.runner.prompt_logprobs_worker.uses_prompt_logprobs[rows].any()
        )


@functools.cache
def _output_class() -> type:
    """A step's tokens on their way to the host, as vLLM's engine expects them."""
    outputs = importlib.import_module("vllm.v1.outputs")

    class Output(outputs.AsyncModelRunnerOutput):  # type: ignore[name-defined]
        def __init__(
            self, runner: Any, names: list[str], index: dict[str, int], tokens: Tensor,
            logps: Tensor | None, ranks: Tensor | None,
        ) -> None:  # fmt: skip
            self.names, self.index, self.kept = names, index, (tokens, logps, ranks)
            self.arrived = torch.cuda.Event(blocking=True)
            main, copies = runner.main_stream, runner.output_copy_stream
            with gpu("async_utils", "stream")(copies, main):
                copies.wait_stream(main)
                self.tokens = tokens.to("cpu", non_blocking=True)
                self.logprobs = None
                if logps is not None and ranks is not None:
                    self.logprobs = outputs.LogprobsTensors(tokens, logps[:, None], ranks).to_cpu_nonblocking()
                self.arrived.record(copies)

        def get_output(self) -> Any:
            self.arrived.synchronize()
            made = outputs.ModelRunnerOutput(
                req_ids=self.names, req_id_to_index=self.index, sampled_token_ids=self.tokens.tolist()
            )
            if self.logprobs is not None:
                made.logprobs = self.logprobs.tolists()
            return made

    return Output
