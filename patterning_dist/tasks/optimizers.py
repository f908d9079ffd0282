"""Optimizers. AdamW for any model; for the attention-only transformer also Muon on the matrices of every head.

Muon (Jordan et al., 2024) steps along the nearest orthogonal matrix of the momentum,

    m <- mu m + g ;   w <- w - lr * sqrt(max(1, rows / columns)) * NewtonSchulz5( g + mu m )

``torch.optim.Muon`` takes 2-D parameters only and would orthogonalise all heads of a layer as one matrix; here every
head is a matrix of its own, and all heads of the model go through one batched iteration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from patterning_dist.config import TrainingConfig
from patterning_dist.errors import PatterningError

# Quintic coefficients of Jordan et al.: steepest at zero, so that five iterations bring singular values into
# [0.7, 1.2].
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of every matrix U S V^T by a quintic Newton-Schulz iteration (Jordan et al., 2024).

    Args:
        matrices: [batch, rows, columns] with rows <= columns.

    Examples:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0]))[None]))
        >>> bool(((0.6 < values) & (values < 1.3)).all())  # near 1, whatever they were
        True
    """
    a, b, c = _COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class PerHeadMuon(torch.optim.Optimizer):
    """Muon on parameters [..., head, rows, columns] and Adam on the rest, in one ``torch.optim.Optimizer``.

    A group with ``muon=True`` holds the matrices; the other groups are Adam (betas, eps per group).
    """

    def __init__(self, groups: Iterable[dict]) -> None:
        super().__init__(
            list(groups),
            {"lr": 1e-3, "muon": False, "momentum": 0.95, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every group that has gradients."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adam)(group, parameters)
        return loss

    def _muon(self, group: dict, parameters: list[nn.Parameter]) -> None:
        updates = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].mul_(group["momentum"]).add_(p.grad)
            updates.append((p.grad + group["momentum"] * state["momentum"]).flatten(0, -3))
        # Lie every matrix down (rows <= columns), so that equal shapes share one batched iteration.
        lying = [u.mT if u.shape[-2] > u.shape[-1] else u for u in updates]
        for shape in sorted({u.shape[-2:] for u in lying}):
            members = [i for i, u in enumerate(lying) if u.shape[-2:] == shape]
            orthogonal = orthogonalize(torch.cat([lying[i] for i in members]))
            for i, o in zip(members, orthogonal.split([lying[i].shape[0] for i in members]), strict=True):
                p = parameters[i]
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                step = o.mT if updates[i].shape[-2:] != shape else o
                p.add_(step.reshape(p.shape), alpha=-group["lr"] * scale)

    def _adam(self, group: dict, parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            denominator = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))


def head_matrix_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of an attention-only transformer.

    ``muon``: ``PerHeadMuon`` with one matrix a head. ``adamw``: plain AdamW on everything, which is what ZeRO stages
    1-3 can partition (they hand the optimizer flat pieces, in which no head is a matrix any more); ``sgd`` likewise.
    """
    groups: dict[str, list[Tensor]] = {"matrices": [], "embeddings": [], "biases": []}
    for name, parameter in model.named_parameters():
        kind = "biases" if name.endswith("position_bias") else "matrices" if parameter.dim() == 3 else "embeddings"
        groups[kind].append(parameter)
    rates = {
        "matrices": config.matrix_learning_rate,
        "embeddings": config.learning_rate,
        "biases": config.learning_rate * config.bias_learning_rate_factor,
    }
    named = [{"params": groups[kind], "lr": rates[kind]} for kind in groups if groups[kind]]
    if config.optimizer != "muon":
        return _plain(named, config, weight_decay=config.weight_decay)
    for kind, group in zip((kind for kind in groups if groups[kind]), named, strict=True):
        group.update(muon=kind == "matrices", weight_decay=config.weight_decay)
    return PerHeadMuon(named)


def plain_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 1711.05101) or SGD on all that requires gradients; matrices decay, vectors do not.

    Raises:
        PatterningError: another optimizer is asked for.
    """
    if config.optimizer == "muon":
        raise PatterningError(
            f"training.optimizer: {config.optimizer} steps on one matrix a head, which the attention-only transformer "
            "alone has; set it to adamw or sgd"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO stage 3 a parameter that lies in pieces says its shape in ds_shape.
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters]
    groups = [
        {"params": [p for p, m in zip(parameters, is_matrix, strict=True) if m == matrix], "weight_decay": decay}
        for matrix, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return _plain([g for g in groups if g["params"]], config, lr=config.learning_rate)


def _plain(groups: list[dict[str, Any]], config: TrainingConfig, **defaults: Any) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, **defaults)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), **defaults)


def set_learning_rate_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's rate relative to the one it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, anneal_steps: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last ``anneal_steps`` of ``num_steps + anneal_steps``.

    Examples:
        >>> [round(learning_rate_factor(step, num_steps=4, warmup_steps=2, anneal_steps=2), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 1.0, 0.67, 0.33]
    """
    rising = (step + 1) / warmup_steps if warmup_steps else 1.0
    return min(1.0, rising, (num_steps + anneal_steps - step) / (anneal_steps + 1))
