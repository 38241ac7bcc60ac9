"""The settings of `slipstream vllm-serve`: one field an option, each checked before anything starts."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from slipstream.checks import number, one_of

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")
BACKENDS = ("mp", "ray", "uni")  # external_launcher needs a launcher
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# Engine options under the name that they have here.
RENAMED = {"model_impl": "vllm_model_impl"}
# Fields of `Settings` that are options of vLLM's engine.
ENGINE = (
    "model", "revision", "tensor_parallel_size", "gpu_memory_utilization", "dtype", "max_model_len",
    "enable_prefix_caching", "enforce_eager", "kv_cache_dtype", "trust_remote_code", "distributed_executor_backend",
    "speculative_config",
)  # fmt: skip


def _option(default: Any, panel: str, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "panel": panel})


@dataclasses.dataclass
class Settings:
    """What a server is started with.

    Attributes:
        engine_options: Further options of vLLM's engine, by its names.

    Raises:
        ValueError: a value is not allowed; the message says which is.
    """

    model: str = _option("", "Model", "The model to serve: a name or a folder.")
    revision: str | None = _option(None, "Model", "Branch, tag or commit of it; by default the main one.")
    dtype: str = _option(
        "auto",
        "Model",
        "Type of its weights: float32, bfloat16, float16; auto is the checkpoint's, but 16 bits for float32.",
    )
    max_model_len: int | None = _option(None, "Model", "Most tokens of prompt and completion; by default the model's.")
    trust_remote_code: bool = _option(False, "Model", "Run Python code that comes with the model.")
    reference: bool = _option(
        False,
        "Model",
        "Hold a second model, the reference, for Nash-MD and XPO; takes its memory and twice the cache per token.",
    )
    vllm_model_impl: str = _option("vllm", "Model", "Code that runs the model: vllm, or transformers by vLLM.")

    tensor_parallel_size: int = _option(1, "Devices", "Devices that one replica's weights are split over.")
    data_parallel_size: int = _option(1, "Devices", "Replicas. Prompts are spread over them.")
    gpu_memory_utilization: float = _option(0.9, "Devices", "Share of each device's memory for weights and cache.")
    distributed_executor_backend: str | None = _option(
        None,
        "Devices",
        "How tensor-parallel workers run: mp, or ray for several machines; by default vLLM chooses.",
    )
    enforce_eager: bool = _option(False, "Devices", "Run without CUDA graphs: starts faster, generates slower.")
    enable_prefix_caching: bool | None = _option(
        None, "Devices", "Share the work on common beginnings of prompts; on by default (--no-enable-prefix-caching)."
    )
    kv_cache_dtype: str = _option("auto", "Devices", "Type of cached keys and values: auto is the model's; fp8.")
    speculative_config: str | None = _option(
        None, "Devices", "vLLM's settings of speculative decoding, as JSON; by default there is none."
    )

    host: str = _option("0.0.0.0", "Network", "Address to listen on; 127.0.0.1 for this machine alone.")
    port: int = _option(8000, "Network", "Port to listen on; 0 chooses a free one and prints it.")
    log_level: str = _option("info", "Network", "What is logged: debug, info, warning, error or critical.")

    max_body_size: int = _option(256, "Limits", "MiB of one request's body (weights may be as large as announced).")
    max_prompts: int = _option(16_384, "Limits", "Prompts of one request.")
    max_completions: int = _option(65_536, "Limits", "Completions of one request.")
    max_request_tokens: int = _option(1 << 28, "Limits", "Tokens that one request may lead to, all together.")
    start_timeout: float = _option(1800.0, "Limits", "Seconds in which a replica must have started.")
    update_timeout: float = _option(300.0, "Limits", "Seconds for a step of a weight update; then it is aborted.")

    engine_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is missing: give it as --model or in the --config file.")
        for name in ("model", "dtype", "kv_cache_dtype", "host"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be text.")
        if self.model.startswith(("/", "./", "../", "~")) and not os.path.exists(self.model):
            raise ValueError(f"model={self.model!r}: there is no such folder.")
        for name in (
            "tensor_parallel_size", "data_parallel_size", "max_body_size", "max_prompts", "max_completions",
            "max_request_tokens",
        ):  # fmt: skip
            number(name, getattr(self, name), least=1, integer=True)
        if self.max_model_len is not None:
            number("max_model_len", self.max_model_len, least=1, integer=True)
        number("port", self.port, least=0, most=65535, integer=True)
        number("gpu_memory_utilization", self.gpu_memory_utilization, above=0, most=1)
        number("start_timeout", self.start_timeout, above=0)
        number("update_timeout", self.update_timeout, above=0)
        one_of("dtype", self.dtype, DTYPES)
        backend = self.distributed_executor_backend
        if backend is not None and "." not in backend:  # a class of the user's own has a dotted name
            one_of("distributed_executor_backend", backend, BACKENDS)
        one_of("vllm_model_impl", self.vllm_model_impl, ("vllm", "transformers"))
        one_of("log_level", self.log_level, LOG_LEVELS)
        self.speculative_config = self._mapping("speculative_config", self.speculative_config)
        if self.reference and self.speculative_config:
            raise ValueError("speculative_config does not go with reference, whose tokens no draft model knows.")

    @staticmethod
    def _mapping(name: str, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a JSON object, as '{{\"method\": ...}}'.")
        return value

    @property
    def workers(self) -> int:
        """Processes that hold weights, of all replicas."""
        return self.replica_workers * self.data_parallel_size

    @property
    def replica_workers(self) -> int:
        """Those of one replica: tensor-parallel times pipeline-parallel, which is an option of vLLM's engine."""
        return self.tensor_parallel_size * int(self.engine_options.get("pipeline_parallel_size", 1))

    def engine(self) -> dict[str, Any]:
        """Options of vLLM's engine, by its names; None leaves one to vLLM."""
        own = {name: getattr(self, name) for name in ENGINE}
        own |= {theirs: getattr(self, ours) for theirs, ours in RENAMED.items()}
        return {name: value for name, value in own.items() if value is not None} | self.engine_options

    def replica(self) -> dict[str, Any]:
        """`ReplicaSettings` as plain data, for a replica that is a child of this process."""
        return {
            "engine": self.engine(), "reference": self.reference, "log_level": self.log_level, "parent": os.getpid(),
        }  # fmt: skip
