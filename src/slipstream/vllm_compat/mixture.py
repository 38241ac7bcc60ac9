"""Policy and reference in one engine: the token logits sampled from are the policy's, the reference's, or a mixture.

Where vLLM makes its model, two are made, the second under names of its own, so that each has attention layers and
cached keys and values of its own. `MixtureModel` runs the ones that the current mixture needs. Doing this where models
are made, instead of registering a class of ours, keeps whatever vLLM decides by the model's real class and name.
"""

from __future__ import annotations

import functools
import importlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.vllm_compat import REFERENCE_OPTION, load

POLICY, REFERENCE = "policy", "reference"
"""The two models of an engine with a reference."""

# The attribute of a reference's modules by which their compiled code is kept apart.
_PART = "slipstream_part"
_SECRET = secrets.token_hex(16)
# While vLLM measures how much memory a forward pass takes, both models run.
_AT_START = 0.5


def install() -> None:
    """From now on, engines in this process whose `additional_config` has REFERENCE_OPTION get a reference."""
    load()
    loader: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    original = loader.initialize_model
    if hasattr(original, "makes_reference"):
        return

    @functools.wraps(original)
    def initialize_model(vllm_config: Any, *, prefix: str = "", **options: Any) -> nn.Module:
        def build(prefix: str) -> nn.Module:
            model: nn.Module = original(vllm_config=vllm_config, prefix=prefix, **options)
            return model

        if not dict(vllm_config.additional_config or {}).get(REFERENCE_OPTION):
            return build(prefix)
        return MixtureModel(vllm_config=vllm_config, prefix=prefix, build=build)

    _compile_apart()
    initialize_model.makes_reference = True  # type: ignore[attr-defined]
    loader.initialize_model = initialize_model


def _compile_apart() -> None:
    """Let vLLM keep a reference's compiled code apart from its policy's.

    It saves a compiled model under a key made of the configuration and the model's class, which are the same for both,
    and the second to be compiled would be given the first's code, with the names of the first's attention layers in it:
    mixtures would then read and write the policy's keys and values for both.
    """
    decorators: Any = importlib.import_module("vllm.compilation.decorators")
    original = decorators._model_hash_key

    @functools.wraps(original)
    def key(forward: Callable[..., Any]) -> str:
        part = getattr(getattr(forward, "__self__", None), _PART, "")
        return f"{original(forward)}{part}"

    decorators._model_hash_key = key


