"""What low-rank factorization can be asked for."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hfcompress.configuration import Config

Role = Literal["query", "key", "value", "attention_output", "ffn_input", "ffn_output"]
Target = Literal["attention", "ffn", Role, "linear", "classifier"]
Method = Literal["whitened", "svd", "fisher", "nmf"]
Sensitivity = Literal["outputs", "loss", "curvature"]
_SIZES = ("keep", "rank", "energy", "budget")


class LowRankConfig(Config):
    """How to factorise. How far is said by exactly one of `keep`, `rank`, `energy` and `budget`.

    Attributes:
        targets: Roles of the layers: `attention` and `ffn`, or single projections. `linear` is every linear layer
            of the base model, in any family; `classifier` the layer of the head that scores the classes, which is
            worth it where there are many. None at all only where `embeddings` is given.
        keep: Share of the parameters that every target keeps; 0.5 where nothing else is said.
        rank: The rank of every target.
        energy: Share of the squared singular values (with `whitened` of those of the whitened matrix) that every
            target keeps.
        budget: Share of the parameters that all targets together keep; above 0.2, the lowest share of one layer.
            Ranks go where they lower the loss most, by what `sensitivity` says on calibration data.
        budget_of: What `budget` is a share of: the targets' `parameters`, their `bytes`, or the `flops` or the time
            (`latency`, measured on this machine) that they take on a calibration batch.
        method: `whitened` minimises the error of the layer's outputs on the calibration data, `svd` that of its
            weights, `fisher` that of its weights by what the loss says of each input (needs labels), `nmf`
            uses non-negative matrices; `auto` is `whitened` where there is calibration data, else `svd`.
        weigh_outputs: Errors of a layer's outputs count by what the model's predictions say of each direction of them
            (K-FAC: Martens and Grosse 2015). With `whitened` only, where it is done unless it is false; takes a
            backward pass over the calibration data, which needs no labels.
        pivoted: Factors say `rank` of the outputs by the inputs, and the other outputs by those, which takes
            `rank * rank` numbers less for the same product (PIFA: Zhao et al. 2025). A budget or share then leaves
            ranks that are much higher.
        share: Layers that read one input (queries, keys and values; the inputs of gated neurons) share the factor that
            reads it, so that there is one product less for each but the first. They are factorised as one matrix: a
            rank, share or budget counts them as one layer.
        per_head: Queries, keys and values are factorised head by head, each with components of its own: `rank` is that
            of a head, shares and budgets count all. At the same size this is further from the layer than factors of
            all heads together, which see what heads have in common; it keeps heads apart. Other targets are
            factorised whole.
        sequential: Each layer is fitted to give the original's outputs from the inputs that the factorised layers
            before it produce. With `whitened` only; takes longer, and the memory of a second model.
        refit: The second factor is fitted again to the layer's outputs on the calibration data. The result of
            `whitened` is fitted already.
        correct_bias: Biases take over the mean of each layer's error on the calibration data, and `whitened` fits
            the rest. Layers without a bias stay without.
        embeddings: Share of its parameters that the token table keeps; None leaves it whole. An output layer that
            is tied to the table reads the factors, and with `whitened` and calibration data they are fitted to its
            scores; else they are those of plain singular values, which costs a language model far more. The table
            is no part of `targets`, `rank`, `energy` or a budget.
        sensitivity: What `budget` goes by: how far the model's `outputs` move, the rise of the `loss` on labels,
            which is noisier (a model that knows its training texts hardly loses on them), or `curvature`: the rise
            in second order, which `weigh_outputs` knows at every rank of every layer without measuring any, and
            which is gone by wherever outputs are weighed and nothing else is said; else it is `outputs`.
        sensitivity_batches: How many calibration batches `budget` measures on.
        multiple_of: Ranks (but not `rank`) are rounded to a multiple of this, which kernels and 4-bit blocks like:
            down, and with `energy` up.
    """

    targets: tuple[Target, ...] = Field(("attention", "ffn"), strict=False)
    keep: float | None = Field(0.5, gt=0, lt=1)
    rank: int | None = Field(None, ge=1)
    energy: float | None = Field(None, gt=0, lt=1)
    budget: float | None = Field(None, gt=0.2, lt=1)
    budget_of: Literal["parameters", "bytes", "flops", "latency"] = "parameters"
    method: Literal["auto"] | Method = "auto"
    weigh_outputs: bool | None = None
    pivoted: bool = False
    share: bool = False
    per_head: bool = False
    sequential: bool = False
    refit: bool = False
    correct_bias: bool = False
    embeddings: float | None = Field(None, gt=0, lt=1)
    sensitivity: Sensitivity | None = None
    sensitivity_batches: int = Field(2, ge=1)
    multiple_of: int = Field(8, ge=1, le=256)

    def method_with(self, data: bool) -> Method:
        """Returns the method, `auto` being `whitened` where there are calibration data, else `svd`."""
        if self.method != "auto":
            return self.method
        return "whitened" if data or self.sequential else "svd"

    def weighs_outputs_with(self, method: Method) -> bool:
        """Tells whether outputs are weighed with the method that there is."""
        return method == "whitened" and self.weigh_outputs is not False

    def sensitivity_with(self, method: Method) -> Sensitivity:
        """Returns what a budget goes by with the method that there is."""
        return self.sensitivity or ("curvature" if self.weighs_outputs_with(method) else "outputs")

    @model_validator(mode="before")
    @classmethod
    def _default_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and "keep" not in values and any(values.get(name) is not None for name in _SIZES):
            return values | {"keep": None}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"exactly one of {', '.join(_SIZES)} must be given, not {said}")
        if not self.targets and self.embeddings is None:
            raise ValueError("targets must name a role where embeddings is not given")
        for name in ("sequential", "weigh_outputs"):
            if getattr(self, name) and self.method not in ("auto", "whitened"):
                raise ValueError(f"{name} goes with the method whitened, not {self.method}")
        if self.share and self.pivoted:
            raise ValueError("share goes without pivoted: pivoted factors are each layer's own")
        if self.per_head and (self.share or self.pivoted):
            raise ValueError("per_head goes without share and pivoted: the factors of a head are its own")
        if self.budget_of != "parameters" and self.budget is None:
            raise ValueError(f"budget_of {self.budget_of} needs a budget")
        if self.sensitivity == "curvature" and (self.weigh_outputs is False or self.method not in ("auto", "whitened")):
            raise ValueError("sensitivity curvature needs the method whitened, and weigh_outputs that is not false")
        return self
