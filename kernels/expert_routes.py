"""Which experts a token has: the router's product and the choice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.overlap import overlap
from baton.kernels.reference_experts import Routes
from baton.kernels.routing import RoutingRule


def norm_scores(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x, and a product with it in float32, for few tokens.

    Args:
        x: [T, K], K ≤ 16,384, the last dimension contiguous.
        norm_weight: [K], of any float dtype.
        eps: added to the mean of squares.
        weight: float32 [N, K], contiguous.
        bias: float32 [N].
        pdl: launch while the previous kernel still runs; weights must not come from it.

    Returns:
        norm(x) [T, K] of x's dtype, and what that gives, float32 [T, N].
    """
    num_tokens, size = x.shape
    assert size <= 16384 and x.stride(1) == 1 and weight.is_contiguous()
    normed = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    scores = torch.empty((num_tokens, len(weight)), dtype=torch.float32, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _norm_scores[(len(weight), num_tokens)](
            scores,
            normed,
            x,
            norm_weight,
            weight,
            bias,
            x.stride(0),
            size,
            eps,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            **overlap(x, pdl=pdl),
        )
    return normed, scores


def route(
    logits: Tensor,
    rule: RoutingRule,
    choice_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    *,
    pdl: bool = False,
) -> Routes:
    """As kernels.reference_experts.route; experts are int32. `pdl`: see above."""
    num_tokens, num_experts = logits.shape
    assert num_experts == rule.num_experts and logits.stride(1) == 1
    shape = (num_tokens, rule.top_k)
    chosen = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route[(num_tokens,)](
            chosen,
            weights,
            logits,
            choice_bias,
            expert_scale,
            logits.stride(0),
            NUM_EXPERTS=num_experts,
            TOP_K=rule.top_k,
            SCORING=rule.scoring,
            NORMALISED=rule.is_normalised,
            FLOOR=rule.floor,
            SCALE=rule.scale,
            GROUPS=rule.num_groups,
            TOP_GROUPS=rule.top_groups,
            GROUP_BEST=rule.group_best,
            BLOCK=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(rule.top_k),
            BLOCK_G=triton.next_power_of_2(rule.num_groups),
            # One warp needs no shared memory to find the largest.
            num_warps=1 if num_experts <= 256 else 4,
            **overlap(logits, pdl=pdl),
        )
    return Routes(chosen, weights)


@triton.jit
def _norm_scores(
    scores_ptr,
    normed_ptr,
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One score of one token. All programs of a token make its norm; the first stores it."""
    number, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    # No kernel before this one writes weights.
    weight = tl.load(weight_ptr + number * size + column, mask=inside, other=0.0)
    gain = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + number)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = (x * scale * gain).to(normed_ptr.dtype.element_ty)
    if number == 0:
        tl.store(normed_ptr + token * size + column, normed, mask=inside)
    score = tl.sum(weight * normed.to(tl.float32), axis=0) + bias
    tl.store(scores_ptr + token * tl.num_programs(0) + number, score)


@triton.jit
def _route(
    experts_ptr,
    weights_ptr,
    logits_ptr,
    bias_ptr,
    scale_ptr,
    stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISED: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    is_real = expert < NUM_EXPERTS
    logit = tl.load(logits_ptr + token * stride + expert, mask=is_real, other=float("-inf"))
    score = logit
    if SCORING == "softmax":
        exponential = tl.exp(logit - tl.max(logit, 0))
        score = exponential / tl.sum(exponential, 0)
    elif SCORING == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=is_real, other=0.0)
    choice = tl.where(is_real, choice, float("-inf"))
    if GROUPS > 1:
        group = expert // (NUM_EXPERTS // GROUPS)
        place = tl.arange(0, BLOCK_G)
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        for number in tl.static_range(GROUPS):
            own = tl.where(group == number, choice, float("-inf"))
            highest = tl.max(own, 0)
            if GROUP_BEST == 2:
                first = tl.argmax(own, 0)
                highest += tl.max(tl.where(expert == first, float("-inf"), own), 0)
            best = tl.where(place == number, highest, best)
        is_left = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            at = tl.argmax(best, 0)
            is_left = is_left | (group == at)
            best = tl.where(place == at, float("-inf"), best)
        choice = tl.where(is_left, choice, float("-inf"))

    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for number in tl.static_range(TOP_K):
        # Of equal ones the first. Where there is no number at all, still an expert.
        at = tl.minimum(tl.argmax(choice, 0), NUM_EXPERTS - 1)
        own = tl.sum(tl.where(expert == at, score, 0.0), 0)
        chosen = tl.where(place == number, at, chosen)
        weight = tl.where(place == number, own, weight)
        choice = tl.where(expert == at, float("-inf"), choice)
    inside = place < TOP_K
    if SCORING == "softmax_of_chosen":
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
    elif NORMALISED:
        weight = weight / (tl.sum(tl.where(inside, weight, 0.0), 0) + FLOOR)
    weight = weight * SCALE
    if scale_ptr is not None:
        weight = weight * tl.load(scale_ptr + chosen, mask=inside, other=1.0)
    tl.store(experts_ptr + token * TOP_K + place, chosen, mask=inside)
    tl.store(weights_ptr + token * TOP_K + place, weight, mask=inside)
