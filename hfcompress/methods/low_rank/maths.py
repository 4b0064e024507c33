"""The best product of two thin matrices, in several senses. Pure functions of tensors; all work in float64."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfcompress.errors import CompressionError

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Pulled:
    """What a curvature by outputs is to the inputs: all of it that truncating a weight W by it takes.

    Attributes:
        moment: `Wᵀ C W`, `(in, in)`: the second moments of the gradients that reach the inputs by way of W.
        trace: That of C.
    """

    moment: torch.Tensor
    trace: float


# Of layers whose matrices stand one below the other: one for each, for what they give is weighed apart.
Curvature = torch.Tensor | Sequence[torch.Tensor] | Pulled

# How far `retarget` trusts the calibration inputs: the part of their mean energy that is added to every direction.
_RETARGET_RIDGE = 0.01
_REFIT_RIDGE = 1e-6
# Below this share of the largest, a squared singular value that a Gram matrix gives is not trusted.
_GRAM_DIGITS = 1e-7
# The part of their mean that is added to what the loss says of each direction of the outputs.
_CURVATURE_RIDGE = 0.01


def truncate(
    weight: torch.Tensor,
    rank: int,
    second_moment: torch.Tensor | None = None,
    curvature: Curvature | None = None,
    gram: torch.Tensor | None = None,
) -> Factors:
    """Finds the best product of two thin matrices, by singular value decomposition.

    With second moments of the inputs the product minimises `E |(W - up @ down) x|²`, the true error of the
    layer's outputs (Chen et al. 2021, DRONE; Wang et al. 2024, SVD-LLM: the closed form by whitening). With a
    diagonal matrix it minimises the squares of `W - up @ down` weighted by column, which is what Fisher-weighted
    factorization asks for (Hsu et al. 2022, FWSVD). With the curvature of the loss as well it minimises
    `tr(C (W - up @ down) S (W - up @ down)ᵀ)`, which is twice what the loss rises by in second order (Martens and
    Grosse 2015, K-FAC; Chekalina et al. 2025, GFWSVD).

    Args:
        weight: `(out, in)`, finite.
        rank: At least 1; clipped to `min(out, in)`.
        second_moment: S, `(in, in)`, symmetric positive semi-definite; None for the identity.
        curvature: C, `(out, out)`, symmetric positive semi-definite, or its blocks, or what it is to the inputs; None
            for the identity.
        gram: `W S Wᵀ`, `(out, out)`, where that is known and S is not: the second moments of the outputs.

    Returns:
        `up` `(out, rank)` and `down` `(rank, in)`, float32. Each component has the same norm in both, so that
        neither factor is out of scale for an optimizer or a quantizer.

    Raises:
        CompressionError: The weight or the moments are not finite.
    """
    require_finite(weight, second_moment if gram is None else gram, curvature)
    if isinstance(curvature, Pulled):
        return balance(*_from_the_right(weight, min(rank, *weight.shape), second_moment, _ridged(weight, curvature)))
    # W R = U s Vᵀ for any R with R Rᵀ = S, so the best product is U_r U_rᵀ W: no inverse is ever needed.
    roots = [] if curvature is None else _left_roots(curvature)
    seen = _weighed(weight, roots)
    if gram is None:
        up = _left_vectors(seen, second_moment, rank)
    else:
        up = torch.linalg.eigh(_weighed_gram(gram, roots))[1].flip(1)[:, :rank]
    down = up.T @ seen
    if roots:
        parts = zip(roots, up.split([len(root) for root in roots]), strict=True)
        up = torch.cat([torch.linalg.solve_triangular(root, part, upper=True) for root, part in parts])
    return balance(up, down)


def energies(
    weight: torch.Tensor,
    second_moment: torch.Tensor | None = None,
    curvature: Curvature | None = None,
    gram: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the squared singular values of the whitened matrix, float64 and descending.

    The sum of those beyond a rank is the error of `truncate` at that rank, which takes the same arguments. They are
    exact to some 1e-13 of the largest.

    Raises:
        CompressionError: The weight or the moments are not finite.
    """
    require_finite(weight, second_moment if gram is None else gram, curvature)
    if curvature is not None and not any(block.any() for block in _blocks(curvature)):
        return torch.zeros(min(weight.shape), dtype=torch.float64, device=weight.device)
    if isinstance(curvature, Pulled):
        found = torch.linalg.eigvalsh(_both_sides(_ridged(weight, curvature), _root_of(weight, second_moment)))
        return found.flip(0)[: min(weight.shape)].clamp_min(0)
    roots = [] if curvature is None else _left_roots(curvature)
    if gram is not None:
        return torch.linalg.eigvalsh(_weighed_gram(gram, roots)).flip(0).clamp_min(0)
    seen = _weighed(weight, roots)
    if seen.shape[0] <= seen.shape[1]:
        gram = _wide_gram(seen, second_moment)
    else:
        matrix = _whitened(seen, second_moment)
        gram = matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def _left_vectors(weight: torch.Tensor, second_moment: torch.Tensor | None, rank: int) -> torch.Tensor:
    """Returns the first `rank` left singular vectors of a whitened matrix, float64 `(out, rank)`.

    Eigenvectors of the smaller Gram matrix are these, two to six times sooner than by a singular value
    decomposition, but squaring halves the digits: where what is cut off is no more than rounding, or a vector that
    is kept is, the decomposition itself is taken.
    """
    wide = weight.shape[0] <= weight.shape[1]
    matrix = None if wide else _whitened(weight, second_moment)
    squares, vectors = torch.linalg.eigh(_wide_gram(weight, second_moment) if matrix is None else matrix.T @ matrix)
    squares, vectors = squares.flip(0), vectors.flip(1)[:, :rank]
    if _is_rounding(squares, rank):
        whitened = _whitened(weight, second_moment) if matrix is None else matrix
        return torch.linalg.svd(whitened, full_matrices=False).U[:, :rank]
    return vectors if matrix is None else matrix @ (vectors / squares[:rank].sqrt())


