"""An independent dense reference in float64. It shares no code with the package: only names of pieces and parameters.

A composition is a tree of nodes {"kind": name, "options": {...}, "params": {...}, "inner": node or None}. For every
node the reference builds

* update: W' − W, built up and not taken as a difference (MAP below its floor magnifies round-off a hundredfold);
* part: what of it is linear in the generator's own update with norms held, since dropout acts on that part alone;
* mass [out] and kappa: a running bound of round-off. Row i of the update is a sum of terms of size mass_i, and a norm
  taken of terms that cancel is wrong by kappa = (size of the terms / size of the sum)² units of round-off. Errors are
  measured in units of eps · kappa · mass, so that a tolerance means the same for every composition.
"""

from dataclasses import dataclass

import torch


@dataclass
class Node:
    update: torch.Tensor
    part: torch.Tensor
    mass: torch.Tensor
    kappa: float = 1.0


def adapted(W, tree):
    """The outermost node of a composition over W."""
    inner = adapted(W, tree["inner"]) if tree["inner"] is not None else None
    return RULES[tree["kind"]](W, inner, tree["params"], tree["options"])


def rows(matrix):
    return matrix.detach().norm(dim=1)


def product(*factors):
    """A product, as an update whose terms have the size of the product of absolute values."""
    value, size = factors[0], factors[0].detach().abs()
    for factor in factors[1:]:
        value, size = value @ factor, size @ factor.detach().abs()
    return Node(value, value, rows(size))


def lora(W, inner, p, o):
    divisor = o["r"] ** 0.5 if o["rslora"] else o["r"]
    return product(o["alpha"] / divisor * p["B"], p["A"])


def adalora(W, inner, p, o):
    passed = p["lam"] - (p["lam"] * (1 - p["mask"])).detach()  # the gradient of λ passes the mask
    return product(o["alpha"] / o["r"] * p["P"], torch.diag(passed), p["Q"])


def flora(W, inner, p, o):
    if p["core"].dim() == 2:
        return product(o["scale"] * p["A"], p["core"], p["B"])
    tensors = [o["scale"] * p["core"], p["A"], p["B"], *(p[name] for name in ("K1", "K2", "K3") if name in p)]
    size = kernel_of(*(tensor.detach().abs() for tensor in tensors))
    value = kernel_of(*tensors)
    return Node(value, value, rows(size))


def kernel_of(core, A, B, *factors):
    """Every mode of the core times its factor, as a matrix: [out, in · kernel]."""
    kernel = torch.einsum("ab...,oa,bi->oi...", core, A, B)
    for mode, factor in enumerate(factors):
        kernel = torch.einsum("d...,dk->k...", kernel.movedim(2 + mode, 0), factor).movedim(0, 2 + mode)
    return kernel.flatten(1)


def full(W, inner, p, o):
    return Node(p["delta"], torch.zeros_like(W), rows(p["delta"]))


def prediag(W, inner, p, o):
    shift = p["diag"] - 1
    return Node(torch.diag(shift) @ W + inner.update, inner.part, inner.mass + rows(torch.diag(shift) @ W), inner.kappa)


def dora(W, inner, p, o):
    gains, worst = [], 1.0
    for row, magnitude, terms in zip(W + inner.update, p["magnitude"], rows(W) + inner.mass, strict=True):
        length = (row.detach() if o["detach_norm"] else row).pow(2).sum()
        if float(length.detach()) > 0:
            gains.append(magnitude / length.sqrt())
            worst = max(worst, float(terms**2 / length.detach()))
        else:
            gains.append(magnitude * 0)
    gain = torch.stack(gains)
    return Node(
        torch.diag(gain - 1) @ W + torch.diag(gain) @ inner.update,
        torch.diag(gain) @ inner.part,
        (gain.detach().abs() + 1) * rows(W) + gain.detach().abs() * inner.mass,
        inner.kappa * worst,
    )


