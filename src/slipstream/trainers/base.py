"""The loop that the trainers share: sample, score, learn, send the weights back to the sampler."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from slipstream.config import OnlineConfig
from slipstream.generation.build import build_engine
from slipstream.lifetime import end_after_gloo
from slipstream.modeling.rope import original_length, settle_long_rope
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.reward_models import load_reward
from slipstream.rollouts.rewards import RewardRunner
from slipstream.rollouts.sampler import Slot
from slipstream.trainers import checkpoint, inputs, journal, loading, preflight, sharding, vision
from slipstream.trainers.evaluating import Evaluating
from slipstream.trainers.metrics import Clock, Metrics

logger = logging.getLogger(__name__)


class OnlineTrainer(Evaluating):
    """Trains a causal language model on its own completions; the base of every trainer here.

    A subclass says how rewards become a learning signal (`credit`) and what is minimized (`objective`); see `Algorithm`
    for what else it may say.

    One call of `training_step` in `gradient_accumulation_steps` does the work of a whole optimizer step, so that
    micro-batches can be formed over all of its rows and every normalizer is the step's own.

    Args:
        model: Name or folder of a causal language model, or the model.
        reward_funcs: One or several: functions `f(prompts, completions, completion_ids, **columns) -> list`, plain or
            async, sequence-classification models or their names. See `slipstream.rewards`.
        args: The configuration.
        train_dataset: Rows with a `prompt` (a string, or a list of chat messages) and maybe, for a vision-language
            model, an `image` or a list of `images` for it; all other columns go to the reward functions.
        eval_dataset: The same for evaluation, or a dict of several.
        processing_class: The tokenizer, or the processor of a vision-language model; None loads the model's own.
        reward_processing_classes: Tokenizers of reward models, one for each entry of `reward_funcs` (None: its own).
        callbacks, optimizers: As in transformers.Trainer.
        quantization_config: For loading the model quantized.
        peft_config: Train an adapter of this kind instead of the whole model.
        ref_model: The reference, where the algorithm has one; None: the policy as it is at first.

    Raises:
        ValueError, TypeError: an argument is missing or out of range; raised before a model is loaded where possible.
    """

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
        ref_model: nn.Module | None = None,
    ) -> None:
        model = str(model) if isinstance(model, os.PathLike) else model
        if not isinstance(model, str | nn.Module):
            raise TypeError(f"model={model!r} is neither a name or folder nor a model: pass one of these.")
        args = self._checked_args(args, model)
        loading.check_adapter(model, peft_config)
        if self.toolbox is not None:
            vision.refuse_beside_tools(train_dataset, eval_dataset)
        functions, tokenizers, images = preflight.check(
            args, model, train_dataset, eval_dataset, reward_funcs, reward_processing_classes, self.judge,
            self.rollout_func,
        )  # fmt: skip
        self._scorers = functions
        tokenizer = loading.load_tokenizer(processing_class, model, args, images)
        self.renderer = PromptRenderer(
            loading.text_tokenizer(tokenizer),
            args.chat_template_kwargs,  # type: ignore[arg-type]
            tools=None if self.toolbox is None else self.toolbox.schemas_of,
            processor=loading.image_processor(tokenizer),
        )
        if self.toolbox is not None:
            self.dialogue = inputs.dialogue(self.toolbox, self.renderer, loading.known_eos_ids(model, tokenizer, args))
        # A rollout_func renders its prompts itself: how long they get is its own affair.
        longest = self.longest = None if self.rollout_func is not None else inputs.longest_sequence(model, args)
        train_dataset = inputs.fitting_rows("train_dataset", train_dataset, self.renderer, longest, args)
        eval_dataset = inputs.fitting_rows("eval_dataset", eval_dataset, self.renderer, longest, args)
        if train_dataset is not None:
            self._sampler = self.make_sampler(args, len(train_dataset))

        end_after_gloo()
        # An adapter is initialised at random: seed before it is made, not only in Trainer.__init__.
        torch.manual_seed(args.seed)
        policy = loading.load_policy(model, args, quantization_config, images)
        if args.ddp_find_unused_parameters is None and vision.is_vision_language(getattr(policy, "config", None)):
            # Rows without images leave the part that sees alone, on all ranks or on some.
            args.ddp_find_unused_parameters = True
        if peft_config is not None:
            policy = loading.add_adapter(policy, peft_config)
        if args.disable_dropout:
            loading.switch_off_dropout(policy)
        reference = None
        if self._uses_reference(args):
            reference = loading.load_reference(model, policy, args, ref_model, quantization_config, images)

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
        self.reference = reference and sharding.prepare_reference(self.accelerator, reference)
        self.set_up()
        with sharding.whole_models():
            loaded = [load_reward(f, t, self.accelerator.device) for f, t in zip(functions, tokenizers, strict=True)]
        # What an environment's async tools have opened is of use to its reward in the same event loop alone.
        loop = None if self.toolbox is None else self.toolbox.loop
        self.rewards = RewardRunner([f for f, _ in loaded], [t for _, t in loaded], args.reward_timeout, loop)
        weights = args.reward_weights or [1.0] * len(loaded)
        self.reward_weights_F = torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)
        self.eos_ids = loading.end_of_sequence_ids(policy, self.renderer.tokenizer)
        self.packer = self.make_packer(images)
        self._parameters = sum(p.numel() for p in policy.parameters())
        self.clock = Clock()
        self.metrics = Metrics()
        self._slots: list[Slot] = []
        self._batch = None
        self._pushed, self._reference_pushed = None, False
        self._extra = {}
        self._step_started = time.perf_counter()
        self._step_flops = 0
        self.engine = build_engine(
            args,
            model=model,
            policy=lambda: self.accelerator.unwrap_model(self.model_wrapped),
            reference=self._reference_to_sample if args.samples_from_reference else None,
            tokenizer=tokenizer,
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            eos_token_ids=self.eos_ids,
            rank=self.accelerator.process_index,
        )
        if args.use_vllm:
            self._settle_long_rope()
        if self._sleeps:
            self.engine.sleep(args.vllm_sleep_level)
        title = (
            f"{type(self).__name__.removesuffix('Trainer')}: {getattr(policy.config, '_name_or_path', '') or 'model'}"
        )
        self.progress, self.journal = journal.install(self, self.rewards.names, self.renderer.text, title)
        self._resume = checkpoint.Resume(self)
        self.add_callback(self._resume)

    def _settle_long_rope(self) -> None:
        policy: Any = self.model
        original = original_length(policy.config.get_text_config())
        if original is None:
            return
        longest = self.engine.max_model_len  # type: ignore[attr-defined]  # engines of vLLM have it
        if longest > original and self.args.vllm_model_impl == "transformers":
            raise ValueError(
                "vllm_model_impl='transformers' lets the rope factors of this model follow the longest of the rows "
                f"that are computed together, where they may be longer than {original} tokens: set "
                f"vllm_max_model_length={original}, or vllm_model_impl='vllm'."
            )
        settled = [settle_long_rope(model, longest) for model in (self.model, self.reference) if model is not None]
        if any(settled) and self.args.vllm_max_model_length is None:
            logger.warning(
                "the engine's rows may be %d tokens long, so that it and the trainer take the long factors of this "
                "model's LongRoPE for every row: if prompts and completions are short, give a smaller "
                "vllm_max_model_length (or --max-model-len of the server)",
                longest,
            )

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
        self.epoch = 0
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

    def write_report(self, summary: dict[str, Any] | None = None) -> Path | None:
        """Write `report.html` into the output folder (main process) and return its path."""
        return self.journal.write(self.state.log_history, summary) if self.journal else None

    def close(self) -> None:
        """End the engine. The trainer cannot generate afterwards."""
        self.engine.close()

    # One step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, slot: Slot, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Take part in an optimizer step; the last of its calls samples, scores and learns. Returns the loss."""
        if not self._slots:
            self._step_started = time.perf_counter()
        self._slots.append(slot)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        slots, self._slots, self.epoch = self._slots, [], slot.epoch
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

    # Metrics -----------------------------------------------------------------------------------------------------

    def _finish_step(self, metrics: dict[str, float]) -> None:
        metrics["step_time"] = time.perf_counter() - self._step_started
        # What a step did not have took 0 s of it: not all sample.
        seconds = dict.fromkeys(("generate", "score", "train", "sync", *(["wait"] if self._sleeps else [])), 0.0)
        metrics |= {f"time/{phase}": took for phase, took in (seconds | self.clock.flush()).items()}
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
