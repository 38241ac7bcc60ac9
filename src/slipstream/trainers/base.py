"""The loop that the trainers share: sample, score, learn, send the weights back to the sampler."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from slipstream import vllm_compat
from slipstream.config import OnlineConfig
from slipstream.generation.build import build_engine
from slipstream.generation.engine import Request
from slipstream.modeling.logprobs import PolicyOutput, score_tokens
from slipstream.modeling.packing import Packer, loss_mask
from slipstream.records import Completion, MicroBatch, Prompt, Rollout, StepTotals
from slipstream.rollouts import custom
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.rewards import RewardRunner, load_reward
from slipstream.rollouts.sampler import PromptSampler, Slot, prompt_seed
from slipstream.trainers import checkpoint, inputs, journal, loading
from slipstream.trainers.metrics import Clock, Metrics, Tally, length_metrics, mean_by_name, reward_metrics
from slipstream.weights.export import named_tensors


class OnlineTrainer(Trainer):
    """Trains a causal language model on its own completions; the base of every trainer here.

    A subclass says how rewards become a learning signal (`advantages`) and what is minimized (`objective`).

    One call of `training_step` in `gradient_accumulation_steps` does the work of a whole optimizer step, so that
    micro-batches can be formed over all of its rows and every normalizer is the step's own.

    Args:
        model: Name or folder of a causal language model, or the model.
        reward_funcs: One or several: functions `f(prompts, completions, completion_ids, **columns) -> list`, plain or
            async, sequence-classification models or their names. See `slipstream.rewards`.
        args: The configuration.
        train_dataset: Rows with a `prompt` (a string, or a list of chat messages); all other columns go to the reward
            functions.
        eval_dataset: The same for evaluation, or a dict of several.
        processing_class: The tokenizer; None loads the model's own.
        reward_processing_classes: Tokenizers of reward models, one for each entry of `reward_funcs` (None: its own).
        callbacks, optimizers: As in transformers.Trainer.
        quantization_config: For loading the model quantized.
        peft_config: Train an adapter of this kind instead of the whole model.

    Raises:
        ValueError, TypeError: an argument is missing or out of range; raised before a model is loaded where possible.
    """

    config_class: type[OnlineConfig] = OnlineConfig
    args: OnlineConfig
    rollout_func: custom.RolloutFunction | None = None

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        model = str(model) if isinstance(model, os.PathLike) else model
        args = self._default_args(model) if args is None else args
        inputs.check_datasets("train_dataset", train_dataset)
        inputs.check_datasets("eval_dataset", eval_dataset)
        functions, tokenizers = inputs.reward_lists(reward_funcs, reward_processing_classes, args)
        if train_dataset is not None:
            self._make_sampler(args, len(train_dataset))  # complains about too few rows before anything is read
        if args.use_vllm:
            vllm_compat.load()  # complains about a missing or unknown vLLM before a model is read

        tokenizer = loading.load_tokenizer(processing_class, model, args)
        self.renderer = PromptRenderer(loading.text_tokenizer(tokenizer), args.chat_template_kwargs)  # type: ignore[arg-type]
        # A rollout_func renders its prompts itself: how long they get is its own affair.
        longest = None if self.rollout_func is not None else inputs.longest_sequence(model, args)
        train_dataset = inputs.fitting_rows("train_dataset", train_dataset, self.renderer, longest, args)
        eval_dataset = inputs.fitting_rows("eval_dataset", eval_dataset, self.renderer, longest, args)
        if train_dataset is not None:
            self._sampler = self._make_sampler(args, len(train_dataset))

        # An adapter is initialised at random: seed before it is made, not only in Trainer.__init__.
        torch.manual_seed(args.seed)
        policy = loading.load_policy(model, args, quantization_config)
        if peft_config is not None:
            policy = loading.add_adapter(policy, peft_config)
        if args.disable_dropout:
            loading.switch_off_dropout(policy)
        reference = loading.load_reference(model, policy, args) if self._uses_reference(args) else None

        super().__init__(
            model=policy,
            args=args,
            data_collator=inputs.first,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.given_weights = checkpoint.given_weights(policy, reference)
        self.reference = reference and self.accelerator.prepare_model(reference, evaluation_mode=True)
        loaded = [load_reward(f, t, self.accelerator.device) for f, t in zip(functions, tokenizers, strict=True)]
        self.rewards = RewardRunner([f for f, _ in loaded], [t for _, t in loaded], args.reward_timeout)
        weights = args.reward_weights or [1.0] * len(loaded)
        self.reward_weights_F = torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)
        self.eos_ids = loading.end_of_sequence_ids(policy, self.renderer.tokenizer)
        self.packer = Packer(
            args.per_device_train_batch_size,
            self.renderer.tokenizer.pad_token_id,
            self.accelerator.device,
            args.pad_to_multiple_of,  # type: ignore[arg-type]  # the config has resolved it
        )
        self._parameters = sum(p.numel() for p in policy.parameters())
        self.clock = Clock()
        self.metrics = Metrics()
        self._slots: list[Slot] = []
        self._batch: tuple[tuple[int, int], list[Rollout]] | None = None
        self._pushed: tuple[int, int] | None = None
        self._extra: dict[str, list[Any]] = {}
        self._step_started = time.perf_counter()
        self._step_flops = 0
        self.engine = build_engine(
            args,
            model=model,
            policy=lambda: self.accelerator.unwrap_model(self.model_wrapped),
            tokenizer=tokenizer,
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            eos_token_ids=self.eos_ids,
            rank=self.accelerator.process_index,
        )
        if self._sleeps:
            self.engine.sleep(args.vllm_sleep_level)
        title = (
            f"{type(self).__name__.removesuffix('Trainer')}: {getattr(policy.config, '_name_or_path', '') or 'model'}"
        )
        self.progress, self.journal = journal.install(self, self.rewards.names, self.renderer.text, title)
        self.rewards_are_binary = False
        self._resume = checkpoint.Resume(self)
        self.add_callback(self._resume)

    # What an algorithm brings ------------------------------------------------------------------------------------

    def advantages(self, rewards_RF: Tensor, group_size: int) -> Tensor:
        """The learning signal of every row, shape (R,), from its rewards by function (NaN: not scored).

        Rows of all ranks are there, the `group_size` completions of a prompt side by side.
        """
        raise NotImplementedError

    # (transformers has an attribute of this name that only its hyperparameter search uses.)
    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The loss of one micro-batch, normalized so that the micro-batches of an optimizer step add up.

        Gradients are averaged over ranks afterwards. Metrics go to `tally`.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module, rollouts: Sequence[Rollout]) -> None:
        """Called with this rank's rows of an optimizer step before it begins; nothing by default."""

    def learned(self, metrics: dict[str, float]) -> None:
        """Called with the metrics of an optimizer step when its gradients are there; nothing by default."""

    def scoring_options(self) -> dict[str, Any]:
        """Further arguments of `score_tokens` for the policy; none by default."""
        return {}

    @staticmethod
    def _uses_reference(args: OnlineConfig) -> bool:
        """Whether log-probabilities under the initial policy are needed."""
        return bool(getattr(args, "beta", 0.0))

    def _extra_state(self) -> dict[str, Any]:
        """What else a subclass needs to continue a run: numbers, strings, lists, dicts and tensors.

        Every rank is asked at every checkpoint, and keeps its own answer.
        """
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` returned (tensors are on the CPU now), before the first step is continued."""

    # A run -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers.Trainer does; see there for the arguments.

        A run that is resumed continues as if it had not been stopped: same rollouts, same log.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is incomplete or damaged, or was saved by a run with another
                plan of prompts and seeds; raised before its weights are loaded.
        """
        # A run before this one may have been stopped anywhere; its last rollouts are not this run's.
        self._slots, self._batch, self.metrics, self._resume.state = [], None, Metrics(), None
        if resume_from_checkpoint:
            resume_from_checkpoint, self._resume.state = checkpoint.read(self, resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            # Gives the terminal back also when training fails.
            self.progress.close()
        # Transformers' own is the loss of this call's steps alone: see `log`.
        return output._replace(training_loss=output.metrics["train_loss"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint.clear(self, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # Every rank comes by here, unless save_only_model, when its other files are written.
        super()._save_rng_state(output_dir)
        checkpoint.save(self, output_dir)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # It skips the scheduler in the evaluation before the first step, which a run that is resumed has had.
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # One step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, slot: Slot, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Take part in an optimizer step; the last of its calls samples, scores and learns. Returns the loss."""
        if not self._slots:
            self._step_started = time.perf_counter()
        self._slots.append(slot)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        slots, self._slots = self._slots, []
        self._set_training(True)
        rollouts = [rollout for slot in slots for rollout in self._rollouts(slot)]
        with self.clock.phase("train"):
            loss, metrics = self._learn(model, rollouts)
        self.learned(metrics)
        self._finish_step(metrics)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _set_training(self, training: bool) -> None:
        """Put the policy into training or evaluation mode, and an optimizer that has modes (a schedule-free one)."""
        self.model_wrapped.train(training)
        set_mode = getattr(self.optimizer, "train" if training else "eval", None)
        if callable(set_mode):
            set_mode()

    def _rollouts(self, slot: Slot) -> list[Rollout]:
        """This rank's rows of a slot; the first slot of a generation batch samples it."""
        key = (slot.epoch, slot.batch)
        if self._batch is None or self._batch[0] != key:
            self._batch = (key, self._sample_batch(slot))
        rows = self.args.per_device_train_batch_size
        first = slot.index % self._steps_per_generation * rows
        rollouts = self._batch[1][first : first + rows]
        if slot.index == self._sampler.slots_per_batch - 1:
            self._batch = None
        return rollouts

    def _sample_batch(self, slot: Slot) -> list[Rollout]:
        """Sample and score this rank's share of a generation batch."""
        size = self.args.num_generations
        positions = self._sampler.prompts(slot.epoch, slot.batch)
        share = self.args.per_device_train_batch_size * self._steps_per_generation
        first = self.accelerator.process_index * share
        # Completions of all ranks are numbered, those of a prompt side by side. A rank may start within a group.
        wanted: list[tuple[int, int, int]] = []
        number = first
        while number < first + share:
            start = number % size
            count = min(size - start, first + share - number)
            wanted.append((positions[number // size], start, count))
            number += count
        seed = (self.args.seed, "train", slot.epoch, slot.batch)
        rollouts = self._generate(self.train_dataset, wanted, seed, evaluation=False)
        metrics = self._score(rollouts, size) | length_metrics(rollouts, self.accelerator)
        tokens = torch.tensor(sum(len(r.prompt.ids) + r.own_tokens for r in rollouts), dtype=torch.float64)
        total = self.accelerator.reduce(tokens.to(self.accelerator.device), "sum")
        self.state.num_input_tokens_seen += int(total.item())
        if not self._on_policy:
            self._annotate(self.model_wrapped, rollouts, "old_logps")
        if self._uses_reference(self.args):
            self._annotate_reference(rollouts)
        self.metrics.add(metrics)
        if self.journal:
            self.journal.take(rollouts, self.state.global_step + 1, "train", self._extra)
        return rollouts

    def _generate(
        self, dataset: Any, wanted: Sequence[tuple[int, int, int]], seed: tuple[Any, ...], *, evaluation: bool
    ) -> list[Rollout]:
        """Sample completions `start ... start + count - 1` of each `(row, start, count)`, in order."""
        sampled: list[tuple[Prompt, Completion, dict[str, Any]]]
        if self.rollout_func is not None:
            with self._engine_ready(), self.clock.phase("generate"):
                assert self.engine.version is not None  # the weights have been sent
                sampled = custom.sample(self.rollout_func, self, dataset, wanted, self.engine.version)
        else:
            prompts = [self.renderer.render(dataset[row], row) for row, _, _ in wanted]
            requests = [
                Request(prompt.ids, count, prompt_seed(*seed, row) + start)
                for prompt, (row, start, count) in zip(prompts, wanted, strict=True)
            ]
            with self._engine_ready(), self.clock.phase("generate"):
                answers = self.engine.generate(requests, self.args.sampling(evaluation=evaluation))
            sampled = [(p, c, {}) for p, group in zip(prompts, answers, strict=True) for c in group]
        texts = self.renderer.completions([p for p, _, _ in sampled], [c.ids for _, c, _ in sampled])
        rollouts = []
        for (prompt, completion, extra), text in zip(sampled, texts, strict=True):
            if not completion.ids:
                raise ValueError(
                    f"a completion of prompt {prompt.index} has no tokens, so there is nothing to train on: see that "
                    "generation_kwargs cannot end one at once (stop, min_tokens=1), or rollout_func."
                )
            truncated = completion.ids[-1] not in self.eos_ids
            rollout = Rollout(prompt, completion, text, truncated, extra=extra)
            if completion.logprobs is not None:
                rollout.extra["sampler_logps"] = torch.tensor(completion.logprobs, dtype=torch.float32)
            rollouts.append(rollout)
        return rollouts

    def _score(self, rollouts: list[Rollout], group_size: int, real: int | None = None) -> dict[str, float]:
        """Run the reward functions and fill in advantages; only the first `real` rows of this rank count."""
        real = len(rollouts) if real is None else real
        pending: dict[str, list[float]] = {}
        self._extra = {}
        with self.clock.phase("score"):
            self.rewards.score(
                rollouts,
                self.state,
                log_extra=lambda column, values: self._take_extra(column, values, len(rollouts)),
                log_metric=lambda name, value: pending.setdefault(name, []).append(float(value)),
            )
        rewards_RF = torch.tensor(
            [[math.nan if v is None else v for v in r.rewards] for r in rollouts],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        counts = torch.arange(len(rollouts), device=self.accelerator.device) < real
        every_RF = self.accelerator.gather(rewards_RF)
        advantages_R = self.advantages(every_RF, group_size)
        first = self.accelerator.process_index * len(rollouts)
        for rollout, advantage in zip(rollouts, advantages_R[first : first + len(rollouts)].tolist(), strict=True):
            rollout.advantage = advantage
        counted_RF = every_RF[self.accelerator.gather(counts)]
        metrics = reward_metrics(counted_RF, self.reward_weights_F, self.rewards.names, group_size)
        return metrics | mean_by_name(pending)

    def _take_extra(self, column: str, values: Sequence[Any], expected: int) -> None:
        if len(values) != expected:
            raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {expected} completions.")
        self._extra[column] = list(values)

    def _learn(self, model: nn.Module, rollouts: list[Rollout]) -> tuple[Tensor, dict[str, float]]:
        """Forward and backward over the rows of an optimizer step."""
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
        loss = torch.zeros((), device=self.args.device)
        micro_batches = list(self.packer.pack(rollouts, totals))
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            # Ranks exchange gradients once, in the last backward pass.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or deepspeed else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    part = self.objective(self._policy(model, batch), batch, tally)
                self.accelerator.backward(part, **options)
            loss += part.detach()
            self._step_flops += 6 * batch.input_ids_BT.numel() * self._parameters
        return loss, tally.reduce(self.accelerator)

    def _policy(self, model: nn.Module, batch: MicroBatch) -> PolicyOutput:
        return self._score_tokens(model, batch, entropies=True, **self.scoring_options())

    def _score_tokens(self, model: nn.Module, batch: MicroBatch, **options: Any) -> PolicyOutput:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        return score_tokens(model, head, batch, temperature=self.args.temperature, **options)

    def _totals(self, rollouts: Sequence[Rollout]) -> StepTotals:
        kept = [r for r in rollouts if r.in_loss]
        tokens = sum(r.own_tokens for r in kept)
        chosen = sum(
            float((r.extra["entropy_mask"].cpu() * loss_mask(r)).sum()) if "entropy_mask" in r.extra else r.own_tokens
            for r in kept
        )
        counts = torch.tensor([len(rollouts), tokens, chosen], dtype=torch.float64, device=self.accelerator.device)
        rows, tokens, chosen = self.accelerator.reduce(counts, "sum").tolist()
        return StepTotals(int(rows), max(tokens, 1.0), self.accelerator.num_processes, max(chosen, 1.0))

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
        if self.reference is not None:
            self._annotate(self.reference, rollouts, "ref_logps")
        else:
            with self.accelerator.unwrap_model(self.model_wrapped).disable_adapter():
                self._annotate(self.model_wrapped, rollouts, "ref_logps")

    # The engine --------------------------------------------------------------------------------------------------

    @property
    def _sleeps(self) -> bool:
        return self.args.use_vllm and self.args.vllm_enable_sleep_mode

    @contextlib.contextmanager
    def _engine_ready(self) -> Iterator[None]:
        """Awake and with the policy's present weights."""
        if not self._sleeps:
            self.push_weights()
            yield
            return
        with self.clock.phase("wait"):
            # In two parts: while the weights arrive, the cache's memory is still the trainer's.
            self.engine.wake(["weights"])
        try:
            try:
                self.push_weights()
            finally:
                # Also when that failed: an engine that is half awake cannot be put to sleep.
                with self.clock.phase("wait"):
                    self.engine.wake(["kv_cache"])
            yield
        finally:
            with self.clock.phase("wait"):
                self.engine.sleep(self.args.vllm_sleep_level)

    def push_weights(self) -> None:
        """Send the policy's weights to the engine, if they have changed since the last time."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        # The step alone does not see weights that were loaded from a checkpoint; autograd's version counters do.
        present = (self.state.global_step, sum(p._version for p in model.parameters()))
        if self.engine.version is not None and present == self._pushed:
            return
        with self.clock.phase("sync"):
            report = self.engine.update_weights(self.state.global_step, named_tensors(model))
        self._pushed = present
        self.metrics.add({"sync/bytes": report.nbytes, "sync/seconds": report.seconds})

    def write_report(self, summary: dict[str, Any] | None = None) -> Path | None:
        """Write `report.html` into the output folder (main process) and return its path."""
        return self.journal.write(self.state.log_history, summary) if self.journal else None

    def close(self) -> None:
        """End the engine. The trainer cannot generate afterwards."""
        self.engine.close()

    # Metrics -----------------------------------------------------------------------------------------------------

    def _finish_step(self, metrics: dict[str, float]) -> None:
        metrics["step_time"] = time.perf_counter() - self._step_started
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.clock.flush().items()}
        if torch.cuda.is_available():
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.metrics.add(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what the steps since the last log have measured."""
        if "loss" in logs:
            logs.update(self.metrics.flush())  # type: ignore[arg-type]
            logs["num_tokens"] = self.state.num_input_tokens_seen
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # Evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample completions for every row in one go, score them, and compute the loss without a gradient."""
        dataset = inputs.loaded_dataset(dataloader)
        size = self.args.num_generations_eval or self.args.num_generations
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every rank takes equally many rows, so that collectives match; the surplus at the end does not count.
        share = math.ceil(len(dataset) / ranks)
        rows = range(rank * share, (rank + 1) * share)
        real = max(0, min(share, len(dataset) - rank * share)) * size
        wanted = [(row % len(dataset), 0, size) for row in rows]
        was_training = self.model_wrapped.training
        self._set_training(False)
        rollouts = self._generate(dataset, wanted, (self.args.seed, "eval"), evaluation=True)
        metrics = self._score(rollouts, size, real) | length_metrics(rollouts[:real], self.accelerator)
        self.rewards_are_binary = all(r.rewards[0] in (0.0, 1.0, None) for r in rollouts[:real])
        for rollout in rollouts[real:]:
            rollout.in_loss = False
        if self._uses_reference(self.args):
            self._annotate_reference(rollouts)
        self.prepare(self.model_wrapped, rollouts)
        totals, tally = self._totals(rollouts), Tally()
        loss = torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.packer.pack(rollouts, totals):
                loss += self.objective(self._policy(self.model_wrapped, batch), batch, tally)
        # The objective is made for gradients that are averaged over ranks.
        metrics["loss"] = self.accelerator.reduce(loss, "mean").item()
        metrics |= tally.reduce(self.accelerator)
        self.model_wrapped.train(was_training)
        self.clock.flush()
        if self.journal:
            self.journal.take(rollouts[:real], self.state.global_step, "eval", self._extra)
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=prefixed, num_samples=len(dataset))  # type: ignore[arg-type]

    # What transformers' loop asks for ----------------------------------------------------------------------------

    @property
    def _steps_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # resolved by the config
        return self.args.steps_per_generation

    @property
    def _iterations(self) -> int:
        """Times that a generation batch is replayed."""
        return getattr(self.args, "num_iterations", 1)

    @property
    def _on_policy(self) -> bool:
        """Whether each generation batch is consumed by one optimizer step: then no other policy than the present one
        has to be scored."""
        return self.args.gradient_accumulation_steps % (self._steps_per_generation * self._iterations) == 0

    @staticmethod
    def _make_sampler(args: OnlineConfig, rows: int) -> PromptSampler:
        assert args.generation_batch_size is not None
        assert args.steps_per_generation is not None
        return PromptSampler(
            rows,
            args.generation_batch_size // args.num_generations,
            args.steps_per_generation * getattr(args, "num_iterations", 1),
            args.seed if args.data_seed is None else args.data_seed,
            args.shuffle_dataset,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Slots, not rows: every rank walks through all of them and takes its share of each generation batch."""
        if self.train_dataset is None:
            raise ValueError("train_dataset=None: pass the prompts to train on.")
        # Made anew for each run: the dataset may have been replaced.
        self._sampler = self._make_sampler(self.args, len(self.train_dataset))  # type: ignore[arg-type]
        return inputs.SlotLoader(self.train_dataset, self._sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The rows of an evaluation dataset (given, or named among those of the constructor), not yet rendered."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset=None: pass the prompts to evaluate on.")
        inputs.check_datasets("eval_dataset", dataset)
        return inputs.evaluation_loader(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The rows that `predict` is given; it samples and scores them as `evaluate` does."""
        inputs.check_datasets("test_dataset", test_dataset)
        return inputs.evaluation_loader(test_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The slots of one optimizer step."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint. Transformers would take one step more before it looks.
            self.control.should_training_stop = True
            return [], None
        return [slot for _, slot in zip(range(num_batches), epoch_iterator, strict=False)], None

    def _track_num_input_tokens(self, slot: Any) -> None:
        """Nothing: tokens are counted when they are sampled, whatever `include_num_input_tokens_seen` says."""

    def floating_point_ops(self, slot: Any) -> int:
        """Operations of the last optimizer step: six for each parameter and token, counted once a step."""
        operations, self._step_flops = self._step_flops, 0
        return operations

    def _default_args(self, model: str | nn.Module) -> OnlineConfig:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        algorithm = type(self).__name__.removesuffix("Trainer")
        return self.config_class(output_dir=f"{str(name).rstrip('/').split('/')[-1]}-{algorithm}")
