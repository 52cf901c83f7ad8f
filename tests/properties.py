"""The identities, as plain functions of a drawn case: tests run them on our pieces, mutants on broken ones."""

import copy

import torch
from hypothesis import assume
from reference import adapted, tree_of
from strategies import Case, base_of, functional_of, input_of, layer_of, stream

import adapterzoo as az
from adapterzoo.kernel import Dropout

# One table of tolerances, in units of the running bound of round-off that the reference carries: see `Truth`.
FORWARD = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}
GRADIENT = {torch.float64: 2e-14, torch.float32: 4e-6, torch.bfloat16: 2e-2}
HOPELESS = {torch.float64: 1e12, torch.float32: 1e3, torch.bfloat16: 1e3}  # no digits are left above such a kappa


def size(value):
    return float(torch.linalg.vector_norm(value.detach().to(torch.float64)))


class Truth:
    """What the dense reference says of a layer, and the scale that round-off is measured by."""

    def __init__(self, layer, dtype):
        self.W = layer.weight.detach().double()
        self.bias = None if layer.bias is None else layer.bias.detach().double()
        tree, self.leaves = tree_of(layer.adapter)
        node = adapted(self.W, tree)
        assume(node.kappa < HOPELESS[dtype])
        self.update, self.part, self.kappa = node.update, node.part, node.kappa
        self.weight = self.W + node.update
        self.weight_scale = (size(self.W) + size(node.mass)) * node.kappa

    def forward(self, x):
        return self._with_bias(x.double() @ self.weight.T)

    def base_forward(self, x):
        return self._with_bias(x.double() @ self.W.T)

    def output_scale(self, x):
        tokens = max(1, x.numel() // max(1, x.shape[-1]))
        return size(x) * self.weight_scale + (0.0 if self.bias is None else size(self.bias) * tokens**0.5)

    def _with_bias(self, y):
        return y if self.bias is None else y + self.bias


def close(actual, expected, scale, tolerance, what, case):
    """‖actual − expected‖ ≤ tolerance · scale, with a message that can be pasted."""
    assert torch.isfinite(actual).all(), f"{what} is not finite: {case}"
    error = size(actual.detach().to(torch.float64) - expected.detach())
    limit = tolerance * max(scale, 1e-300)
    assert error <= limit, f"{what}: error {error:.3g} above {limit:.3g} ({case})"


def forward_is_rounded_once(case: Case):
    """W' itself is good to float32, and y = round(z + δ∘z + h Uᵀ + x Dᵀ + bias) from 16-bit z, h and x Dᵀ.

    Where y is z + h Uᵀ alone, U is a 16-bit factor of that product too.
    """
    layer, x = layer_of(case), input_of(case)
    truth, weight = Truth(layer, case.dtype), layer.factored_weight()
    close(weight.dense(), truth.weight, truth.weight_scale, FORWARD[torch.float32], "factors of a 16-bit weight", case)
    linear = torch.nn.functional.linear
    y = linear(x, layer.weight, layer.bias if weight.delta is None else None).double()
    size_of_terms = y.abs()
    terms = [] if weight.delta is None else [weight.delta.double() * y]
    if weight.U is not None:
        U = weight.U.to(x.dtype) if weight.delta is None and weight.remainder is None else weight.U
        terms.append(linear(x, weight.V.value.to(x.dtype)).double() @ U.double().T)
    if weight.remainder is not None:
        terms.append(linear(x, weight.remainder.to(x.dtype)).double())
    if weight.delta is not None and layer.bias is not None:
        terms.append(layer.bias.double().expand_as(y))
    for term in terms:
        y, size_of_terms = y + term, size_of_terms + term.abs()
    step = torch.finfo(case.dtype).eps * y.abs() / 2 + 1e-6 * size_of_terms + torch.finfo(case.dtype).tiny
    assert ((layer(x).double() - y).abs() <= step).all(), f"not rounded once: {case}"


def forward_matches(case: Case):
    """forward(x) = x · W'ᵀ + bias, effective_weight() = W' and delta_weight() = W' − W, for the reference's W'."""
    layer, x = layer_of(case), input_of(case)
    truth, tolerance = Truth(layer, case.dtype), FORWARD[case.dtype]
    y = layer(x)
    assert y.shape == (*case.lead, case.out)
    assert y.dtype == layer.effective_weight().dtype == layer.delta_weight().dtype == case.dtype
    close(y, truth.forward(x), truth.output_scale(x), tolerance, "forward", case)
    close(layer.effective_weight(), truth.weight, truth.weight_scale, tolerance, "effective weight", case)
    close(layer.delta_weight(), truth.update, truth.weight_scale, tolerance, "delta weight", case)


def gradients_match(case: Case):
    """Gradients of every parameter and of x agree with autograd through the dense reference."""
    layer, weights = layer_of(case), functional_of(case)
    x = input_of(case).requires_grad_()
    parameters = dict(layer.adapter.named_parameters())
    (layer(x) * weights.to(case.dtype)).sum().backward()
    truth, tolerance = Truth(layer, case.dtype), GRADIENT[case.dtype]
    x_true = x.detach().double().requires_grad_()
    truth.weight.retain_grad()
    (truth.forward(x_true) * weights).sum().backward()
    work = size(truth.weight.grad) * truth.weight_scale
    close(x.grad, x_true.grad, size(weights) * truth.weight_scale, tolerance, "gradient of x", case)
    for name, parameter in parameters.items():
        expected = truth.leaves[name].grad
        expected = torch.zeros_like(truth.leaves[name]) if expected is None else expected
        assert parameter.grad is not None, f"{name} got no gradient: {case}"
        scale = size(expected) * truth.kappa + work / max(size(parameter), 1e-30)
        close(parameter.grad, expected, scale, tolerance, f"gradient of {name}", case)
    assert layer.weight.grad is None


def merge_keeps_forward(case: Case):
    """Merging leaves the forward as it was; unmerge gives the base weight back bit for bit; files hold the base."""
    layer, x = layer_of(case), input_of(case)
    truth, tolerance = Truth(layer, case.dtype), FORWARD[case.dtype]
    base_weight, storage = layer.weight.detach().clone(), layer.weight.data_ptr()
    effective, scale = layer.effective_weight().detach(), truth.output_scale(x)
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        merged = layer(x)
    assert torch.equal(layer.weight, effective)
    assert torch.equal(layer.state_dict()["weight"], base_weight)
    close(merged, before.double(), scale, 2 * tolerance, "merged against unmerged forward", case)
    close(merged, truth.forward(x), scale, tolerance, "merged forward", case)
    with az.disabled(layer), torch.no_grad():
        close(layer(x), truth.base_forward(x), scale, tolerance, "disabled forward", case)
    layer.unmerge()
    assert torch.equal(layer.weight, base_weight), f"unmerge is not exact: {case}"
    assert layer.weight.data_ptr() == storage
    with torch.no_grad():
        assert torch.equal(layer(x), before)


def start_is_exact(case: Case):
    """Every composition of start-neutral pieces starts at W' = W, exactly, with a finite gradient."""
    layer, x = layer_of(case, perturbed=False), input_of(case)
    weight = layer.factored_weight()
    assert not layer.delta_weight().any(), f"the update does not start at zero: {case}"
    assert torch.equal(layer.effective_weight(), layer.weight)
    assert not weight.update_norm().any()
    assert weight.delta is None or not weight.delta.any(), f"delta does not start at zero: {case}"
    truth = Truth(layer, case.dtype)
    close(layer(x), truth.base_forward(x), truth.output_scale(x), FORWARD[case.dtype], "first forward", case)
    layer(x).sum().backward()
    for name, parameter in layer.adapter.named_parameters():
        assert torch.isfinite(parameter.grad).all(), f"first gradient of {name} is not finite: {case}"


def files_round_trip(case: Case):
    """state_dict -> a layer of another seed -> the same bits; the spec survives text and JSON."""
    assert az.parse(repr(case.spec)) == case.spec
    assert az.from_json(az.to_json(case.spec)) == case.spec
    assert hash(az.parse(repr(case.spec))) == hash(case.spec)
    layer, x = layer_of(case), input_of(case)
    other = layer_of(Case(**{**vars(case), "seed": case.seed + 1}))
    other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x)), f"a loaded layer differs: {case}"
        for name, value in layer.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), f"{name} was not loaded: {case}"


