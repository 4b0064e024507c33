"""Linear layers of 8-bit weights by torchao: its kernels, on tensors that plain safetensors hold.

torchao keeps a weight as a tensor subclass, which transformers 5.23 loads and then cannot save a second time. Here
the two tensors of it are buffers, and torchao's own is put together from them, sharing their memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from hfcompress.errors import MissingBackendError

TorchAOKind = Literal["torchao-int8", "torchao-int8-dynamic"]
TORCHAO_KINDS: tuple[TorchAOKind, ...] = get_args(TorchAOKind)


def require_torchao() -> Any:
    """Imports torchao's quantization, lazily: it takes seconds.

    Raises:
        MissingBackendError: It is not installed.
    """
    try:
        import torchao.quantization as quantization
    except ImportError as error:
        raise MissingBackendError(
            "linear layers of kind torchao-int8 and torchao-int8-dynamic need torchao, which is not installed",
            hint="pip install 'hfcompress[torchao]'",
        ) from error
    return quantization


def _config(kind: TorchAOKind) -> Any:
    quantization = require_torchao()
    if kind == "torchao-int8":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


class TorchAOLinear(nn.Linear):
    """A linear layer whose weight is int8 with a scale for every output, run by torchao.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a bias, which stays float.
        kind: `torchao-int8` computes in float; with `torchao-int8-dynamic` each row of inputs is rounded to int8 too,
            and the product is one of integers.
        device: Where the buffers are made.
        dtype: What the layer takes and gives.

    Raises:
        MissingBackendError: torchao is not installed.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    torchao_kind: TorchAOKind

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: TorchAOKind,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_torchao()
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.torchao_kind = in_features, out_features, kind
        self.register_buffer("qdata", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        # Families ask a layer's weight for its dtype; this one carries it.
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))
        parameter = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", parameter if bias else None)

    @classmethod
    def from_float(cls, linear: nn.Linear, kind: TorchAOKind) -> TorchAOLinear:
        """Quantizes a float layer by torchao; the layer itself is left as it was, its bias is shared."""
        weight = linear.weight.detach()
        form = {"kind": kind, "device": weight.device, "dtype": weight.dtype}
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **form)
        with torch.device("meta"):
            whole = nn.Linear(linear.in_features, linear.out_features, bias=False)
        whole.weight = nn.Parameter(weight, requires_grad=False)
        require_torchao().quantize_(whole, _config(kind))
        quantized = cast(Any, whole.weight)
        made.qdata.copy_(quantized.qdata)
        made.scale.copy_(quantized.scale)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made.train(linear.training)

    def reset_parameters(self) -> None:
        """Does nothing: there is no weight to draw."""

    def dense(self) -> torch.Tensor:
        """Returns the float weight, `(out_features, in_features)`, in the dtype that the layer computes in."""
        return (self.qdata.float() * self.scale.float()).to(self.weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        if self.torchao_kind == "torchao-int8":
            return nn.functional.linear(inputs, self._torchao_weight(), self.bias)
        rounding = _rounding_of_inputs()
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return nn.functional.linear(inputs, self._torchao_weight(rounding), self.bias)
        # torchao's integer product has no gradient: it passes as if the inputs had not been rounded.
        smooth = nn.functional.linear(inputs, self._torchao_weight(), self.bias)
        exact = nn.functional.linear(inputs.detach(), self._torchao_weight(rounding), self.bias)
        return smooth + (exact - smooth).detach()

    def _torchao_weight(self, rounding: Any = None) -> torch.Tensor:
        """Returns torchao's own tensor over this layer's buffers; putting it together takes microseconds."""
        block = [1, self.in_features]
        tensor = require_torchao().Int8Tensor
        return tensor(self.qdata, self.scale.float(), block, self.weight.dtype, act_quant_kwargs=rounding)

    def extra_repr(self) -> str:
        """Shows shape and kind."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.torchao_kind}"


@cache
def _rounding_of_inputs() -> Any:
    """Returns how torchao rounds inputs: each row by its largest number."""
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return QuantizeTensorToInt8Kwargs(granularity=require_torchao().PerRow())
