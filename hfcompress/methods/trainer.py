"""One Trainer for every method that trains; the public trainers are this one with a part set.

Kept apart from `training`, whose small classes every method's file needs: transformers' Trainer takes seconds to
import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hfcompress.configuration import Config
from hfcompress.errors import ConfigError, Problem, TrainingError
from hfcompress.methods.checkpointing import PARTS_FILE
from hfcompress.methods.registry import Context, method_of, methods
from hfcompress.methods.resuming import last_whole_checkpoint
from hfcompress.methods.teaching.signals import output_logits
from hfcompress.methods.training import NumberedRows, Part, refuse_reentrant_checkpointing
from hfcompress.methods.weighing import WeighingTrainer
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.surgery import in_pivoted_form, in_two_factors


def _has_no_label(inputs: Mapping[str, Any]) -> bool:
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return False
    return not bool(labels.ne(-100).any())


def _part(name: str, config: Config, context: Context) -> Part:
    method = method_of(config)
    if method.part is None:
        message = f"{method.name} works only at once; use hfcompress.compress, before training or after it"
        raise ConfigError("CompressionTrainer", (Problem((name,), message),))
    return method.part(config, context)


def _require_one_end(trainer: str, parts: Sequence[Part]) -> None:
    """Refuses parts of which each would look for what another one's end has left no longer."""
    shrinking = sum(part.shrinks for part in parts)
    if shrinking > 1:
        message = "only one part can make layers smaller; train with one of them, and then with the next"
        raise ConfigError(trainer, (Problem(("parts",), message),))
    if shrinking and any(part.quantizes for part in parts):
        message = "layers cannot be pruned and packed in one training; prune first, and quantize in the next"
        raise ConfigError(trainer, (Problem(("parts",), message),))


