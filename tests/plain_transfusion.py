"""TransFusion's matching as a plain loop, written from the paper (Rinaldi et al. 2025) and from nothing else.

The oracle of `transfuse.match(method="transfusion")` for a ViT of transformers, in both its forms. Every tensor is seen
as a matrix whose rows and columns belong to spaces; every map is a dense permutation matrix; nothing is cached and
nothing is clever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Matrix = NDArray[np.float64]
Weights = dict[str, Matrix]
Tensors = list[tuple[str, str, str]]

MAX_SWEEPS = 100


@dataclass
class Found:
    """What the loop found: `index[space][i]` is the source unit of target unit i; `heads[l]` the same for heads."""

    index: dict[str, list[int]]
    heads: list[list[int]]
    objective: list[float]


def plain_transfusion(source: Weights, target: Weights, layers: int, heads: int, *, paper_form: bool) -> Found:
    """Algorithm 1: coordinate ascent in the order of the forward pass until nothing improves.

    Args:
        paper_form: eq. 7 to 9 as they are printed; else the output projection counts where q, k and v do.
    """
    tensors = vit_tensors(layers)
    a, b = as_matrices(source, tensors), as_matrices(target, tensors)
    orders = [match_heads(a, b, layer, heads, paper_form) for layer in range(layers)]  # eq. 7 and 8, once
    maps: Weights = {}
    for name, rows, columns in tensors:
        for space, size in ((rows, a[name].shape[0]), (columns, a[name].shape[1])):
            if space:
                maps[space] = np.eye(size)
    for layer in range(layers):
        width = len(maps[f"heads.{layer}"]) // heads
        maps[f"heads.{layer}"] = compose_heads(orders[layer], [np.eye(width)] * heads)

    objective = [total(a, b, maps, tensors)]
    for _ in range(MAX_SWEEPS):
        improved = False
        for space in forward_order(layers):
            if space.startswith("heads"):
                layer = int(space.split(".")[1])
                proposal = inside_heads(a, b, maps, layer, orders[layer], paper_form)
            else:
                proposal = git_rebasin_step(a, b, maps, tensors, space)
            before, after = total(a, b, maps, tensors), total(a, b, {**maps, space: proposal}, tensors)
            if after > before + 1e-9 * abs(before):
                maps[space] = proposal
                improved = True
        objective.append(total(a, b, maps, tensors))
        if not improved:
            break
    return Found({space: found.argmax(1).tolist() for space, found in maps.items()}, orders, objective)


def vit_tensors(layers: int) -> Tensors:
    """(name, space of the rows, space of the columns) of every tensor; "" is an axis that nobody moves."""
    last = f"stream.{2 * layers}"
    tensors = [
        ("vit.embeddings.cls_token", "", "stream.0"),
        ("vit.embeddings.position_embeddings", "", "stream.0"),
        ("vit.embeddings.patch_embeddings.projection.weight", "stream.0", ""),
        ("vit.embeddings.patch_embeddings.projection.bias", "stream.0", ""),
        ("vit.layernorm.weight", last, ""),
        ("vit.layernorm.bias", last, ""),
        ("classifier.weight", "", last),
    ]
    for layer in range(layers):
        at = f"vit.encoder.layer.{layer}"
        before, middle, after = (f"stream.{2 * layer + step}" for step in range(3))
        for norm, space in (("layernorm_before", before), ("layernorm_after", middle)):
            tensors += [(f"{at}.{norm}.weight", space, ""), (f"{at}.{norm}.bias", space, "")]
        for linear, out, into in (
            ("attention.attention.query", f"heads.{layer}", before),
            ("attention.attention.key", f"heads.{layer}", before),
            ("attention.attention.value", f"heads.{layer}", before),
            ("attention.output.dense", middle, f"heads.{layer}"),
            ("intermediate.dense", f"mlp.{layer}", middle),
            ("output.dense", after, f"mlp.{layer}"),
        ):
            tensors += [(f"{at}.{linear}.weight", out, into), (f"{at}.{linear}.bias", out, "")]
    return tensors


def forward_order(layers: int) -> list[str]:
    """stream.0, heads.0, stream.1, mlp.0, stream.2, ..."""
    order = ["stream.0"]
    for layer in range(layers):
        order += [f"heads.{layer}", f"stream.{2 * layer + 1}", f"mlp.{layer}", f"stream.{2 * layer + 2}"]
    return order


def as_matrices(weights: Weights, tensors: Tensors) -> Weights:
    """Vectors become one column, tables (1, tokens, width) lose their first axis, kernels are flattened."""
    matrices = {}
    for name, rows, columns in tensors:
        tensor = weights[name].astype(np.float64)
        matrices[name] = tensor.reshape(len(tensor), -1) if rows else tensor.reshape(-1, tensor.shape[-1])
        assert rows or columns
    return matrices


def map_of(maps: Weights, space: str, width: int) -> Matrix:
    return maps[space] if space else np.eye(width)


def moved(matrix: Matrix, maps: Weights, rows: str, columns: str) -> Matrix:
    """P_rows W P_columns^T."""
    left, right = (map_of(maps, space, size) for space, size in zip((rows, columns), matrix.shape, strict=True))
    return left @ matrix @ right.T


def total(a: Weights, b: Weights, maps: Weights, tensors: Tensors) -> float:
    """F = sum of <target, T source> over all tensors."""
    return sum(float((b[name] * moved(a[name], maps, rows, columns)).sum()) for name, rows, columns in tensors)


def best(scores: Matrix) -> Matrix:
    """The permutation matrix P with the largest <P, scores>."""
    rows, columns = linear_sum_assignment(scores, maximize=True)
    found = np.zeros_like(scores)
    found[rows, columns] = 1
    return found


def blocks(matrix: Matrix, heads: int) -> list[Matrix]:
    return np.split(matrix, heads)


def match_heads(a: Weights, b: Weights, layer: int, heads: int, paper_form: bool) -> list[int]:
    """P_inter: the source head of every target head, by distances of sorted singular values (eq. 7, 8)."""
    distance = np.zeros((heads, heads))
    at = f"vit.encoder.layer.{layer}.attention"
    pairs = [(a[name], b[name]) for name in (f"{at}.attention.{one}.weight" for one in ("query", "key", "value"))]
    if not paper_form:  # heads lie in its columns
        pairs.append((a[f"{at}.output.dense.weight"].T, b[f"{at}.output.dense.weight"].T))
    for one, other in pairs:
        spectra_a = [np.linalg.svd(block, compute_uv=False) for block in blocks(one, heads)]
        spectra_b = [np.linalg.svd(block, compute_uv=False) for block in blocks(other, heads)]
        for i in range(heads):
            for j in range(heads):
                distance[i, j] += np.linalg.norm(spectra_b[i] - spectra_a[j])
    return best(-distance).argmax(1).tolist()


def inside_heads(a: Weights, b: Weights, maps: Weights, layer: int, order: list[int], paper_form: bool) -> Matrix:
    """P_attn: one permutation inside each matched pair of heads for q, k and v together (eq. 9, 24)."""
    incoming, outgoing = maps[f"stream.{2 * layer}"], maps[f"stream.{2 * layer + 1}"]
    output = f"vit.encoder.layer.{layer}.attention.output.dense.weight"
    inner = []
    for i, j in enumerate(order):
        scores = 0
        for projection in ("query", "key", "value"):
            name = f"vit.encoder.layer.{layer}.attention.attention.{projection}"
            weight_b, weight_a = blocks(b[f"{name}.weight"], len(order))[i], blocks(a[f"{name}.weight"], len(order))[j]
            bias_b, bias_a = blocks(b[f"{name}.bias"], len(order))[i], blocks(a[f"{name}.bias"], len(order))[j]
            scores = scores + weight_b @ (weight_a @ incoming.T).T + bias_b @ bias_a.T
        if not paper_form:
            weight_b, weight_a = (blocks(one[output].T, len(order))[k] for one, k in ((b, i), (a, j)))
            scores = scores + weight_b @ (weight_a @ outgoing.T).T
        inner.append(best(np.asarray(scores)))
    return compose_heads(order, inner)


def compose_heads(order: list[int], inner: list[Matrix]) -> Matrix:
    """Block (i, order[i]) is inner[i], every other block is zero (eq. 24)."""
    width = len(inner[0])
    found = np.zeros((len(order) * width, len(order) * width))
    for i, j in enumerate(order):
        found[i * width : (i + 1) * width, j * width : (j + 1) * width] = inner[i]
    return found


def git_rebasin_step(a: Weights, b: Weights, maps: Weights, tensors: Tensors, space: str) -> Matrix:
    """The best permutation of a space given all others, over every tensor that holds it."""
    scores = np.zeros_like(maps[space])
    for name, rows, columns in tensors:
        height, width = a[name].shape
        if rows == space:
            scores += b[name] @ (a[name] @ map_of(maps, columns, width).T).T
        if columns == space:
            scores += b[name].T @ (map_of(maps, rows, height) @ a[name])
    return best(scores)
