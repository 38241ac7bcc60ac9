"""The engine's model: what it cannot do, its weights, loading them, a rehearsal of that, and packed copies of them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slipstream.vllm_compat import on_cpu

if TYPE_CHECKING:
    from slipstream.weights.verify import Probe


def model_of(worker: Any) -> Any:
    """A worker's model."""
    return worker.model_runner.get_model()


def parameters(worker: Any, buffers: Iterable[str] = ()) -> dict[str, Any]:
    """A worker's parameters by name, tied ones once, and the buffers of these names."""
    model = worker.model_runner.get_model()
    found: dict[int, tuple[str, Any]] = {}
    _walk(model, "", found)
    held = {name: parameter.data for name, parameter in found.values()}
    return held | {name: model.get_buffer(name).data for name in buffers}


def _walk(module: Any, prefix: str, found: dict[int, tuple[str, Any]]) -> None:
    """What `named_parameters` yields, in a tenth of its time: every update asks."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.setdefault(id(parameter), (prefix + name, parameter))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", found)


def check_updatable(worker: Any) -> None:
    """Raise NotImplementedError if the model has layers whose weights this vLLM cannot replace.

    On CPU the experts of a mixture are packed in place at the first load and only there, so that after an update the
    kernel would read plain weights as packed ones, and every bit of them would look right.
    """
    for name, module in worker.model_runner.get_model().named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if on_cpu() and "MoE" in method:
            raise NotImplementedError(
                f"{name} ({method}): vLLM cannot update the weights of a mixture of experts on CPU. Use a dense "
                "model, a GPU, or use_vllm=False."
            )


def check_graphs(worker: Any) -> None:
    """Raise NotImplementedError if steps of prompts and completions together would be replays of wrong CUDA graphs.

    Later vLLMs record a graph of such steps for the longest run of tokens that it may be replayed with. Where the
    graphs do not say for which they were recorded, attention passes over the rest: on an H200 with vLLM 0.26 sampled
    tokens' log-probabilities were off by 2.8 nats on average, in silence.
    """
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    for graph in getattr(manager, "graphs", ()):
        whole = graph.cg_mode.name == "FULL" and graph.uniform_token_count is None
        if whole and not hasattr(graph, "max_query_len"):
            raise NotImplementedError(
                "compilation_config: cudagraph_mode is 'FULL', or was made so by another option of it, and this vLLM's "
                "graphs of whole steps that compute prompts give wrong tokens. Use 'FULL_AND_PIECEWISE' (the default), "
                "'FULL_DECODE_ONLY' or 'PIECEWISE'."
            )


def load_weights(worker: Any, tensors: Iterable[tuple[str, Any]]) -> None:
    """Replace the weights of a worker's model, layer by layer, into the memory that its graphs and kernels use."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = worker.model_runner.get_model(), worker.model_runner.model_config
    with set_current_vllm_config(worker.vllm_config), _quiet("vllm.model_executor.model_loader.reload.layerwise"):
        initialize_layerwise_reload(model)
        try:
            model.load_weights(tensors)
        finally:
            # Also after a failure: without it the layers stay half taken apart, and the next load would go wrong.
            finalize_layerwise_reload(model, config)
        repack_tied_heads(model)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A model whose tensors have no memory, for as long as `rehearsal` lasts.

    Attributes:
        parameters: By name (tied ones once), with the shapes they have while loading.
        buffers: Those that a checkpoint of the model may have, in the same way.
        noise: Whether these hold noise until an update fills them: vLLM's dummy weights are of buffers, too.
        load: The model's loading.
    """

    parameters: dict[str, Any]
    buffers: dict[str, Any]
    noise: bool
    load: Callable[[Iterable[tuple[str, Any]]], Any]


@contextlib.contextmanager
def rehearsal(worker: Any) -> Iterator[Rehearsal]:
    """Replace a worker's parameters and buffers by tensors without memory, for the time of a `with` block.

    The real ones come back at the end, whatever happened to the others.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta, to_meta_tensor

    model = worker.model_runner.get_model()
    noise = worker.vllm_config.load_config.load_format == "dummy"
    names, saved = [name for name, _ in model.named_parameters()], _saved_buffers(model, noise)
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set))
            for m in model.modules()]  # fmt: skip
    try:
        for module in model.modules():
            restore_layer_on_meta(module, get_layerwise_info(module))
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    blank: Any = to_meta_tensor(tensor)
                    loader: Any = getattr(blank, "weight_loader", None)
                    # A reload leaves its wrapper on the shape records; below it is the model's own loader.
                    while getattr(loader, "__name__", "") == "online_process_loader":
                        loader = loader.__wrapped__
                        blank.weight_loader = loader
                    tensors[name] = blank
        blanks = {name: model.get_parameter(name) for name in names}
        # What was made after loading is not there while it lasts.
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        with set_current_vllm_config(worker.vllm_config):
            yield Rehearsal(blanks, buffers, noise, model.load_weights)
    finally:
        for module, attributes, own_parameters, buffers, non_persistent in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for current, before in ((module._parameters, own_parameters), (module._buffers, buffers)):
                current.clear()
                current.update(before)
            module._non_persistent_buffers_set = non_persistent