def map_(W, inner, p, o):
    if o["per"] == "channel":
        return stacked([map_rows(W[i : i + 1], inner, p, o, i) for i in range(len(W))], inner)
    size = W.pow(2).sum().sqrt()
    base = torch.zeros_like(W) if float(size) == 0 else (p["alpha"] / size - 1) * W
    floor = 1e-6 if o["floor"] == "literal" else o["floor"] * (float(size) if float(size) > 0 else 1.0)
    square = inner.update.pow(2).sum()
    length = square.sqrt() if float(square.detach()) > floor**2 else torch.tensor(floor, dtype=W.dtype)
    gain = p["beta"] / length
    cancelled = float(inner.mass.norm() ** 2 / length.detach() ** 2)
    return Node(
        base + gain * inner.update,
        gain * inner.part,
        rows(W) + rows(base) + float(gain.detach().abs()) * inner.mass,
        inner.kappa * max(1.0, cancelled),
    )


def map_rows(W, inner, p, o, i):
    """MAP of one row by itself, as a matrix of one row."""
    own = slice(i, i + 1)
    alone = Node(inner.update[own], inner.part[own], inner.mass[own])
    return map_(W, alone, {"alpha": p["alpha"][own], "beta": p["beta"][own]}, {**o, "per": "matrix"})


def stacked(nodes, inner):
    return Node(
        torch.cat([node.update for node in nodes]),
        torch.cat([node.part for node in nodes]),
        torch.cat([node.mass for node in nodes]),
        inner.kappa * max(node.kappa for node in nodes),
    )


def sora(W, inner, p, o):
    C, E = p["C"], p["D"] - p["C"]
    if o["damping"] is not None:
        E = E * torch.minimum(torch.ones(()).to(E), o["damping"] / (C.norm() + p["D"].norm() + 1e-6))
    P = E @ C.T - C @ E.T
    identity = torch.eye(len(W), dtype=W.dtype)
    turns = {
        "cayley": lambda: torch.linalg.solve(identity - P / 2, P),  # (I − P/2)⁻¹(I + P/2) − I
        "exp": lambda: exponential(P) - identity,
        "first_order": lambda: P,
    }
    turn = turns[o["map"]]()
    size = (E.abs() @ C.abs().T + C.abs() @ E.abs().T).detach()
    terms = (1 + size.norm()) * (size @ (rows(W) + inner.mass))
    return Node(
        turn @ (W + inner.update) + inner.update, inner.part + turn @ inner.part, inner.mass + terms, inner.kappa
    )


def exponential(P, halvings=3, terms=40):
    """exp(P) by its series on P/8, squared three times. (torch's own is off by 1e-10 at norms near 0.05.)"""
    small = P / 2**halvings
    identity = torch.eye(len(P), dtype=P.dtype)
    result = identity
    for n in range(terms, 0, -1):
        result = identity + small @ result / n
    for _ in range(halvings):
        result = result @ result
    return result


RULES = {
    "LoRA": lora, "AdaLoRA": adalora, "FLoRA": flora, "Full": full,
    "PreDiag": prediag, "DoRA": dora, "MAP": map_, "SORA": sora,
}  # fmt: skip


def tree_of(adapter):
    """The tree of a layer's adapter, with float64 leaves that ask for gradients; also those leaves by full name."""
    leaves = {}

    def node(module, prefix):
        params = {}
        for name, value in module.state_dict().items():
            if "." not in name:
                leaf = value.detach().to(torch.float64).clone().requires_grad_(name != "mask")
                params[name] = leaves[prefix + name] = leaf
        spec = module.spec
        options = {key: getattr(spec, key) for key in type(spec).model_fields if key != "inner"}
        inner = node(module.inner, prefix + "inner.") if module.inner is not None else None
        return {"kind": type(spec).__name__, "options": options, "params": params, "inner": inner}

    return node(adapter, ""), leaves
