"""The normal form applied to an input, and its backward: what is formed, in which order, and what is kept."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adapterzoo.base import Base
from adapterzoo.wide import in_transform, wide

# Elements that are multiplied at a time where only sums of products are wanted, on a processor and elsewhere.
_BLOCK, _DEVICE_BLOCK = 2**18, 2**24
_LOST = 2.0**8  # how often the square of y may hold that of l∘z, when the second is to be had from the first


class Operands(NamedTuple):
    """What y is made of and what may want a gradient; None is absent. Shapes as in `factored_linear`."""

    x: Tensor
    delta: Tensor | None
    U: Tensor | None
    V: Tensor | None
    bias: Tensor | None
    remainder: Tensor | None
    turned: Tensor | None  # what W sees in the place of x

    @property
    def update_trains(self) -> bool:
        """Whether a gradient is wanted of the update itself."""
        own = (self.delta, self.U, self.V, self.remainder)
        return any(t is not None and t.requires_grad for t in own)

    @property
    def seen_by_base(self) -> Tensor:
        """What W is applied to."""
        return self.x if self.turned is None else self.turned


class Dropout(NamedTuple):
    """Dropout of x on the way into the first rows of V. The factor 1 / (1 − p) acts on the thin side."""

    p: float
    rows: int
    dropped: Tensor  # bool, of the shape of x

    @classmethod
    def draw(cls, x: Tensor, p: float, rows: int) -> "Dropout":
        """Every element dropped with probability p, from torch's own generator of the device.

        On a CPU the draw costs more than its use, so an element gets 16 random bits: p is rounded to a multiple of
        2^-16, and the factor goes by the rounded one.
        """
        steps = round(p * 2**16)
        if x.device.type != "cpu" or not 0 < steps < 2**16 or torch.compiler.is_compiling() or in_transform():
            return cls(p, rows, torch.rand(x.shape, device=x.device) < p)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        return cls(steps / 2**16, rows, (words.view(torch.int16) < steps - 2**15)[: x.numel()].view(x.shape))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[R, n] -> the rows that see the dropout, and the others."""
        own, others = rows.split([self.rows, len(rows) - self.rows])  # type: ignore[no-untyped-call]
        return own, others

    def zero(self, x: Tensor) -> Tensor:
        """X with zeros where it is dropped: [tokens, in]."""
        return torch.where(flat(self.dropped), 0, x)


class Products(NamedTuple):
    """y, and what was formed on the way: h = x Vᵀ, and z = x Wᵀ where it was to be kept."""

    y: Tensor
    h: Tensor | None
    z: Tensor | None


def flat(x: Tensor) -> Tensor:
    """[..., n] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])


def forward(base: Base, operands: Operands, drop: Dropout | None, in_place: bool, keep_z: bool = False) -> Products:
    """y = x Wᵀ + δ∘(x Wᵀ) + (x Vᵀ) Uᵀ + x Dᵀ + bias, rounded once.

    In the memory of x Wᵀ where `in_place` allows it, else by operations that autograd and torch.func can follow.
    """
    x, delta, U, V, bias, remainder, _ = operands
    z = base.apply(operands.seen_by_base, bias if delta is None else None)
    with _without_autocast(x.device.type):
        narrow, total = z.dtype, _at_least_float32(z.dtype)
        rows, y, h = flat(x).to(narrow), flat(z), None
        if delta is not None:
            gain = (1 + delta).to(total)
            own = y if in_place and not keep_z and narrow == total else None
            # The bias is not in z: a large gain would magnify the round-off of a product that holds it.
            y = torch.mul(y, gain, out=own) if bias is None else torch.addcmul(bias.to(total), y, gain, out=own)
        elif remainder is not None:
            y = y.to(total)
        if U is not None and V is not None:
            h = _project(rows, V.to(narrow), drop)
            left, right = h.to(y.dtype), U.to(y.dtype).mT
            y = y.addmm_(left, right) if in_place else torch.addmm(y, left, right)
        if remainder is not None:
            dense = rows @ remainder.to(narrow).mT
            y = y.add_(dense) if in_place else y + dense
        return Products(y.to(narrow).reshape(z.shape), h, z if keep_z else None)


# Note [What the backward keeps]
# Its operands (the factors live anyway), h, and for a trained δ: [out] either z or, if lean, y. The base's tensors are
# saved too, so that torch sees a change of them between forward and backward. A backward that is to be differentiated
# itself is autograd's through `forward`: there h and z must carry their graph.
class FactoredLinear(torch.autograd.Function):
    """y of `forward`, with the gradients of `backward`."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, base: Base, lean: bool, p: float, drop_rows: int, dropped: Tensor | None, *operands: Any
    ) -> Tensor:
        every = Operands(*operands)
        compiling = torch.compiler.is_compiling()  # then the compiler chooses what to keep and what to write in place
        per_row = every.delta is not None and every.delta.shape[0] > 1 and ctx.needs_input_grad[6]
        ctx.lean = lean and per_row and not compiling
        ctx.base, ctx.p, ctx.drop_rows, ctx.device = base, p, drop_rows, every.x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device)
        ctx.autocast_dtype = torch.get_autocast_dtype(ctx.device)
        drop = None if dropped is None else Dropout(p, drop_rows, dropped)
        made = forward(base, every, drop, in_place=not compiling, keep_z=per_row and not ctx.lean)
        y: Tensor = torch.ops.aten._unsafe_view.default(made.y, made.y.shape)  # no view: users may write to it
        held = every if ctx.lean else every._replace(bias=None)  # its value is of no use without y
        ctx.save_for_backward(*held, dropped, made.h, y if ctx.lean else made.z, *base.tensors)
        ctx.bias_dtype = None if every.bias is None else every.bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved, count = ctx.saved_tensors, len(Operands._fields)
        operands, (dropped, h, kept) = Operands(*saved[:count]), saved[count : count + 3]
        drop = None if dropped is None else Dropout(ctx.p, ctx.drop_rows, dropped)
        wanted = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (None,) * 5 + _differentiable(ctx, grad, operands, drop, wanted)
        with _without_autocast(ctx.device):
            return (None,) * 5 + _gradients(ctx, grad, operands, drop, h, kept, wanted)


