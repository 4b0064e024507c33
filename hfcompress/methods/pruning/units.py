"""What can be removed from a live model, and what each of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    FeedForwardBlock,
    attention_blocks,
    feed_forward_blocks,
    input_width,
    output_width,
)
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.surgery import shrink_attention, shrink_feed_forward

Measure = Literal["flops", "parameters", "bytes"]
# Attention costs more the longer the text; FLOPs are counted at this length.
TOKENS = 128


class Units:
    """The heads of an attention or the neurons of a feed-forward block, seen where the block ends.

    A unit is a run of `width` neighbouring inputs of the block's output projection; multiplying them by 0 is
    removing it. Under grouped-query attention a unit is a key-value head with the queries that read it.

    Attributes:
        block: The block.
        entry: The linear-like module whose inputs are the units: the output projection, or its first factor.
        count: Number of units.
        width: Inputs of `entry` that make one unit.

    Raises:
        CompressionError: The block is quantized, or not of plain linear layers.
    """

    def __init__(self, block: AttentionBlock | FeedForwardBlock) -> None:
        self.block = block
        output = block.at(block.spec.output)
        self.entry: Any = output.down if isinstance(output, LowRankLinear) else output
        quantized = [path for path, part in self._cut() if kind_of(part)]
        if quantized:
            raise CompressionError(f"{block.name}: {quantized[0]} is quantized", hint="Prune before quantizing.")
        for path, part in self._cut():
            if type(part) not in (nn.Linear, Conv1D) or "weight" not in part._parameters:
                raise CompressionError(
                    f"{block.name}: {path} is no plain linear layer ({type(part).__name__}) and cannot be cut",
                    hint="Merge adapters, and remove parametrizations and masks from weights, before pruning.",
                )
        if isinstance(block, AttentionBlock):
            self.count, self.width = block.heads, block.head_dim * block.queries_per_head
        else:
            self.count, self.width = block.neurons, 1

    def _cut(self) -> list[tuple[str, Any]]:
        """Returns, by path, the linear-like modules that lose rows or columns with a unit."""
        block = self.block
        inputs = [each for _, each in block.projections] if isinstance(block, AttentionBlock) else block.inputs
        into = {each.path: block.at(each.path) for each in inputs}
        ends: dict[str, Any] = {path: getattr(part, "up", part) for path, part in into.items()}
        return [(block.path(path), part) for path, part in (ends | {block.spec.output: self.entry}).items()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that lose rows or columns with a unit, by the path of their layer."""
        return {path: part.weight for path, part in self._cut()}

    @property
    def are_heads(self) -> bool:
        """Whether the units are heads, and not neurons."""
        return isinstance(self.block, AttentionBlock)

    def shrink(self, kept: torch.Tensor) -> None:
        """Keeps the units `kept`, int64, ascending."""
        if isinstance(self.block, AttentionBlock):
            shrink_attention(self.block, kept.tolist())
        else:
            shrink_feed_forward(self.block, kept.tolist())

    def fold(self, per_input: torch.Tensor) -> torch.Tensor:
        """Sums over the inputs of each unit: `(..., inputs)` to `(..., count)`."""
        return per_input.unflatten(-1, (self.count, self.width)).sum(-1)

    def spread(self, per_unit: torch.Tensor) -> torch.Tensor:
        """Repeats each unit's value for its inputs: `(..., count)` to `(..., inputs)`."""
        return per_unit.repeat_interleave(self.width, dim=-1)

    def inputs_of(self, kept: torch.Tensor) -> torch.Tensor:
        """Returns the inputs of `entry` that belong to the units `kept`, int64, in order."""
        return (kept.unsqueeze(1) * self.width + torch.arange(self.width, device=kept.device)).flatten()

    def weight_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the weight of `entry` as `(out, in)`, and its gradient, where there is one."""
        weight = self.entry.weight
        gradient = weight.grad
        if isinstance(self.entry, Conv1D):  # keeps its weight as (in, out)
            return weight.detach().T, None if gradient is None else gradient.T
        return weight.detach(), gradient

    def assign(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Sets the values of `entry`: weight `(out, in)`, and bias `(out,)` where it has one."""
        with torch.no_grad():
            self.entry.weight.copy_(weight.T if isinstance(self.entry, Conv1D) else weight)
            if bias is not None:
                self.entry.bias.copy_(bias)

    def effect(self) -> torch.Tensor:
        """Derivative of the loss by a factor on each unit, `(count,)`, from the gradient of the weights.

        The derivative by a factor on input j of `y = W x` is `sum_i W_ij dL/dW_ij`: it is there after any
        backward pass, at no cost.
        """
        weight, gradient = self.weight_and_gradient()
        if gradient is None:
            return torch.zeros(self.count, device=weight.device)
        return self.fold((weight.float() * gradient.float()).sum(0))

    def costs(self, measure: Measure) -> tuple[float, float]:
        """Returns what one unit costs, and what the block costs without any.

        FLOPs are multiply-adds for a token of a text of `TOKENS` tokens; bytes are those of the parameters.
        """
        block, parameters = self.block, measure != "flops"

        def size(module: nn.Module) -> int:  # T5 keeps some of its matrices in float32
            return next(module.parameters()).element_size() if measure == "bytes" else 1

        if isinstance(block, AttentionBlock):
            projections = [
                (each.path, block.head_dim * (block.queries_per_head if role == "query" else 1))
                for role, each in block.projections
            ]
            unit = 0.0 if parameters else 2.0 * self.width * TOKENS  # scores, and the mean of the values
        else:
            projections, unit = [(each.path, 1) for each in block.inputs], 0.0
        fixed = 0.0
        counted: set[str] = set()  # what a unit does not cost of a fused module is there once, not for each part of it
        for path, rows in projections:
            module: Any = block.at(path)
            low = isinstance(module, LowRankLinear)
            each = module.multiplications_per_output if low else input_width(module)
            if low and path not in counted:
                fixed += size(module) * (module.multiplications - each * module.out_features)
            counted.add(path)
            unit += size(module) * rows * (each + (parameters and module.bias is not None))
        output: Any = block.at(block.spec.output)
        low = isinstance(output, LowRankLinear)
        outputs = output.out_features if low else output_width(output)
        unit += size(output) * self.width * (output.rank if low else outputs)
        fixed += size(output) * (output.multiplications - output.rank * output.in_features if low else 0)
        fixed += size(output) * (outputs if parameters and output.bias is not None else 0)
        return unit, fixed


