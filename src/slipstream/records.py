"""The records that flow through one step: a prompt, its completions, and the scored rollouts made of them.

Token ids in, token ids out: text appears here only for reward functions and people, and is never tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.modeling.attention import Layout


@dataclass(slots=True, eq=False)
class Images:
    """The images of one prompt, as the engine and as the trained model take them.

    Attributes:
        pictures: PIL images, in the order of their places in the prompt.
        engine_ids: The prompt's token ids with one placeholder an image, as the chat template writes them. vLLM makes
            of each as many as the model has features for, which is what the trainer's processor does for `Prompt.ids`.
        features: The processor's tensors for the model (`pixel_values`, `image_grid_thw`, ...), on the CPU. Those of
            several prompts are joined along dimension 0.
        token_features: Its tensors of shape (1, prompt tokens) which mark tokens (`mm_token_type_ids`, ...); 0 is text.
    """

    pictures: tuple[Any, ...]
    engine_ids: list[int]
    features: dict[str, Tensor] = field(default_factory=dict)
    token_features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Prompt:
    """One dataset row, rendered and tokenized.

    Attributes:
        ids: Token ids that the engine continues, as the model sees them: with all placeholders of images.
        row: The dataset row as it was read; its columns other than `prompt` go to the reward functions, `image` and
            `images` to those that name them.
        index: Position of the row in its dataset (the same on every rank and after a resume).
        rendered: Whether `ids` follow from the row; False where a rollout function chose them.
        images: Its images; None where it has none.
    """

    ids: list[int]
    row: dict[str, Any]
    index: int
    rendered: bool = True
    images: Images | None = None


@dataclass(slots=True)
class Completion:
    """What an engine sampled for one prompt.

    Attributes:
        ids: Sampled token ids, including the end-of-sequence token when one was sampled.
        logprobs: Log-probability of each token under the distribution it was sampled from (after temperature and
            truncation), same length as `ids`: a list, or an array of float32; None when the engine was not asked for
            them.
        weight_version: Version of the policy weights that sampled it (number of optimizer steps they have seen); the
            first one's where the weights changed in between.
        finish_reason: "stop" (end of sequence or a stop string) or "length" (max_tokens reached).
        version_runs: (first token, version) of each stretch of tokens, where the weights changed in between.
    """

    ids: list[int]
    logprobs: Sequence[float] | None
    weight_version: int
    finish_reason: str
    version_runs: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Rollout:
    """One completion of one prompt, with everything training needs to know about it.

    Rollouts of a group share the same `prompt` object, so that code that can reuse a prompt's computation finds them.

    Attributes:
        prompt: The prompt.
        completion: The engine's completion.
        text: The completion in the prompt's own format: a string, or a list with one assistant message; with tools, all
            messages of it, turns of the model and results of tools.
        truncated: True if the completion's last token does not end a sequence.
        rewards: One value a reward function; None where the function could not score it.
        advantage: How much better than its group this completion was, in the trainer's own scaling.
        in_loss: Whether its tokens enter the loss.
        extra: What an algorithm adds: tensors of shape (completion length,) or scalars, by name. `loss_mask` is 1.0
            for the tokens that the policy wrote itself, where others are among them; only those enter the loss.
    """

    prompt: Prompt
    completion: Completion
    text: str | list[dict[str, Any]]
    truncated: bool
    rewards: list[float | None] = field(default_factory=list)
    advantage: float = 0.0
    in_loss: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def own_tokens(self) -> int:
        """Tokens of the completion that the policy wrote itself."""
        mask = self.extra.get("loss_mask")
        return len(self.completion.ids) if mask is None else int(mask.sum())


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What one optimizer step holds over all ranks: normalizers must not depend on how its rows are split.

    Attributes:
        rows: Completions.
        tokens: Completion tokens that enter the loss.
        chosen_tokens: Those of them that the entropy mask keeps; all of them without one.
        ranks: Processes whose gradients are averaged.
        kept_rows: Completions of which some tokens enter the loss.
    """

    rows: int
    tokens: float
    ranks: int
    chosen_tokens: float = 1.0
    kept_rows: int = 0


class Segment(NamedTuple):
    """A stretch of a packed row: its tokens see each other causally, and all of its parent's.

    Attributes:
        length: Tokens.
        parent: Which segment of the row it continues, a prompt that several completions share; None: none.
    """

    length: int
    parent: int | None = None


@dataclass(slots=True)
class MicroBatch:
    """Rollouts as tensors, for one forward and backward pass.

    B rows of at most T tokens (prompt, then completion, then padding); N completion tokens, row after row. Packed, all
    rollouts stand in one row (B = 1) and what is said of rows below is said of rollouts.

    Attributes:
        rollouts: The rows.
        input_ids_BT: Token ids, padded on the right.
        attention_mask_BT: 1 for tokens, 0 for padding.
        positions_N: Where in the flattened (B*T) input each completion token is predicted from. Completions that share
            a prompt are all predicted from its last token first.
        targets_N: The completion tokens.
        rows_N: Row of each completion token.
        mask_N: 1.0 for tokens that enter the loss.
        advantages_B: Advantage of each row.
        totals: Of the optimizer step that this is a part of.
        per_token: Values given to each completion token beforehand, by name, shape (N,): `sampler_logps`, `old_logps`,
            `ref_logps`, `entropy_mask` where they are needed.
        group_size: Completions of a prompt that stand side by side; 1 where they were not kept together.
        position_ids_BT: Position of each token in its own sequence; None: as the columns are numbered.
        layout: What the one packed row consists of, and what attention needs to know about it; None: rows are padded.
        features: What else the model is called with, by name, where rows have images: `pixel_values` and the like, all
            rows' after each other, and (B, T) marks of tokens.
    """

    rollouts: list[Rollout]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    mask_N: Tensor
    advantages_B: Tensor
    totals: StepTotals
    per_token: dict[str, Tensor]
    group_size: int = 1
    position_ids_BT: Tensor | None = None
    layout: Layout | None = None
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def segments(self) -> tuple[Segment, ...] | None:
        """What the one packed row consists of, from left to right; None: rows are padded."""
        return None if self.layout is None else self.layout.segments

    def split_rows(self, values_N: Tensor) -> list[Tensor]:
        """Cut a value per completion token into one tensor a row."""
        return list(values_N.split([len(r.completion.ids) for r in self.rollouts]))