class MixtureModel(nn.Module):
    """Two models of one architecture that stand where vLLM expects one.

    Args:
        vllm_config: The engine's configuration.
        prefix: Of the names of the model's layers.
        build: Makes a model whose layers' names have a prefix.

    Attributes:
        mixture: Share of the reference in the logits. At 0 the reference does not run, at 1 the policy does not, and
            each leaves its part of the key-value cache as it is: blocks written at 0, at 1 and between must not be
            taken for one another.

    Raises:
        NotImplementedError: The model takes images or the like, is spread over pipeline stages, or its layers would
            share keys and values with the other model's.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", build: Callable[[str], nn.Module]) -> None:
        super().__init__()
        if vllm_config.model_config.is_multimodal_model:
            raise NotImplementedError(
                f"{vllm_config.model_config.model}: an engine with a reference model takes text models only: the "
                "inputs of others are embedded before the two models see them. Use a text model, or use_vllm=False."
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise NotImplementedError("an engine with a reference model cannot be spread over pipeline stages")
        self.mixture = _AT_START
        self._config = vllm_config.model_config
        self.policy = build(prefix)
        own = f"{prefix}.{REFERENCE}" if prefix else REFERENCE
        with importlib.import_module("vllm.compilation.backends").set_model_tag(REFERENCE):  # compiled on its own
            self.reference = build(own)
        for module in self.reference.modules():
            setattr(module, _PART, REFERENCE)
        _check_layers(vllm_config.compilation_config.static_forward_context, f"{own}.")

    def __getattr__(self, name: str) -> Any:
        # vLLM asks its model for many more things, which are the same for both.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == POLICY:
                raise
            return getattr(self.policy, name)

    def embed_input_ids(self, input_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Rows of the policy's embedding. vLLM tells a text model by its having this, which from Python 3.12 on
        `__getattr__` cannot answer: `isinstance` with a protocol looks past it."""
        rows: Tensor = self.policy.embed_input_ids(input_ids, *arguments, **options)  # type: ignore[operator]
        return rows

    def forward(self, input_ids: Tensor | None, positions: Tensor, **inputs: Any) -> Tensor:
        """Hidden states, those of the policy and then those of the reference in the last dimension if both run."""
        models = self._running()
        # Kept in a copy: CUDA graphs of the second model may write to the memory that the first's answered in.
        states = [model(input_ids=input_ids, positions=positions, **inputs).clone() for model in models[:-1]]
        states.append(models[-1](input_ids=input_ids, positions=positions, **inputs))
        return torch.cat(states, dim=-1) if len(states) > 1 else states[0]

    def compute_logits(self, hidden_states: Tensor, **options: Any) -> Tensor | None:
        """Logits (rows, vocabulary) of what `forward` returned, at the rows that sample."""
        running = self._running()
        parts = hidden_states.chunk(len(running), dim=-1)
        logits = [model.compute_logits(part, **options) for model, part in zip(running, parts, strict=True)]  # type: ignore[operator]
        if len(logits) == 1 or logits[0] is None:  # None: another rank of a tensor-parallel group has them
            return logits[0]
        policy, reference = logits
        return reference.float() * self.mixture + policy.float() * (1 - self.mixture)

    def _running(self) -> list[nn.Module]:
        return [m for m, share in ((self.policy, 1 - self.mixture), (self.reference, self.mixture)) if share > 0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load a checkpoint into both; updates load into one of them (see `part`)."""
        loaded = self.policy.load_weights(weights)  # type: ignore[operator]
        ours, theirs = ([*model.parameters(), *model.buffers()] for model in (self.policy, self.reference))
        for mine, other in zip(ours, theirs, strict=True):
            other.data.copy_(mine.data)
        for model in (self.policy, self.reference):
            _retie(model, self._config)
        return None if loaded is None else {f"{which}.{name}" for which in (POLICY, REFERENCE) for name in loaded}

    def process_weights_after_loading(self) -> None:
        """What some models do once after loading, for both."""
        for model in (self.policy, self.reference):
            if hasattr(model, "process_weights_after_loading"):
                model.process_weights_after_loading()  # type: ignore[operator]


def set_mixture(worker: Any, mixture: float) -> None:
    """Sample with this share of the reference from now on. Runs in the worker, as one collective call."""
    worker.model_runner.get_model().mixture = mixture


def cache_salt(mixture: float) -> str | None:
    """What keeps cached prefixes apart that were computed by the policy, by the reference, and by both.

    A client of the OpenAI routes, which can name a salt for the policy's, cannot guess it.
    """
    if mixture == 0:
        return None
    return f"{_SECRET}-{'reference' if mixture == 1 else 'mixture'}"


@dataclass(frozen=True, slots=True)
class Part:
    """One of a worker's two models, with what loading and checking weights needs of a worker.

    Attributes:
        model: The model.
        vllm_config: The engine's configuration.
        model_config: The model's.
    """

    model: nn.Module
    vllm_config: Any
    model_config: Any

    @property
    def model_runner(self) -> Part:
        """Itself: it answers for the runner as well."""
        return self

    def get_model(self) -> nn.Module:
        """The model."""
        return self.model


def part(worker: Any, which: str) -> Any:
    """The worker as far as its policy or its reference is concerned; the worker itself if it has no reference.

    Raises:
        ValueError: The reference is asked for, and there is none.
    """
    model = worker.model_runner.get_model()
    if isinstance(model, MixtureModel):
        return Part(getattr(model, which), worker.vllm_config, worker.model_runner.model_config)
    if which == REFERENCE:
        raise ValueError("the engine was made without a reference model")
    return worker


def _check_layers(layers: dict[str, Any], prefix: str) -> None:
    """Raise unless each model has caching layers of its own. Found late, wrong keys would look like a worse model."""
    reference = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
    shared = [
        name
        for name, layer in reference.items()
        if not (getattr(layer, "kv_sharing_target_layer_name", None) or prefix).startswith(prefix)
    ]
    if shared or {name.removeprefix(prefix) for name in reference} != layers.keys() - reference.keys():
        raise NotImplementedError(
            "this model cannot sample with a reference in one vLLM engine, because its two copies would share keys and "
            f"values: its attention layers are {', '.join(list(layers)[:6])} .... Set use_vllm=False."
        )


def _retie(model: nn.Module, config: Any) -> None:
    # vLLM 0.32 and later untie a head that the checkpoint has as well, and tie it again where a model has one head.
    try:
        tying: Any = importlib.import_module("vllm.model_executor.model_loader.weight_tying")
    except ModuleNotFoundError:
        return
    tying.maybe_retie_word_embeddings(model, config)