def head_units(model: PreTrainedModel) -> list[Units]:
    """Returns every attention's heads, layer by layer."""
    return [Units(block) for block in attention_blocks(model)]


def neuron_units(model: PreTrainedModel) -> list[Units]:
    """Returns every feed-forward block's neurons, layer by layer."""
    return [Units(block) for block in feed_forward_blocks(model)]


def require_untied(model: PreTrainedModel, units: Sequence[Units]) -> None:
    """Raises CompressionError where a weight that would be cut is also held by something else, which would not be."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for each in units:
        for path, weight in each.weights.items():
            names = holders.get(id(weight), [])
            if len(names) > 1:
                raise CompressionError(
                    f"{path} shares its weight with others ({', '.join(names)}) and cannot be cut alone",
                    hint="Give each layer a weight of its own first.",
                )


def total_cost(units: Sequence[Units], measure: Measure) -> float:
    """Returns what all blocks cost as they are."""
    return sum(each.count * unit + fixed for each in units for unit, fixed in [each.costs(measure)])


def masking(units: Units, mask: torch.Tensor) -> Any:
    """Returns a forward pre-hook for `entry` that multiplies its units by `mask`, `(count,)`."""

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (arguments[0] * units.spread(mask).to(arguments[0].dtype),)

    return hook