def _gradients(
    ctx: Any,
    grad: Tensor,
    operands: Operands,
    drop: Dropout | None,
    h: Tensor | None,
    kept: Any,
    wanted: tuple[bool, ...],
) -> tuple[Any, ...]:
    """The gradients of those operands that want one, in their order."""
    x, delta, U, V, _, remainder, turned = cast(tuple[Any, ...], operands)  # what is wanted is there
    for_x, for_delta, for_U, for_V, for_bias, for_remainder, for_turned = wanted
    base_is_at_x = turned is None
    narrow, total = grad.dtype, _at_least_float32(grad.dtype)
    dy, rows = flat(grad), flat(x).to(narrow)
    gain: Any = None if delta is None else (1 + delta).to(total)
    shared = gain is not None and len(gain) == 1  # one gain for all rows: ∂δ = ⟨∂y W, x⟩ needs no z
    dh: Any = None
    dx: Any = None
    d_delta: Any = None
    d_bias = dy.sum(dim=0, dtype=total).to(ctx.bias_dtype) if for_bias else None
    if U is not None and (for_x or for_V):
        dh = dy @ U.to(narrow)
    dU = (h.mT @ dy).mT.to(U.dtype) if h is not None and for_U else None
    dV = _project_back(dh, rows, drop).to(V.dtype) if for_V else None
    d_remainder = (dy.mT @ rows).to(remainder.dtype) if for_remainder else None
    if (for_x if base_is_at_x else for_turned) or (for_delta and shared):
        with _autocast_of(ctx):
            dx = ctx.base.apply_t(dy if gain is None or shared else (dy * gain).to(narrow)).to(narrow)
    if for_delta and shared:
        d_delta = _sum_of_products(dx, rows if base_is_at_x else flat(turned).to(narrow))
    elif for_delta:
        z = _base_product(ctx, operands, h, gain, kept) if ctx.lean else kept
        d_delta = _column_products(dy, flat(z))
    if dx is not None and shared and (for_x or for_turned):
        dx = dx.mul_(gain)
    d_turned = None
    if not base_is_at_x:
        d_turned = dx.view(turned.shape).to(turned.dtype) if for_turned else None
        dx = torch.zeros_like(rows) if for_x else None
    if for_x:
        dx = dx if U is None else _add_back(dx, dh, V.to(narrow), drop)
        dx = dx if remainder is None else dx.addmm_(dy, remainder.to(narrow))
        dx = dx.view(x.shape).to(x.dtype)
    return (
        dx if for_x else None,
        d_delta.to(delta.dtype) if for_delta else None,
        dU,
        dV,
        d_bias,
        d_remainder,
        d_turned,
    )


