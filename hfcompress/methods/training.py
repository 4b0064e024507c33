"""What a method needs to train: the recipe's training block, and the part it adds to the one Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from hfcompress.configuration import Config
from hfcompress.errors import ConfigError, Problem, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


# What a batch calls the numbers of its rows, for parts that are `numbered`; no model sees it, and no collator.
EXAMPLE_ID = "hfcompress_row"
# Their outputs at a token are about that token, whatever their names say.
_NOT_CAUSAL = ("FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel")


class TrainingConfig(Config):
    """How a recipe's step trains; in Python use `transformers.TrainingArguments`.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: Peak learning rate of AdamW.
        batch_size: Examples a step on each device.
        gradient_accumulation_steps: Batches whose gradients make one step.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: Of AdamW.
        scheduler: How the learning rate falls.
        precision: `bf16` computes in bfloat16 under autocast; `auto` does so where the hardware is fast at it.
        label_smoothing: Share of each label's weight spread over all labels.
        max_grad_norm: Gradients are clipped to this norm.
        save_steps: A training checkpoint is written every so many steps.
        max_steps: Stops after so many steps, over `epochs`.
        report_to: Trackers that are told losses and metrics, as `transformers.TrainingArguments` knows them.
    """

    epochs: float = Field(3.0, gt=0, le=1000)
    learning_rate: float = Field(5e-5, gt=0, le=1)
    batch_size: int = Field(32, ge=1, le=65536)
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536)
    warmup: float = Field(0.06, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    save_steps: int = Field(200, ge=1)
    max_steps: int | None = Field(None, ge=1)
    report_to: tuple[Literal["tensorboard", "trackio"], ...] = ()


def training_arguments(
    config: TrainingConfig, output_dir: Path, *, seed: int, examples: int, quiet: bool = False
) -> TrainingArguments:
    """Turns a recipe's training block into Trainer's arguments.

    Args:
        config: The block.
        output_dir: Where training checkpoints go.
        seed: Of the order of the data and of dropout.
        examples: Size of the training set; warm-up is a share of the steps it makes.
        quiet: No progress bar.
    """
    from transformers import TrainingArguments

    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = config.max_steps or int(config.epochs * -(-examples // per_step))
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_is_fast())
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.scheduler,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused where there is no other device
        label_smoothing_factor=config.label_smoothing,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=max(1, min(50, steps // 10)),
        seed=seed,
        data_seed=seed,
        disable_tqdm=quiet,
        report_to=list(config.report_to) or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def require_trackers(trainings: Sequence[TrainingConfig]) -> None:
    """Refuses a tracker that is not installed, before anything is trained.

    Raises:
        ConfigError: It is not.
    """
    wanted = dict.fromkeys(name for each in trainings for name in each.report_to)
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        message = f"{missing[0]} is not installed; `pip install {missing[0]}`, or leave it out"
        raise ConfigError("training", (Problem(("report_to",), message),))


def bf16_is_fast() -> bool:
    """Tells whether the hardware computes in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()))


def plain_model(model: Any) -> Any:
    """Returns the transformers model in the wrappers of PEFT (its adapters stay in it) and of torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def sums_over_rows(model: Any) -> bool:
    """Tells whether a model's loss is a sum over the rows of a batch, as that of CTC by default, and not a mean."""
    model = plain_model(model)
    return getattr(model, "loss_type", None) == "ForCTC" and model.config.ctc_loss_reduction == "sum"


def shifts_labels(model: PreTrainedModel) -> bool:
    """Tells whether a model's output at a token is judged by the label of the next one, as in causal LMs."""
    model = plain_model(model)
    if model.config.is_encoder_decoder:
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # Models that read images and write have it by another name. Some older classes (GPT2LMHeadModel) name no loss and
    # get the causal one by default.
    if model.loss_type is None:
        return "LMHead" in type(model).__name__ and type(model).__name__ not in _NOT_CAUSAL
    return LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss


def refuse_reentrant_checkpointing(asked: Any) -> None:
    """Refuses activation checkpointing whose gradients pass by what hooks and attention maps take out of a layer.

    Args:
        asked: The keyword arguments of `torch.utils.checkpoint`, if any.

    Raises:
        TrainingError: It is reentrant.
    """
    if isinstance(asked, Mapping) and asked.get("use_reentrant"):
        raise TrainingError(
            "reentrant activation checkpointing gives no gradients of what lies between inputs and outputs",
            hint='Enable it with {"use_reentrant": False}, which is the default.',
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The training set, and how batches are made of it.

    Attributes:
        dataset: Rows by number.
        collate: Makes a batch of rows.
        batch_size: Rows in a batch.
        device: Where models run.
        autocast: Makes the context that models run in.
        folder: The training's output folder.
    """

    dataset: Any
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    folder: Path

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if getattr(self.dataset, "column_names", None) is None:
            yield from (self.dataset[number] for number in range(len(self)))
            return
        for start in range(0, len(self), 1000):  # `datasets` reads a slice much faster than row by row
            part = self.dataset[start : start + 1000]  # a format or a transform may give other columns than there are
            yield from (dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True))

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Returns the batch of some rows on the device."""
        several = getattr(self.dataset, "__getitems__", None)  # `datasets` reads a batch much faster than row by row
        made = self.collate(several(list(numbers)) if several else [self.dataset[number] for number in numbers])
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


class NumberedRows(torch.utils.data.Dataset):
    """Rows that know their numbers.

    Args:
        rows: A data set of mappings.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self.rows):
            raise IndexError(number)  # ends an iteration
        return {**self.rows[number], EXAMPLE_ID: number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        if not hasattr(self.rows, "__getitems__"):
            return [self[number] for number in numbers]
        found = self.rows.__getitems__(numbers)
        return [{**row, EXAMPLE_ID: number} for row, number in zip(found, numbers, strict=True)]


class Numbering:
    """A collator that puts the numbers of `NumberedRows` beside a batch that another makes, which never sees them.

    Args:
        collate: The other.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        """Makes the batch."""
        if not rows or not isinstance(rows[0], Mapping) or EXAMPLE_ID not in rows[0]:
            return self.collate(rows)
        batch = self.collate([{name: each for name, each in row.items() if name != EXAMPLE_ID} for row in rows])
        batch[EXAMPLE_ID] = torch.tensor([row[EXAMPLE_ID] for row in rows])
        return batch


class Part:
    """What one method adds to training; subclasses override what they need.

    Attributes:
        label_weight: Multiplies the loss on the labels.
        numbered: Whether its batches need the rows' numbers, as `inputs[EXAMPLE_ID]`.
        columns: Columns of the training rows that it reads, whether or not the model does.
        shrinks: Whether its end leaves smaller layers, so that the other parts end before it.
        quantizes: Whether its end leaves weights that are no longer float, which nothing can shrink.
    """

    shrinks: bool = False
    quantizes: bool = False
    label_weight: float = 1.0
    numbered: bool = False
    columns: Collection[str] = ()

    def prepare(self, model: PreTrainedModel) -> None:
        """Changes the model before a Trainer looks at it: which of its parameters are trained, say."""

    def before_training(self, model: PreTrainedModel, rows: Rows | None) -> None:
        """Looks at model and data before there is an optimizer; `rows` is None where they cannot be counted."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """Returns what is trained with the model and is no part of it; `state` must hold it too."""
        return ()

    def items(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Returns how many examples or tokens the means of `losses` are over; None: as many as have labels."""
        return None

    def forward_arguments(self) -> Mapping[str, Any]:
        """Returns more keyword arguments for the student's forward, such as `output_hidden_states`."""
        return {}

    def losses(self, inputs: Mapping[str, Any], outputs: Any) -> Mapping[str, torch.Tensor]:
        """Returns weighted loss terms by name, each a mean over the batch's examples or tokens."""
        return {}

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Prepares for training, before any step and before a resumed state is loaded."""

    def before_optimizer_step(self, step: int) -> None:
        """Sees the gradients of the whole step."""

    def after_step(self, step: int) -> None:
        """Runs after the weights changed; `step` counts the steps done."""

    def settled(self, step: int) -> bool:
        """Tells whether the model has its final form, so that it may count as the best one."""
        return True

    def release(self) -> None:
        """Lets go of the model where training was cut off; the next one begins anew."""

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Finishes the model after the last step (and after the best one was loaded); returns findings."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a resumed run needs."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` returned."""