def evaluation_follows_training(case: Case):
    """No value survives a change of the parameters: evaluate, step (fused AdamW too), evaluate."""
    layer, x = layer_of(case).eval(), input_of(case)
    optimiser = torch.optim.AdamW(layer.adapter.parameters(), lr=0.1, fused=case.seed % 2 == 0)
    for _ in range(2):
        with torch.no_grad():
            layer(x)
        layer(x).square().sum().backward()
        optimiser.step()
        truth = Truth(layer, case.dtype)
        with torch.no_grad():
            close(layer(x), truth.forward(x), truth.output_scale(x), FORWARD[case.dtype], "after a step", case)


def dropout_is_the_generators_own(case: Case):
    """train: y = x W'ᵀ + (drop(x) − x) Gᵀ + bias, with G the generator's part of W', and its gradients; eval: x W'ᵀ."""
    layer, x = layer_of(case), input_of(case).requires_grad_()
    torch.manual_seed(case.seed)
    drop = Dropout.draw(x, layer.adapter.generator.spec.dropout, 1)
    p, keep = drop.p, (~drop.dropped).double() / (1 - drop.p)
    truth, tolerance = Truth(layer, case.dtype), FORWARD[case.dtype]
    scale = (1 + 2 / (1 - p)) * truth.output_scale(x)
    close(layer.eval()(x), truth.forward(x), scale, tolerance, "eval with dropout", case)
    torch.manual_seed(case.seed)
    y = layer.train()(x)
    x_true = x.detach().double().requires_grad_()
    y_true = truth.forward(x_true) + (x_true * keep - x_true) @ truth.part.T
    close(y, y_true, scale, tolerance, "train with dropout", case)
    weights = functional_of(case)
    (y * weights.to(case.dtype)).sum().backward()
    (y_true * weights).sum().backward()
    tolerance, scale = GRADIENT[case.dtype], scale / max(size(x), 1e-30)
    close(x.grad, x_true.grad, size(weights) * scale, tolerance, "gradient of x with dropout", case)
    work = size(weights) * size(x) * scale
    for name, parameter in layer.adapter.named_parameters():
        true = truth.leaves[name].grad
        true = torch.zeros_like(truth.leaves[name]) if true is None else true
        limit = size(true) * truth.kappa + work / max(size(parameter), 1e-30)
        close(parameter.grad, true, limit, tolerance, f"gradient of {name} with dropout", case)