def _differentiable(
    ctx: Any, grad: Tensor, operands: Operands, drop: Dropout | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph of their own, for a backward that is differentiated again."""
    # One operand may be made of another (V of δ, under a rotation): aliases keep the partial derivatives apart.
    pairs = list(zip(operands._replace(bias=None), wanted, strict=True))  # ∂bias is a sum of grad alone
    aliases = [t.view_as(t) if t is not None and want else t for t, want in pairs]
    with _autocast_of(ctx):
        y = forward(ctx.base, Operands(*aliases), drop, in_place=False).y  # type: ignore[arg-type]
    inputs = [alias for alias, want in zip(aliases, wanted, strict=True) if alias is not None and want]
    gradients = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    found = [next(gradients) if t is not None and want else None for t, want in pairs]
    of_bias = Operands._fields.index("bias")
    if wanted[of_bias]:
        found[of_bias] = flat(grad).sum(dim=0).to(ctx.bias_dtype)
    return tuple(found)


def _base_product(ctx: Any, operands: Operands, h: Tensor | None, gain: Tensor, y: Tensor) -> Tensor:
    """x Wᵀ: [tokens, out], from y, or formed anew where y has too few of its digits.

    y was rounded with the bias and h Uᵀ in it. Where some row of l∘z is short against that row of y (a gain near zero,
    a large bias, a large update), what is left after subtracting them is round-off.
    """
    _, _, U, _, bias, remainder, _ = operands
    total = gain.dtype
    if remainder is None:
        product = flat(y).to(total) if bias is None else flat(y) - bias.to(total)
        if U is not None and h is not None:
            product = torch.addmm(product, h.to(total), U.to(total).mT, alpha=-1)
        whole, left = _column_products(flat(y), flat(y)), _column_products(product, product)
        if bool(((whole <= _LOST * left) & (gain != 0)).all()):
            return product / gain
    with _autocast_of(ctx):
        z: Tensor = ctx.base.apply(operands.seen_by_base)
    return z


def _project(x: Tensor, V: Tensor, drop: Dropout | None) -> Tensor:
    """h = x Vᵀ: [tokens, R], the first columns from dropout(x)."""
    if drop is None:
        return x @ V.mT
    own, others = drop.split(V)
    h = drop.zero(x) @ own.mT / (1 - drop.p)
    return torch.cat([h, x @ others.mT], dim=1) if len(others) else h


def _project_back(dh: Tensor, x: Tensor, drop: Dropout | None) -> Tensor:
    """∂V = ∂hᵀ x: [R, in], the first rows from dropout(x)."""
    if drop is None:
        return dh.mT @ x
    own, others = drop.split(dh.mT)
    dV = own @ drop.zero(x) / (1 - drop.p)
    return torch.cat([dV, others @ x]) if len(others) else dV


def _add_back(dx: Tensor, dh: Tensor, V: Tensor, drop: Dropout | None) -> Tensor:
    """∂x + ∂h V: [tokens, in], in place; what the first columns give passes the dropout."""
    if drop is None:
        return dx.addmm_(dh, V)
    (own, others), (dh_own, dh_others) = drop.split(V), drop.split(dh.mT)
    if len(others):
        dx = dx.addmm_(dh_others.mT, others)
    return dx.add_(drop.zero(dh_own.mT / (1 - drop.p) @ own))


def _column_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ_t left_ti right_ti: [tokens, n], [tokens, n] -> [n], in float32 or wider."""
    total = _at_least_float32(left.dtype)
    return _total([(a.to(total) * b).sum(dim=0) for a, b in _blocks(left, right)])


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ_ti left_ti right_ti: [tokens, n], [tokens, n] -> [1], in float64."""
    total = _at_least_float32(left.dtype)
    pairs = ((a.to(total).reshape(-1), b.to(total).reshape(-1)) for a, b in _blocks(left, right))
    return _total([wide(torch.dot(a, b)) for a, b in pairs])[None]


def _blocks(left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of row blocks, so that their products stay in a processor's cache, or at least small."""
    block = _BLOCK if left.device.type == "cpu" else _DEVICE_BLOCK
    if torch.compiler.is_compiling() or left.numel() <= block:
        return [(left, right)]
    rows = max(1, block // left.shape[1])
    return list(zip(left.split(rows), right.split(rows), strict=True))  # type: ignore[no-untyped-call]


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _autocast_of(ctx: Any) -> AbstractContextManager[Any]:
    """Autocast as it was in forward: the base's own products go by it."""
    return torch.autocast(ctx.device, dtype=ctx.autocast_dtype, enabled=ctx.autocast)