def pull(weight: torch.Tensor, curvature: torch.Tensor) -> Pulled:
    """Returns what a curvature `(out, out)` by a weight's outputs is to its inputs."""
    weight, curvature = weight.double(), curvature.double()
    return Pulled((weight.T @ curvature @ weight).float(), curvature.trace().item())


def _ridged(weight: torch.Tensor, curvature: Pulled) -> torch.Tensor:
    """Returns `Wᵀ (C + λ) W` in float64, λ being that of `_left_roots`; `Wᵀ W` where C is zero."""
    level = _CURVATURE_RIDGE * curvature.trace / len(weight)
    square = weight.double().T @ weight.double()
    return square if level <= torch.finfo(torch.float64).tiny else curvature.moment.double() + level * square


def _root_of(weight: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
    """Returns the root of the second moments of what a matrix reads, or the identity."""
    size = weight.shape[1]
    identity = torch.eye(size, dtype=torch.float64, device=weight.device)
    return identity if second_moment is None else _root(second_moment.double())


def _both_sides(square: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    return root.T @ square @ root


def _from_the_right(
    weight: torch.Tensor, rank: int, second_moment: torch.Tensor | None, square: torch.Tensor
) -> Factors:
    """Truncates `L W R = U s Vᵀ` by its right singular vectors, with `Lᵀ L` known as `Wᵀ Lᵀ L W` alone.

    `L⁻¹ U_r = W R V_r / s` and `U_rᵀ L W = Vᵀ_r Rᵀ Wᵀ Lᵀ L W / s`, so that L is not needed either.
    """
    root = _root_of(weight, second_moment)
    squares, vectors = torch.linalg.eigh(_both_sides(square, root))
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)[:, :rank]
    sizes = squares.sqrt()
    if _is_rounding(squares, rank):  # as in `_left_vectors`
        _, sizes, transposed = torch.linalg.svd(_root(square).T @ root)
        vectors = transposed[:rank].T
    kept = sizes[:rank]
    scales = torch.where(kept > kept[:1] * torch.finfo(kept.dtype).eps * len(root), 1 / kept, 0)
    ahead = root @ vectors * scales
    return weight.double() @ ahead, ahead.T @ square


def _is_rounding(squares: torch.Tensor, rank: int) -> bool:
    """Tells whether, of squared singular values off a Gram matrix, what is cut off or kept may be no more than that."""
    tail = squares[rank:].clamp_min(0).sum()
    return bool(tail <= _GRAM_DIGITS * squares[0] or squares[:rank][-1] <= _GRAM_DIGITS * squares[0] / len(squares))


def _wide_gram(weight: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
    """Returns the whitened matrix times its transpose, `(out, out)`, without a root of the moments: `W S Wᵀ`."""
    return (weight if second_moment is None else weight @ second_moment.double()) @ weight.T


def _whitened(weight: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
    return weight.double() if second_moment is None else weight.double() @ _root(second_moment.double())


def _root(moment: torch.Tensor) -> torch.Tensor:
    """Returns a matrix R with `R Rᵀ` equal to the moments; eigenvectors serve where Cholesky cannot."""
    root, failed = torch.linalg.cholesky_ex(moment)
    if not failed and torch.isfinite(root).all():
        return root
    squares, directions = torch.linalg.eigh(moment)
    return directions * squares.clamp_min(0).sqrt()


def _blocks(curvature: Curvature) -> Sequence[torch.Tensor]:
    if isinstance(curvature, Pulled):
        return [curvature.moment]
    return [curvature] if isinstance(curvature, torch.Tensor) else curvature


def _left_roots(curvature: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns, block by block, an invertible upper triangular L: `Lᵀ L` is the block and a part of the mean of all."""
    blocks = [block.double() for block in _blocks(curvature)]
    level = _CURVATURE_RIDGE * torch.cat([block.diagonal() for block in blocks]).mean()
    identities = [torch.eye(len(block), dtype=block.dtype, device=block.device) for block in blocks]
    if level <= torch.finfo(torch.float64).tiny:
        return identities
    pairs = zip(blocks, identities, strict=True)
    return [torch.linalg.cholesky(block + level * identity, upper=True) for block, identity in pairs]


def _weighed(weight: torch.Tensor, roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the rows of a matrix, float64, multiplied by the roots of their blocks, where there are any."""
    if not roots:
        return weight.double()
    parts = zip(roots, weight.double().split([len(root) for root in roots]), strict=True)
    return torch.cat([root @ part for root, part in parts])


def _weighed_gram(gram: torch.Tensor, roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns what a Gram matrix `(out, out)` becomes, in float64, when the rows of its matrix are weighed."""
    return _weighed(_weighed(gram, roots).T, roots)


def balance(up: torch.Tensor, down: torch.Tensor) -> Factors:
    """Gives each component the same norm in both factors, in float32; a component of norm 0 becomes 0 in both."""
    above, below = up.norm(dim=0), down.norm(dim=1)
    both = (above > 0) & (below > 0)
    share = torch.where(both, (below / torch.where(both, above, 1)).sqrt(), 0)
    return (up * share).float(), (down / torch.where(both, share, 1).unsqueeze(1) * both.unsqueeze(1)).float()


def require_finite(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, curvature: Curvature | None = None
) -> None:
    """Refuses numbers that no decomposition can take.

    Raises:
        CompressionError: Says which matrix holds them.
    """
    blocks = [] if curvature is None else _blocks(curvature)
    named = [("weight", weight), ("second moment", second_moment), *(("curvature", block) for block in blocks)]
    for name, matrix in named:
        if matrix is not None and not torch.isfinite(matrix).all():
            raise CompressionError(f"the {name} holds values that are not finite")


def retarget(
    weight: torch.Tensor, second_moment: torch.Tensor, cross_moment: torch.Tensor, ridge: float = _RETARGET_RIDGE
) -> torch.Tensor:
    """Finds the full matrix that makes the original outputs out of other inputs.

    It minimises `E |W x - A x'|² + λ |W - A|²`, x being what the original layer gets and x' what this one will.
    The error of any other matrix is that of this one plus its distance from it, measured by `E x' x'ᵀ + λ`, so
    that truncating it is exact.

    Args:
        weight: `W`, `(out, in)`.
        second_moment: `E x' x'ᵀ`, `(in, in)`.
        cross_moment: `E x x'ᵀ`, `(in, in)`.
        ridge: λ, in units of the mean energy of x'; keeps directions that the data do not show as they are.

    Returns:
        `A`, float64.
    """
    size = len(second_moment)
    level = ridge * second_moment.double().diagonal().mean()
    if level <= 0:
        return weight.double()
    identity = torch.eye(size, dtype=torch.float64, device=weight.device)
    aim = weight.double() @ (cross_moment.double() + level * identity)
    return torch.linalg.solve(second_moment.double() + level * identity, aim, left=False)


def refit(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, second_moment: torch.Tensor) -> Factors:
    """Finds the best `up` for a `down` that is given: least squares of the outputs on the calibration inputs.

    Args:
        weight: `(out, in)`.
        up: `(out, rank)`; stays as it is in directions that the data do not show.
        down: `(rank, in)`.
        second_moment: `(in, in)`.

    Returns:
        The new `up`, and `down`, balanced.
    """
    moment, thin = second_moment.double(), down.double()
    seen = thin @ moment
    square = seen @ thin.T
    level = _REFIT_RIDGE * square.diagonal().mean()
    if level <= 0:
        return up, down
    ridge = level * torch.eye(len(square), dtype=torch.float64, device=square.device)
    aim = weight.double() @ seen.T + level * up.double()
    return balance(torch.linalg.solve(square + ridge, aim, left=False), thin)


def nonnegative(weight: torch.Tensor, rank: int, iterations: int = 100) -> Factors:
    """Factorises by non-negative matrices (scikit-learn's coordinate descent, deterministic).

    A matrix with signs is split: `[W⁺ W⁻] ≈ up @ [D⁺ D⁻]` with all of them non-negative, so
    `W ≈ up @ (D⁺ - D⁻)`. No such product is nearer to W than the plain truncation.

    Args:
        weight: `(out, in)`, finite.
        rank: At least 1; clipped to `min(out, in)`.
        iterations: At most so many sweeps.

    Returns:
        As `truncate`.

    Raises:
        CompressionError: The weight is not finite.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    require_finite(weight)
    rank = min(rank, *weight.shape)
    matrix = weight.double().cpu()
    largest = matrix.abs().max()
    if largest == 0:
        return weight.new_zeros(len(weight), rank).float(), weight.new_zeros(rank, weight.shape[1]).float()
    scaled = matrix / largest
    split = torch.cat((scaled.clamp_min(0), (-scaled).clamp_min(0)), dim=1)
    # scikit-learn's own start from singular vectors divides by zero where the matrix has fewer than `rank`.
    left, sizes, right = torch.linalg.svd(split, full_matrices=False)
    scales = sizes[:rank].sqrt()
    start = (left[:, :rank] * scales).abs(), (scales.unsqueeze(1) * right[:rank]).abs()
    solver = NMF(rank, init="custom", tol=1e-4, max_iter=iterations)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bounded number of sweeps is what is asked for
        up = torch.from_numpy(solver.fit_transform(split.numpy(), W=start[0].numpy(), H=start[1].numpy()))
    positive, negative = torch.from_numpy(solver.components_).chunk(2, dim=1)
    up, down = balance(up * largest, positive - negative)
    return up.to(weight.device), down.to(weight.device)
