"""The part of a decoder layer that turns hidden states into queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "pass Layer(norm_weight, norm_eps, wq, bq, wk, bk), or project the tokens and call score_and_select"


class Layer(NamedTuple):
    """An RMSNorm and the query and key projections after it, all that `score_hidden` needs of a decoder layer.

    The layer computes `h = x / rms(x) * norm_weight`, `q = h @ wq.T + bq` and `k = h @ wk.T + bk`. A layer that also
    normalises each head, as Qwen3 and Gemma 3 do, cannot be written so; project its tokens and call `score_and_select`.

    Attributes:
        norm_weight: what the normalised hidden state is multiplied by, `[C]`, floating point, or None for ones. Where a
            model multiplies by one plus its parameter, this is the sum.
        norm_eps: what is added to the mean square, at least 0.
        wq: weight of the query projection, `[H * D, C]`, float32, float16 or bfloat16.
        bq: its bias, `[H * D]`, floating point, or None.
        wk: weight of the key projection, `[Hkv * D, C]`, as `wq`.
        bk: its bias, `[Hkv * D]`, floating point, or None.
        num_key_value_heads: `Hkv`. None derives it from the shapes; a number must agree with them.
    """

    norm_weight: torch.Tensor | None
    norm_eps: float
    wq: torch.Tensor
    bq: torch.Tensor | None
    wk: torch.Tensor
    bk: torch.Tensor | None
    num_key_value_heads: int | None = None

    @classmethod
    def of(
        cls,
        norm: nn.Module,
        q_proj: nn.Module,
        k_proj: nn.Module,
        num_key_value_heads: int | None = None,
    ) -> Layer:
        """Read a layer from its modules. The tensors are shared with them, not copied.

        The norm is called on two probes, so that a module that centres its input, or that multiplies by one plus its
        parameter as Gemma's does, is not misread. On a GPU the host waits for the result.

        Args:
            norm: an RMSNorm with `weight` and `variance_epsilon` or `eps`.
            q_proj: the query projection, a `torch.nn.Linear`.
            k_proj: the key projection, a `torch.nn.Linear`.
            num_key_value_heads: `Hkv`, or None to derive it from the shapes.

        Raises:
            TypeError: a projection is not a plain `torch.nn.Linear`, because it is quantised or adapted.
            ValueError: the norm is not an RMSNorm, a module has hooks, or a weight has no values or another dtype.
        """
        query, key = _checked_linear("q_proj", q_proj), _checked_linear("k_proj", k_proj)
        rms_norm = recognised_rms_norm(norm)
        if rms_norm is None or runs_hooks(norm):
            raise ValueError(
                f"norm: expected an RMSNorm without hooks, x / rms(x) * weight or x / rms(x) * (1 + weight), got "
                f"{type(norm).__name__}, which computes something else or has no weight and epsilon to read; {_REMEDY}"
            )
        factor = rms_norm.factor(norm)
        return cls(factor, rms_norm.epsilon, query.weight, query.bias, key.weight, key.bias, num_key_value_heads)

    def to(self, target: torch.device | torch.dtype) -> Layer:
        """Move the tensors to another device or dtype, and return the layer of them."""
        moved: dict[str, Any] = {
            name: value.to(target) for name, value in self._asdict().items() if isinstance(value, torch.Tensor)
        }
        return self._replace(**moved)


class RMSNorm(NamedTuple):
    """What a module that computes `x / sqrt(mean(x ** 2) + epsilon) * (weight + offset)` has beside its weight.

    Attributes:
        offset: 0, or 1 as in Gemma.
        epsilon: what is added to the mean square.
    """

    offset: float
    epsilon: float

    def factor(self, norm: nn.Module) -> torch.Tensor:
        """Return what `norm`, the module, multiplies the normalised hidden state by, `[C]`."""
        weight = cast(torch.Tensor, norm.weight)
        # a half-precision sum would round the parameter away
        return weight.float() + self.offset if self.offset else weight


@torch.no_grad()
def recognised_rms_norm(norm: nn.Module) -> RMSNorm | None:
    """Find out by calling `norm` on probes what kind of RMSNorm it is; None if it is anything else."""
    weight = getattr(norm, "weight", None)
    epsilons = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    epsilon = next((value for value in epsilons if isinstance(value, float)), None)
    if epsilon is None or not isinstance(weight, torch.Tensor):
        return None
    if weight.dtype not in _DTYPES or weight.dim() != 1 or weight.device.type == "meta":
        return None
    # neither centred nor of unit length, so that subtracting the mean or leaving out the scale would show
    probe = torch.linspace(-1.0, 3.0, weight.numel(), device=weight.device)
    # the second probe is as short as epsilon's root, so that another epsilon would show
    probes = torch.stack([probe, probe * epsilon**0.5]).to(weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        normalized = norm(probes).float()
        expected = probes.float() * torch.rsqrt(probes.float().square().mean(dim=1, keepdim=True) + epsilon)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for offset in (0.0, 1.0):
        if torch.allclose(normalized, expected * (weight.float() + offset), rtol=tolerance, atol=tolerance):
            return RMSNorm(offset, epsilon)
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Say whether calling the module multiplies by its weight, adds its bias and does nothing else."""
    return type(module) is nn.Linear and not runs_hooks(module) and all(map(_is_readable, _tensors(module).values()))


def runs_hooks(module: nn.Module) -> bool:
    """Say whether something runs around the module, such as an adapter or the loading of offloaded weights."""
    is_wrapped = "forward" in vars(module) or bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    return is_wrapped or hasattr(module, "parametrizations")


def _is_readable(parameter: torch.Tensor) -> bool:
    is_plain = type(parameter) in (torch.Tensor, nn.Parameter)
    return is_plain and parameter.dtype in _DTYPES and parameter.device.type != "meta"


def _tensors(linear: nn.Linear) -> dict[str, torch.Tensor]:
    return {"weight": linear.weight} if linear.bias is None else {"weight": linear.weight, "bias": linear.bias}


def _checked_linear(name: str, module: nn.Module) -> nn.Linear:
    """Return `module`, or raise an error if it does more than its weight and bias say."""
    if type(module) is not nn.Linear:
        raise TypeError(
            f"{name}: expected a torch.nn.Linear, got {type(module).__name__}; dequantise a quantised projection, "
            "merge an adapter into its weight, or project the tokens and call score_and_select"
        )
    if runs_hooks(module):
        raise ValueError(
            f"{name}: expected a torch.nn.Linear without hooks or parametrizations, got one with them; remove them, or "
            "project the tokens and call score_and_select"
        )
    for kind, tensor in _tensors(module).items():
        if not _is_readable(tensor):
            raise ValueError(
                f"{name}: expected a float32, float16 or bfloat16 {kind} in memory, got a {type(tensor).__name__} of "
                f"{tensor.dtype} on {tensor.device}; load the weights, or convert them"
            )
    return module