def _saved_buffers(model: Any, constants: bool) -> set[str]:
    """Names of the buffers that a checkpoint may have: of floats, which are saved with the model.

    Not those that attention sets after each load, whose names begin with "_". Layers of vLLM's own without any
    parameter (that scale images, for instance) hold constants, wanted only with `constants`.
    """
    found = set()
    for prefix, module in model.named_modules():
        own = type(module).__module__.startswith("vllm.model_executor.layers.")
        if own and not constants and not any(p is not None for p in module._parameters.values()):
            continue
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_floating_point() or name.startswith("_"):
                continue
            if name not in module._non_persistent_buffers_set:
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


def packed_layers(worker: Any) -> list[Probe]:
    """The layers that compute with a packed copy of their weight, as vLLM's matrix products on CPU do."""
    if not on_cpu():
        return []
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from slipstream.weights.verify import Probe

    model = worker.model_runner.get_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    probes = []
    for name, module in model.named_modules():
        if not hasattr(module, "cpu_linear") or not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            continue
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            continue  # looked up in, never multiplied by
        apply = functools.partial(module.quant_method.apply, module)
        probes.append(Probe(name, names[id(module.weight)], apply, module.weight.dtype))
    return probes


def more_than_copies(worker: Any) -> str | None:
    """Why loading weights into the model is more than copies into its parameters, by its layers; None if it is not.

    What vLLM does after a load is asked of each layer: its quantization method, and a `process_weights_after_loading`
    of its own. Of these, the unquantized methods of linear layers and embeddings do nothing on a GPU, and plain
    attention sets its scales to the constants that they have already. All others (quantization, experts, MLA, attention
    with sinks in another type, fused operators) are named here, and so are tensors that a layer keeps beside its
    parameters and buffers, which may be made from weights.
    """
    if on_cpu():
        layers = packed_layers(worker)
        if layers:
            return f"{layers[0].layer} computes with a packed copy"
    import torch
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.attention.backend import AttentionImplBase

    constants = _scales_of_attention()
    for name, module in worker.model_runner.get_model().named_modules():
        method = getattr(module, "quant_method", None)
        if type(method) not in (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            return f"{name} ({type(method).__name__})"
        if isinstance(module, Attention):
            after = type(module.impl).process_weights_after_loading
            same = type(module).process_weights_after_loading is Attention.process_weights_after_loading
            if not same or after is not AttentionImplBase.process_weights_after_loading:
                return f"{name} ({type(module.impl).__name__})"
        elif hasattr(module, "process_weights_after_loading"):
            return f"{name} ({type(module).__name__})"
        beside = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        if isinstance(module, Attention):
            beside = sorted({*beside} - {"kv_cache"} - constants)
        if beside:
            return f"{name}.{beside[0]} (a tensor beside the parameters)"
    return None


def _scales_of_attention() -> set[str]:
    """Tensors that attention without quantization keeps beside its parameters: it sets them to constants."""
    import torch
    from vllm.model_executor.layers.attention import attention

    layer = torch.nn.Module()
    before = set(vars(layer))
    attention.set_default_quant_scales(layer, register_buffer=True)
    return set(vars(layer)) - before


def buffers(worker: Any, but: Collection[str] = ()) -> list[Any]:
    """A worker's buffers, except `but`: rotary tables, attention's scales and the like, also those not saved."""
    return [buffer for name, buffer in worker.model_runner.get_model().named_buffers() if name not in but]


def forget_model(worker: Any) -> None:
    """Drop what vLLM's reload keeps about a model: it refers to the model's layers and would keep them alive."""
    from vllm.model_executor.model_loader.reload import layerwise

    for module in worker.model_runner.get_model().modules():
        layerwise.LAYERWISE_INFO.pop(module, None)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    # Layers without weights (rotary embeddings, a tied head) are reported as failures at every reload.
    vllm_logger = logging.getLogger(logger)
    level = vllm_logger.level
    vllm_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        vllm_logger.setLevel(level)


def repack_tied_heads(model: Any) -> None:
    """Pack a tied LM head anew on CPU: vLLM's reload refreshes the embedding's packed copy and forgets the head's."""
    if not on_cpu():
        return
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for head in embeddings:
        if isinstance(head, ParallelLMHead) and any(e is not head and e.weight is head.weight for e in embeddings):
            head.quant_method.process_weights_after_loading(head)
