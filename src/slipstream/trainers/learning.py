"""Learning from scored rollouts: micro-batches forward and backward, and log-probabilities under other models."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from slipstream.generation.guest import RandomStates
from slipstream.modeling.attention import packed_attention
from slipstream.modeling.budget import CudaMeter, Meter, gradients_aside, measured_budget, optimizer_promise
from slipstream.modeling.logprobs import PolicyOutput, score_tokens
from slipstream.modeling.packable import obstacle
from slipstream.modeling.packing import Packer, loss_mask
from slipstream.records import MicroBatch, Rollout, StepTotals
from slipstream.reporting import ProgressReporter
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.trainers import vision
from slipstream.trainers.loop import SlotLoop
from slipstream.trainers.metrics import Clock, Tally
from slipstream.trainers.sharding import is_sharded


class _WhenDivided(TrainerCallback):
    """Tries packed rows on a model when transformers has divided it over the ranks."""

    def __init__(self, trainer: Learning) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.try_packing(self.trainer.packer)


class Learning(SlotLoop):
    """The half of a trainer that learns.

    Attributes:
        reference: The reference model; None where there is none, or where it is the policy without its adapter.
    """

    clock: Clock
    packer: Packer
    progress: ProgressReporter
    renderer: PromptRenderer
    reference: nn.Module | None
    _parameters: int
    _scorers: Sequence[Any]

    def make_packer(self, images: bool) -> Packer:
        """What makes micro-batches: packed ones, if they are asked for and the models and their rows allow it."""
        args = self.args
        pad_token_id = self.renderer.tokenizer.pad_token_id
        placeholders = vision.placeholder_ids(self.accelerator.unwrap_model(self.model).config)
        packer = Packer(
            args.micro_batch_rows,
            pad_token_id,
            self.accelerator.device,
            args.pad_to_multiple_of,  # type: ignore[arg-type]  # the config has resolved it
            packed=args.packing,
            # A shared prompt would count once in the balance of experts.
            share_prompts=args.share_prompts and not self.scoring_options().get("router_loss"),
            max_tokens=args.max_tokens_per_micro_batch,
            agree=self._most_of_all_ranks,
            placeholders=placeholders if self.renderer.processor is not None else (),
        )
        if images:
            vision.check_padding(pad_token_id, placeholders)
            packer.expect_images()
        if is_sharded(self.accelerator):
            # Until then the model is on the CPU, and maybe on one rank alone.
            self.add_callback(_WhenDivided(self))
        else:
            self.try_packing(packer)
        return packer

    def try_packing(self, packer: Packer) -> None:
        """Let rows be padded where the models do not allow packed ones."""
        if packer.packed and (why := self._obstacle()):
            packer.packed = False
            warnings.warn(f"packing=True: rows are padded instead of packed, since {why}.", UserWarning, stacklevel=4)

    def _obstacle(self) -> str | None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return f"it has not been tried with {self.accelerator.distributed_type.value}"
        for model in (self.model, self.reference):
            if model is not None:
                head = self.accelerator.unwrap_model(model).get_output_embeddings()
                with self.compute_loss_context_manager():
                    why = obstacle(model, head)
                if why:
                    return f"{type(self.accelerator.unwrap_model(model)).__name__} cannot be packed: {why}"
        return None

    def _find_budget(self, rollouts: Sequence[Rollout], meter: Meter | None = None) -> None:
        """Measure how many tokens a packed micro-batch may have, before the first optimizer step.

        Where it is given, was measured before, or cannot be measured (on a CPU, or where ranks have to compute
        together), nothing happens. Weights, gradients and random states stay as they are.

        Args:
            rollouts: This rank's rows of the step.
            meter: Measures memory; None: the accelerator's, if there is one.
        """
        device, packer = self.accelerator.device, self.packer
        if meter is None and device.type == "cuda":
            meter = CudaMeter(device)
        if not packer.packed or packer.max_tokens is not None or meter is None or is_sharded(self.accelerator):
            return
        # The bare model: no rank waits for another while one of them tries how far its memory goes.
        model = self.accelerator.unwrap_model(self.model_wrapped)
        together = self._rows_together(self.args.num_generations)
        # A rollout_func's completions may be longer than what is asked of the engine.
        most = self.args.max_completion_length
        longest = max((len(r.prompt.ids) + max(len(r.completion.ids), most) for r in rollouts), default=0)

        def run(tokens: int) -> int:
            batch = packer.trial(rollouts, tokens, together)
            with self.compute_loss_context_manager():
                output = self._policy(model, batch)
            parts = (output.logps_N, output.entropies_N, output.router_loss)
            torch.stack([p.sum() for p in parts if p is not None and p.requires_grad]).sum().backward()
            return batch.input_ids_BT.numel()

        states = RandomStates()
        try:
            with gradients_aside(model), packed_attention(model):
                budget = measured_budget(
                    run, meter, least=longest * together, most=longest * len(rollouts),
                    promised=optimizer_promise(self.optimizer, model), agree=self._most_of_all_ranks,
                )  # fmt: skip
        finally:
            states.restore()
        packer.max_tokens = budget.tokens
        if self.accelerator.is_main_process:
            self.progress.console.print(str(budget))

    def _set_training(self, training: bool) -> None:
        """Put the policy into training or evaluation mode, and an optimizer that has modes (a schedule-free one)."""
        self.model_wrapped.train(training)
        set_mode = getattr(self.optimizer, "train" if training else "eval", None)
        if callable(set_mode):
            set_mode()

    def _most_of_all_ranks(self, count: int) -> int:
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max().item())

    def _learn(self, model: nn.Module, rollouts: list[Rollout]) -> tuple[Tensor, dict[str, float]]:
        """Forward and backward over the rows of an optimizer step."""
        rollouts = list(self.learns_from(rollouts))
        self._find_budget(rollouts)
        self.prepare(model, rollouts)
        totals = self._totals(rollouts)
        tally = Tally()
        versions = [r.completion.weight_version for r in rollouts]
        staleness = self.state.global_step - torch.tensor(versions, dtype=torch.float32, device=self.args.device)
        tally.mean("staleness/mean", staleness)
        tally.max("staleness/max", staleness)
        # DeepSpeed would divide by gradient_accumulation_steps, and holds gradients back in a way of its own.
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"scale_wrt_gas": False} if deepspeed else {}
        # Where weights are divided, whole gradients may not fit either: each pass adds to this rank's part of them.
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", is_sharded(self.accelerator))
        loss = torch.zeros((), device=self.args.device)
        left = len(rollouts)
        with packed_attention(model) if self.packer.packed else contextlib.nullcontext():
            for batch in self.packer.pack(rollouts, totals, self._rows_together(self.args.num_generations)):
                left -= len(batch.rollouts)
                last = left == 0
                # Otherwise ranks exchange gradients once, in the last backward pass.
                self.accelerator.gradient_state._set_sync_gradients(last)
                with contextlib.nullcontext() if last or each or deepspeed else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        part = self.objective(self._policy(model, batch), batch, tally)
                    self.accelerator.backward(part, **options)
                loss += part.detach()
                self._step_flops += 6 * batch.input_ids_BT.numel() * self._parameters
        return loss, tally.reduce(self.accelerator)

    def _loss(self, rollouts: list[Rollout], real: int, group_size: int, tally: Tally) -> Tensor:
        """The loss of rows that nothing is learnt from; only the first `real` of them count."""
        counted = len(self.learns_from(rollouts[:real]))
        rollouts = list(self.learns_from(rollouts))
        self.prepare(self.model_wrapped, rollouts)
        totals = self._totals(rollouts, counted)
        loss = torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.packer.pack(rollouts, totals, self._rows_together(group_size)):
                loss += self.objective(self._policy(self.model_wrapped, batch), batch, tally)
        # The objective is made for gradients that are averaged over ranks.
        return self.accelerator.reduce(loss, "mean")

    def _rows_together(self, group_size: int) -> int:
        return group_size if self.keeps_groups else 1

    def _policy(self, model: nn.Module, batch: MicroBatch) -> PolicyOutput:
        return self._score_tokens(model, batch, **self.scoring_options())

    def _score_tokens(self, model: nn.Module, batch: MicroBatch, **options: Any) -> PolicyOutput:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        temperature = self.args.temperature if self.score_temperature is None else self.score_temperature
        # Accelerate lets a model that it has prepared compute in mixed precision, which the policy is not until it is
        # trained; it may be evaluated before, beside a reference and an engine that do.
        with contextlib.nullcontext() if torch.is_grad_enabled() else self.accelerator.autocast():
            return score_tokens(model, head, batch, temperature=temperature, **options)

    def _totals(self, rollouts: Sequence[Rollout], counted: int | None = None) -> StepTotals:
        kept = [r for r in rollouts if r.in_loss]
        tokens = sum(r.own_tokens for r in kept)
        chosen = sum(
            float((r.extra["entropy_mask"].cpu() * loss_mask(r)).sum()) if "entropy_mask" in r.extra else r.own_tokens
            for r in kept
        )
        own = [len(rollouts) if counted is None else counted, tokens, chosen, len(kept)]
        counts = torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)
        rows, tokens, chosen, kept_rows = self.accelerator.reduce(counts, "sum").tolist()
        ranks = self.accelerator.num_processes
        return StepTotals(int(rows), max(tokens, 1.0), ranks, max(chosen, 1.0), int(kept_rows))

    @torch.no_grad()
    def _annotate(self, model: nn.Module, rollouts: Sequence[Rollout], name: str, *, entropies: bool = False) -> None:
        """Give each rollout its log-probabilities (or entropies) under `model` as it is now, as `extra[name]`.

        In evaluation mode: the engine samples without dropout too, and nothing has to be recomputed.
        """
        was_training = model.training
        model.eval()
        try:
            with self.clock.phase("train"), self.compute_loss_context_manager():
                precise = self.scoring_options().get("float32_head", False)
                for batch in self.packer.pack(rollouts, StepTotals(0, 1.0, 1)):
                    output = self._score_tokens(model, batch, entropies=entropies, float32_head=precise)
                    values_N = output.entropies_N if entropies else output.logps_N
                    assert values_N is not None
                    for rollout, values in zip(batch.rollouts, batch.split_rows(values_N), strict=True):
                        rollout.extra[name] = values
        finally:
            model.train(was_training)

    def _annotate_reference(self, rollouts: Sequence[Rollout]) -> None:
        with self._reference_model() as model:
            self._annotate(model, rollouts, "ref_logps")

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        """The reference: a model of its own, or the policy with its adapter off."""
        if self.reference is not None:
            yield self.reference
            return
        with self.accelerator.unwrap_model(self.model_wrapped).disable_adapter():
            yield self.model_wrapped
