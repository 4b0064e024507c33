"""Knowledge distillation inside the Trainer.

The student learns on texts that are given. On-policy distillation, in which it learns on what it writes itself, is
left to TRL (`GKDTrainer`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.teaching.cache import TeacherCache
from hfcompress.methods.teaching.checks import (
    as_teachers,
    check_rows,
    label_order,
    refuse_outputs_of_some_tokens,
    refuse_shared_weights,
    require_same_vocabulary,
    same_problem,
)
from hfcompress.methods.teaching.config import DistillationConfig
from hfcompress.methods.teaching.filling import fill
from hfcompress.methods.teaching.intermediate import Intermediate
from hfcompress.methods.teaching.losses import (
    OUTPUT_LOSSES,
    logit_mse,
    multi_label,
    per_real_token,
    soft_label_loss,
    top_k_forward_kl,
    weighted_mean,
)
from hfcompress.methods.teaching.other_tokens import (
    OtherTokens,
    Source,
    TranslatedTeacher,
    refuse_what_tokens_cannot_say,
)
from hfcompress.methods.teaching.signals import (
    Asked,
    LiveTeacher,
    Signals,
    at_positions,
    example_weights,
    is_token_level,
    output_logits,
    positions,
)
from hfcompress.methods.training import EXAMPLE_ID, NumberedRows, Part, Rows, plain_model

__all__ = ["DistillationConfig", "DistillationPart", "OtherTokens", "soft_label_loss"]

CACHE_FOLDER = "teacher_cache"


class DistillationPart(Part):
    """Adds what teachers teach to training.

    Args:
        config: What is learnt.
        teacher: One teacher, or several; they are frozen and put in evaluation mode.
        cache_dir: Where outputs are kept with `config.cache`; by default in the training's output folder.
        tokens: What the teacher reads, where it has another tokenizer; a list with one entry a teacher, None for
            those with the student's.
    """

    def __init__(
        self,
        config: DistillationConfig,
        teacher: PreTrainedModel | Sequence[PreTrainedModel],
        cache_dir: Path | None = None,
        tokens: OtherTokens | Sequence[OtherTokens | None] | None = None,
    ) -> None:
        self.config = self._now = config
        self.label_weight = config.hard
        self.teachers = as_teachers(teacher)
        several = [tokens] * len(self.teachers) if tokens is None or isinstance(tokens, OtherTokens) else list(tokens)
        if len(several) != len(self.teachers):
            raise CompressionError(f"tokens has {len(several)} entries for {len(self.teachers)} teachers")
        self._tokens = several
        self.numbered = config.cache or any(several)
        self.columns = _columns(self.teachers, several)
        self._rows: Rows | None = None
        for each in self.teachers:
            each.eval().requires_grad_(False)
        self._names = [type(each).__name__ for each in self.teachers]
        weights = config.teacher_weights or (1.0,) * len(self._names)
        if len(weights) != len(self._names):
            raise CompressionError(f"teacher_weights has {len(weights)} entries for {len(self._names)} teachers")
        self._shares = [weight / sum(weights) for weight in weights]
        self._cache_dir = cache_dir
        self._sources: list[Source] = []
        self._orders: list[list[int] | None] = []
        self._between: Intermediate | None = None
        self._problem: str | None = None
        self._cached: Any = None  # the rows that a cache answers for
        self._dismissed: list[weakref.ref[PreTrainedModel]] = []  # the teachers whose answers it holds
        self._model: PreTrainedModel | None = None
        self._step, self._stage_steps, self._total_steps = 0, 0, 1

    # Before training

    def before_training(self, model: PreTrainedModel, rows: Rows | None) -> None:
        """Checks models and rows, and fills the cache where there is to be one.

        Raises:
            CompressionError: The models cannot be compared, or the cache cannot be made.
            DataError: The rows have no labels that the model could learn.
        """
        model = plain_model(model)
        if rows is not None:
            check_rows(rows, model, needs_labels=self.config.hard > 0)
        self._rows = rows
        is_matched = bool(self._sources) and self._model is model
        if is_matched and (not self.config.cache or (rows is not None and _numbered(rows) is self._cached)):
            return
        if not is_matched:
            self._match(model)
        if self.config.cache:
            self._fill(rows)

    def _call_back(self) -> None:
        """Takes the teachers again, for another student or other rows, where the user has kept them."""
        if self.teachers:
            return
        alive = [each() for each in self._dismissed]
        self.teachers = [each for each in alive if each is not None]
        if len(self.teachers) < len(alive):
            self.teachers = []
            raise CompressionError(
                "the teachers' answers are cached for another student or training set, and the teachers are gone",
                hint="Keep them in a variable of your own while there is more to train, or make a new trainer.",
            )

    def _fill(self, rows: Rows | None) -> None:
        if rows is None:
            raise CompressionError("a training set that is a stream cannot be cached", hint="Set cache: false.")
        self._call_back()
        root = self._cache_dir or rows.folder / CACHE_FOLDER
        self._let_go()
        for index, asked in enumerate(self._asked()):
            teacher = self.teachers[index].to(rows.device)  # type: ignore[arg-type]
            read = tokens.rows(rows) if (tokens := self._tokens[index]) else rows
            made = fill(teacher, asked, read, root, top_k=self.config.cache_top_k, temperature=self.config.temperature)
            self._sources.append(self._translated(made, index))
        self._dismissed = [weakref.ref(each) for each in self.teachers]
        self.teachers = []  # they need no memory from here on
        self._cached = _numbered(rows)

    def _let_go(self) -> None:
        for source in self._sources:
            source.close()
        self._sources = []

    def _match(self, model: PreTrainedModel) -> None:
        self._call_back()
        self._let_go()
        refuse_shared_weights(model, self.teachers)
        if self.config.soft > 0:
            refuse_outputs_of_some_tokens(model)
        self._model = model
        self._orders = [self._order(model, *each) for each in zip(self.teachers, self._tokens, strict=True)]
        self._problem = same_problem(model, self.teachers) if self.config.soft > 0 else None
        labels = not is_token_level(model) or any(order is not None for order in self._orders)
        if self.config.cache_top_k and self.config.soft > 0 and labels:
            raise CompressionError(
                f"cache_top_k keeps the likeliest of a vocabulary, and a {type(model).__name__} predicts labels",
                hint="Leave cache_top_k out: a few labels take little room.",
            )
        self._between = Intermediate(self.config, model, self.teachers[0]) if any(self.config.between) else None
        if self.config.cache and model.loss_type == "ForQuestionAnswering":
            raise CompressionError(
                "answers to questions are said about each token, and are not cached", hint="Set cache: false."
            )
        if self.config.cache and self._between and model.config.is_encoder_decoder and not is_token_level(model):
            raise CompressionError(
                "hidden states of encoder-decoders that say something about whole examples are not cached",
                hint="Set hidden and embeddings to 0, or cache to false.",
            )

    def _order(self, model: PreTrainedModel, teacher: PreTrainedModel, tokens: OtherTokens | None) -> list[int] | None:
        if tokens is not None:
            outputs, attention = self.config.soft > 0, self.config.attention > 0
            refuse_what_tokens_cannot_say(model, teacher, outputs=outputs, attention=attention)
            tokens.require_room(teacher)
        else:
            require_same_vocabulary(model, teacher)
        return label_order(model, teacher) if self.config.soft > 0 else None

    def _translated(self, source: LiveTeacher | TeacherCache, index: int) -> Source:
        tokens = self._tokens[index]
        if tokens is None:
            return source
        if self._rows is None:
            raise CompressionError("a training set that is a stream has no texts that another tokenizer could cut")
        if len(self._rows) != len(tokens.texts):
            raise CompressionError(f"there are {len(tokens.texts)} texts for {len(self._rows)} training rows")
        return TranslatedTeacher(source, tokens, tokens.rows(self._rows), self.teachers[index])

    def _asked(self) -> list[Asked]:
        first = self._between.asked if self._between else Asked()
        others = [Asked(logits=self.config.soft > 0)] * (len(self.teachers) - 1)
        return [replace(first, logits=self.config.soft > 0), *others]

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """Returns the projections' weights."""
        return self._between.parameters() if self._between else ()

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Makes teachers and student ready.

        Raises:
            CompressionError: Their labels, vocabularies or layers cannot be matched.
        """
        model = plain_model(model)
        if self._model is not model:
            self._match(model)
        if self.teachers:
            for teacher in self.teachers:
                if teacher.device != device:
                    teacher.to(device)  # type: ignore[arg-type]
            pairs = enumerate(zip(self.teachers, self._asked(), strict=True))
            self._sources = [self._translated(LiveTeacher(*each), index) for index, each in pairs]
        if self._between:
            self._between.begin(model, device)
        self._stage_steps, self._total_steps = round(total_steps * self.config.stage), max(1, total_steps)
        self._at_step(0)

    def _at_step(self, step: int) -> None:
        self._step = step
        self._now = self.config.at(step / self._total_steps)
        self.label_weight = 0.0 if self._first_stage else self._now.hard
        if self._between and self._model is not None and not self._compares_between:
            self._between.end(self._model)  # the stage that compared layers is over

    @property
    def _first_stage(self) -> bool:
        return self._step < self._stage_steps

    # In training

    def forward_arguments(self) -> Mapping[str, Any]:
        """Asks the student for what lies between, while it is compared."""
        return self._between.student_asked.arguments if self._between and self._compares_between else {}

    @property
    def _compares_between(self) -> bool:
        return self._between is not None and (self._first_stage or self._stage_steps == 0)

    def items(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Counts the outputs that are compared."""
        return example_weights(self._student, inputs).sum()

    @property
    def _student(self) -> PreTrainedModel:
        assert self._model is not None, "before_training and begin come first"
        return self._model

    def losses(self, inputs: Mapping[str, Any], outputs: Any) -> Mapping[str, torch.Tensor]:
        """Lets the teachers see the same inputs and compares."""
        compares_outputs = self.config.soft > 0 and not self._first_stage
        if not compares_outputs and not self._compares_between:
            return {}
        ids = inputs.get(EXAMPLE_ID)
        if ids is None and self.numbered:
            raise CompressionError(
                f"a batch lacks '{EXAMPLE_ID}', by which the teacher's answers are found",
                hint="The collator must pass it on; or set cache: false, and take a teacher with the same tokenizer.",
            )
        inputs = {name: value for name, value in inputs.items() if name != EXAMPLE_ID}
        counted = positions(self._student, inputs)
        terms: dict[str, torch.Tensor] = {}
        for index, source in enumerate(self._sources):
            if index and not compares_outputs:
                continue
            signals = source.signals(inputs, counted, ids)  # type: ignore[arg-type]
            if compares_outputs:
                order, at = self._orders[index], counted
                if counted is not None and signals.aligned is not None:
                    at = counted & signals.aligned
                loss = self._shares[index] * self._output_loss(inputs, outputs, signals, order, at)
                if at is not None and counted is not None:
                    # A mean over all that `items` counts; it is 0 where no token of the teacher's says anything.
                    loss = loss * at.sum() / counted.sum().clamp(min=1)
                terms["soft"] = terms["soft"] + loss if index else loss
            if not index and self._compares_between and self._between:
                terms |= self._between.losses(self._student, inputs, outputs, signals, self._now.between)
        if "soft" in terms:
            terms["soft"] = self._now.soft * terms["soft"]
        return terms

    def _output_loss(
        self,
        inputs: Mapping[str, Any],
        outputs: Any,
        taught: Signals,
        order: list[int] | None,
        counted: torch.Tensor | None,
    ) -> torch.Tensor:
        student, teacher = at_positions(output_logits(outputs, inputs), counted), taught.logits
        assert teacher is not None
        config, temperature = self._student.config, self._now.temperature
        if taught.indices is not None:
            return weighted_mean(top_k_forward_kl(student, teacher, taught.indices, temperature))
        if order is not None and order != sorted(order):
            teacher = teacher[..., order]
        one = order is not None and config.num_labels == 1 and self._problem != "multi_label_classification"
        if one or self._problem == "regression":
            return weighted_mean(logit_mse(student, teacher))
        labels = inputs.get("labels")
        several = labels is not None and labels.dim() == 2 and labels.is_floating_point() and order is not None
        if several or self._problem == "multi_label_classification":
            return weighted_mean(multi_label(student, teacher, temperature))
        values = OUTPUT_LOSSES[self.config.soft_loss](student, teacher, temperature)
        if self.config.soft_loss == "mse" and "start_logits" in outputs:  # a mean over tokens, padding among them
            values = per_real_token(values, inputs.get("attention_mask"))
        return weighted_mean(values)

    def after_step(self, step: int) -> None:
        """Goes on to the outputs when the first stage is over."""
        self._at_step(step)

    def release(self) -> None:
        """Lets go of teachers and student; another training takes them up again."""
        for source in self._sources:
            source.close()
        if self._between and self._model is not None:
            self._between.end(self._model)

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Lets go of the teachers and says how the student was taught."""
        self.release()
        said: dict[str, Any] = {"teacher": " + ".join(self._names), "temperature": self.config.temperature}
        if self._between:
            said["layers"] = self._between.said
        return {"distillation": said}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the step and the projections."""
        return {"step": torch.tensor(self._step), **(self._between.state() if self._between else {})}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes them back."""
        self._at_step(int(state["step"]))
        if self._between:
            self._between.load_state({name: value for name, value in state.items() if name != "step"})


def _numbered(rows: Rows) -> Any:
    """Returns the training set itself, whether or not its rows are numbered already."""
    return rows.dataset.rows if isinstance(rows.dataset, NumberedRows) else rows.dataset


def _columns(teachers: Sequence[PreTrainedModel], tokens: Sequence[OtherTokens | None]) -> set[str]:
    """Returns what teachers take that read the student's rows: BERT's tell the texts of a pair apart."""
    read = [each for each, own in zip(teachers, tokens, strict=True) if own is None]
    return {name for each in read for name in inspect.signature(each.forward).parameters}


def _part(config: DistillationConfig, context: Context) -> DistillationPart:
    teachers: Any = context.teacher  # refused where there is none
    return DistillationPart(config, teachers, context.cache_dir, context.teacher_tokens)


register(
    Method(
        name="distillation",
        config=DistillationConfig,
        summary="Trains the model to agree with a teacher.",
        part=_part,
    )
)
