"""The configuration that Online DPO, Nash-MD and XPO share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slipstream.checks import number, one_of
from slipstream.config import OnlineConfig, option
from slipstream.generation.engine import Sampling
from slipstream.trainers import schedule


@dataclass
class PairwiseConfig(OnlineConfig):
    """What Online DPO, Nash-MD and XPO share; the rest is in `OnlineConfig`.

    Batch sizes count prompts here, each of which has two completions.
    """

    learning_rate: float = option(5e-7, "Initial learning rate of AdamW.")
    num_generations: int = option(2, "Completions sampled for each prompt: two, which are compared.")
    # A list or a number, and a number once it is checked if it is the only one; this is what argument parsers can read.
    beta: list[float] = option([0.1], "How strongly the policy is held to the reference; a list: one value an epoch.")
    max_new_tokens: int | None = option(None, "Largest number of tokens of a completion; None: 64.")
    max_completion_length: int | None = option(None, "Another name of max_new_tokens.")  # type: ignore[assignment]
    max_length: int = option(512, "Largest number of tokens of prompt and completion together.")
    overlong_prompts: str = option(
        "skip", "What to do with prompts that leave no room for max_new_tokens: `skip` them, or `error`."
    )
    temperature: float = option(0.9, "Sampling temperature.")
    missing_eos_penalty: float | None = option(None, "What the score of a completion loses that was cut off.")
    disable_dropout: bool = option(True, "Switch dropout off while training.")
    vllm_gpu_memory_utilization: float = option(0.55, "Share of the GPU's memory that vLLM may take (colocate).")
    reward_model_path: str | None = option(None, "A reward model, where neither reward_funcs nor judge is given.")

    def _check_values(self) -> None:
        given = {n for n in (self.max_new_tokens, self.max_completion_length) if n is not None}
        if len(given) > 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_completion_length={self.max_completion_length} are the "
                "same thing: set one of them."
            )
        self.max_new_tokens = self.max_completion_length = longest = next(iter(given), 64)
        super()._check_values()
        self.beta = schedule.checked("beta", self.beta, above=0)
        number("max_length", self.max_length, least=2, integer=True)
        if self.max_length <= longest:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt before max_new_tokens="
                f"{self.max_new_tokens}: raise it, or lower max_new_tokens."
            )
        if self.missing_eos_penalty is not None:
            number("missing_eos_penalty", self.missing_eos_penalty, above=0)
        for name in ("num_generations", "num_generations_eval"):
            one_of(name, getattr(self, name), (2,) if name == "num_generations" else (None, 2))

    @property
    def micro_batch_rows(self) -> int:
        """Completions of one micro-batch of one process: two a prompt."""
        return 2 * self.per_device_train_batch_size

    def sampling(self, *, evaluation: bool = False) -> Sampling:
        """The sampling parameters of training, or of evaluation. The losses do not need the sampler's probabilities."""
        return replace(super().sampling(evaluation=evaluation), logprobs=False)