def zero_update_has_no_dropout(case: Case):
    """With a zero update, train = eval under every wrapper, however its own parameters stand."""
    layer, x = layer_of(case, perturbed=False), input_of(case)
    adapter = layer.adapter
    while adapter.inner is not None:
        with torch.no_grad():
            for parameter in adapter.parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=stream(case, 6), dtype=torch.float64)
                parameter.mul_(1 + 0.3 * noise)
        adapter = adapter.inner
    truth = Truth(layer, case.dtype)
    expected = layer.eval()(x).double()
    close(layer.train()(x), expected, truth.output_scale(x), FORWARD[case.dtype], "dropout of a zero update", case)


def draws_do_not_depend_on_wrappers(case: Case):
    """A generator starts equal under every wrapper, alone, in every dtype; and no global random state is touched."""
    base = base_of(case)
    state = torch.random.get_rng_state()
    layer = az.AdaptedLinear(base, case.spec, seed=case.seed)
    assert torch.equal(state, torch.random.get_rng_state())
    innermost = layer.adapter
    while innermost.inner is not None:
        innermost = innermost.inner
    alone = az.AdaptedLinear(torch.nn.Linear(case.cols, case.out, dtype=torch.float32), innermost.spec, seed=case.seed)
    for name, value in alone.adapter.state_dict().items():
        drawn = innermost.state_dict()[name]
        assert torch.equal(drawn.to(value.dtype), value), f"{name} depends on its surroundings: {case}"