class _RunParts(TrainerCallback):
    """Hands the Trainer's events on to its parts."""

    def __init__(self, trainer: CompressionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_parts(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.trainer.parts:
            part.before_optimizer_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._zero_part_gradients()
        self.trainer._step_seen()
        for part in self.trainer.parts:
            part.after_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_parts()


class CompressionTrainer(WeighingTrainer):
    """A `transformers.Trainer` that can distil, prune, or both in one run.

    Losses of the parts are added to the model's own, every term normalised over the whole accumulation window
    and all processes. Training checkpoints are written whole or not at all, and only whole ones are resumed.
    A structured method masks while it trains; the model shrinks once, when training ends. Pivoted low-rank layers are
    trained as two plain factors, and are pivoted again when training ends. A `compute_loss_func` gets no
    `num_items_in_batch`, and is to give a mean over the batch: it is weighed like every other loss.

    Args:
        model: The student.
        args: Trainer's arguments.
        teacher: The model to learn from, or several; frozen, in evaluation mode, never saved.
        teacher_tokens: What the teacher reads, where it has another tokenizer than the student: an `OtherTokens`, or
            one (or None) for each of several teachers.
        distillation: Adds a distilling part.
        pruning: Adds a pruning part.
        cache_dir: Where what teachers say is kept with `DistillationConfig(cache=True)`; runs may share it. By
            default a folder in the training's output.
        parts: More parts, ready-made.
        **kwargs: As in `transformers.Trainer`.

    Attributes:
        findings: After training, what each part found out.

    Raises:
        ConfigError: A config is not of a method that trains, or there is a teacher and nothing says what it teaches.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
        teacher_tokens: Any = None,
        distillation: Config | None = None,
        pruning: Config | None = None,
        cache_dir: str | Path | None = None,
        parts: Sequence[Part] = (),
        **kwargs: Any,
    ) -> None:
        place = Path(cache_dir) if cache_dir else None
        context = Context(teacher=teacher, teacher_tokens=teacher_tokens, cache_dir=place)
        if teacher is not None and distillation is None:
            message = "there is a teacher, and nothing says what it teaches; pass distillation=DistillationConfig(...)"
            raise ConfigError(type(self).__name__, (Problem(("distillation",), message),))
        given = {"distillation": distillation, "pruning": pruning}
        made = [_part(name, config, context) for name, config in given.items() if config is not None]
        self.parts = (*made, *parts)
        _require_one_end(type(self).__name__, self.parts)
        self.findings: list[dict[str, Any]] = []
        self._pivoted: list[str] = []
        self._is_training = False
        if model is not None:
            for part in self.parts:
                part.prepare(model)
        super().__init__(model, args, **kwargs)  # type: ignore[arg-type]
        self._was_given_optimizer = self.optimizer is not None
        self.add_callback(_RunParts(self))

    # Losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Adds the parts' losses to the model's; in evaluation only the model's own counts."""
        if not model.training:
            return super().compute_loss(model, inputs | self._decoder_inputs(inputs), return_outputs)
        share = self._share_of_window(inputs, num_items_in_batch)
        labelled = dict(inputs)
        inputs = self._for_model(inputs)
        inputs |= self._decoder_inputs(inputs)
        extra: dict[str, Any] = {}
        for part in self.parts:
            extra |= part.forward_arguments()
        weight = math.prod(part.label_weight for part in self.parts)
        outputs: Any
        if not weight and not set(self.label_names) & set(inputs):
            outputs = model(**inputs, **extra)
            loss = torch.zeros(())
        else:
            loss, outputs = super().compute_loss(model, {**inputs, **extra}, return_outputs=True)
        if not weight or _has_no_label(inputs):
            # A mean over no label is not a number, nor is 0 times a logit that is masked by infinity.
            said = output_logits(outputs, inputs) if {"logits", "start_logits"} & outputs.keys() else outputs[0]
            loss = said.clamp(-1, 1).sum() * 0.0
        loss = loss * weight
        terms: dict[str, torch.Tensor] = {"labels": loss}
        shares: dict[str, Any] = {"labels": share}
        for index, part in enumerate(self.parts):
            with self.accelerator.autocast():
                own = part.losses(labelled, outputs)
            terms |= own
            shares |= dict.fromkeys(own, self._share_of_part(index, labelled, share))
        total = torch.stack([term.float() for term in terms.values()]).sum()
        if not torch.isfinite(total):
            bad = [name for name, term in terms.items() if not torch.isfinite(term)]
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite ({', '.join(bad) or 'their sum'})",
                hint="The last whole training checkpoint is kept. Lower the learning rate, or train in fp32.",
            )
        weighed = {name: term.float() * shares[name] for name, term in terms.items()}
        if self.parts:
            self._add_up(weighed)
        total = torch.stack(list(weighed.values())).sum()
        return (total, outputs) if return_outputs else total

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns what an encoder-decoder makes of the labels itself, where the loss on them is computed outside it."""
        if (self.label_smoother is None and self.compute_loss_func is None) or "decoder_input_ids" in inputs:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None or "labels" not in inputs or not model.config.is_encoder_decoder:
            return {}
        return {"decoder_input_ids": shift(labels=inputs["labels"])}

    # Parts

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Makes a new student, and the parts ready for it."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        for part in self.parts:
            part.prepare(model)
        if self._is_training:
            self._prepare_parts(model)
        return model

    def _prepare_parts(self, model: PreTrainedModel) -> None:
        rows = self._rows()
        for part in self.parts:
            part.before_training(model, rows)
        if any(part.numbered for part in self.parts) and not isinstance(self.train_dataset, NumberedRows):
            if rows is None:
                raise TrainingError(
                    "the training set has no row numbers, since it is a stream", hint="Set cache: false."
                )
            self.train_dataset = NumberedRows(self.train_dataset)

    def _part_parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.parameters()]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer, with what the parts train beside the model."""
        optimizer = super().create_optimizer(model)
        known = {id(each) for group in cast(list[dict[str, Any]], optimizer.param_groups) for each in group["params"]}
        own = [each for each in self._part_parameters() if id(each) not in known]
        if own and self.lr_scheduler is not None:
            raise TrainingError(
                "the scheduler is of an optimizer that does not train the projections of hidden states",
                hint="Pass optimizers=(optimizer, None), and the Trainer makes the scheduler after they are added.",
            )
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Also averages the gradients of what the parts train over the processes, which DDP knows nothing of."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self._part_parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")  # type: ignore[assignment]
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        own = self._part_parameters()
        if not own:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *own], self.args.max_grad_norm)

    def _zero_part_gradients(self) -> None:
        for parameter in self._part_parameters():
            parameter.grad = None

    def _begin_parts(self, total_steps: int) -> None:
        model = self.accelerator.unwrap_model(self.model)
        for part in self.parts:
            part.begin(model, total_steps, self.args.device)
        if self._resume_from is not None and self.parts:
            stored = load_file(self._resume_from / PARTS_FILE)
            for index, part in enumerate(self.parts):
                prefix = f"{index}."
                part.load_state({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})

    def _end_parts(self) -> None:
        self._zero_part_gradients()
        model = self.accelerator.unwrap_model(self.model)
        # What ends after the layers have shrunk would look for their old shapes.
        ends = {part: part.end(model) for part in sorted(self.parts, key=lambda part: part.shrinks)}
        self.findings = [ends[part] for part in self.parts]
        if self._pivoted:
            in_pivoted_form(model, self._pivoted)
            commit(model)
        self.model_wrapped = self.model  # shapes may have changed under the wrapper

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not all(part.settled(self.state.global_step) for part in self.parts):
            return False
        return super()._determine_best_metric(metrics, trial)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint=True` takes the newest whole checkpoint, if there is one.

        Raises:
            CheckpointError: The named checkpoint is damaged or has another structure.
            TrainingError: The loss is not finite.
        """
        self._resume_from = None
        if resume_from_checkpoint is True:
            newest = last_whole_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = str(newest) if newest else None
        if self.parts and self.args.activation_checkpointing:
            refuse_reentrant_checkpointing(self.args.activation_checkpointing_kwargs)
        self._forget_stale_optimizer()
        model = self.accelerator.unwrap_model(self.model)
        if self.optimizer is None and isinstance(model, PreTrainedModel):
            self._pivoted = in_two_factors(model)
            if self._pivoted:
                commit(model)  # a checkpoint written meanwhile says what it holds
        self._is_training = True
        try:
            if self.model_init is None:
                self._prepare_parts(cast(PreTrainedModel, model))
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except BaseException:
            self._let_go()
            raise
        finally:
            self._is_training = False

    def _forget_stale_optimizer(self) -> None:
        """Drops an optimizer of weights that a training before has replaced by smaller or pivoted ones."""
        if self.optimizer is None:
            return
        own = {id(each) for each in (*self.accelerator.unwrap_model(self.model).parameters(), *self._part_parameters())}
        groups = cast(list[dict[str, Any]], self.optimizer.param_groups)
        if all(id(each) in own for group in groups for each in group["params"]):
            return
        if self._was_given_optimizer:
            raise TrainingError(
                "the optimizer holds weights that the model no longer has, since training has changed their shapes",
                hint="Make a new trainer, with a new optimizer, to train on.",
            )
        self.optimizer = self.lr_scheduler = None

    def _let_go(self) -> None:
        """Leaves a model that can be used, saved and trained again, whatever cut its training off."""
        for part in self.parts:
            part.release()
        if self._pivoted:
            model = self.accelerator.unwrap_model(self.model)
            in_pivoted_form(model, self._pivoted)
            commit(model)


class DistillationTrainer(CompressionTrainer):
    """A Trainer whose student also learns from a teacher; see `CompressionTrainer` for the arguments."""

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | Sequence[PreTrainedModel],
        distillation: Config | None = None,
        **kwargs: Any,
    ) -> None:
        if distillation is None:
            distillation = methods()["distillation"].config()
        super().__init__(*args, teacher=teacher, distillation=distillation, **kwargs)


class PruningTrainer(CompressionTrainer):
    """A Trainer that prunes gradually; with `teacher` and `distillation` it distils in the same run."""

    def __init__(self, *args: Any, pruning: Config, **kwargs: Any) -> None:
        super().__init__(*args, pruning=pruning, **kwargs)
