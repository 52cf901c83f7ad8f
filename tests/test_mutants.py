"""Deliberately broken pieces and layers, the published faults among them: the properties must catch every one.

That is how we know that the property tests are not vacuous. Each mutant patches one thing in the package; the test
passes only if the named property fails on drawn cases.
"""

from dataclasses import replace

import properties
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import cases
from torch import nn
from torch.nn import functional as F

from adapterzoo import SORA, AdaptedLinear, DoRA, LoRA, adapter, factored, forms, functional, kept, kernel
from adapterzoo.contract import initial_values
from adapterzoo.pieces import Site

BOTH = (torch.float64, torch.float32)
MUTANTS = {}


def mutant(prop, **draws):
    """Register a function that breaks the package through a monkeypatch, and the property that must notice."""

    def decorate(function):
        MUTANTS[function.__name__] = (function, prop, draws)
        return function

    return decorate


@mutant(properties.forward_matches)
def the_bias_stands_under_the_gain(patch):  # torchtune's DoRA
    original = functional.factored_linear

    def broken(x, base, delta=None, U=None, V=None, bias=None, **options):
        y = original(x, base, delta, U, V, bias, **options)
        return y if bias is None or delta is None else y + delta * bias

    patch.setattr(forms.linear, "factored_linear", broken)


def merge_with(patch, weight_of):
    """Let merge store something else than W'."""
    original = AdaptedLinear.prepare_merge

    def broken(self, *arguments):
        return original(self, *arguments)._replace(weight=weight_of(self).detach().to(self.weight.dtype))

    patch.setattr(AdaptedLinear, "prepare_merge", broken)


@mutant(properties.merge_keeps_forward)
def merge_forgets_alpha_over_r(patch):  # PEFT 2489
    def unscaled(self):
        with patch.context() as inner:
            inner.setattr(LoRA, "scale", property(lambda self: 1.0))
            return self.effective_weight()

    merge_with(patch, unscaled)


@mutant(properties.merge_keeps_forward)
def merge_forgets_the_identity_of_the_rotation(patch):  # the published SORA: P V instead of (I + P) V
    def without_identity(self):
        weight = self.effective_weight()
        if isinstance(self.spec, SORA):
            weight = weight - self.adapter.inner.weight(self.site()).dense()
        return weight

    merge_with(patch, without_identity)


@mutant(properties.forward_matches)
def the_norm_is_taken_over_the_wrong_axis(patch):  # PEFT 3532
    original = factored.FactoredWeight.row_norms

    def broken(self, constant=False):  # seen on square weights alone, where no shape gives it away
        square = self.base.shape[0] == self.base.shape[1]
        return torch.linalg.vector_norm(self.dense(), dim=0) if square else original(self, constant)

    patch.setattr(factored.FactoredWeight, "row_norms", broken)


@mutant(properties.forward_matches)
def a_norm_ignores_the_insides_diagonal(patch):
    original = factored.FactoredWeight.row_norms
    patch.setattr(
        factored.FactoredWeight, "row_norms", lambda self, constant=False: original(replace(self, delta=None), constant)
    )


@mutant(properties.forward_matches)
def the_update_norm_ignores_the_cross_term(patch):
    original = factored.FactoredWeight.update_norm

    def broken(self):
        if self.delta is None or self.U is None:
            return original(self)
        diagonal, thin = original(replace(self, U=None, V=None)), original(replace(self, delta=None))
        return torch.hypot(diagonal, thin)

    patch.setattr(factored.FactoredWeight, "update_norm", broken)


@mutant(properties.gradients_match)
def parameters_are_made_anew_in_forward(patch):  # Subspace-Tuning's DoRA
    original = adapter.Adapter.weight

    def broken(self, site):
        for name, parameter in list(self._parameters.items()):
            self._parameters[name] = nn.Parameter(parameter.detach().clone())
        return original(self, site)

    patch.setattr(adapter.Adapter, "weight", broken)


@mutant(properties.files_round_trip)
def a_magnitude_starts_again_on_load(patch):  # the third-party LoMAP: alpha set at the first forward after a load
    original = AdaptedLinear._load_from_state_dict

    def broken(self, *arguments):
        original(self, *arguments)
        self._forgets = True

    first_forward = AdaptedLinear.factored_weight

    def forgetful(self):
        if getattr(self, "_forgets", False):
            own = Site(self.site().base, self.site().dtype, depth=self.spec.depth)
            with torch.no_grad():
                for name, value in initial_values(self.spec, own).items():
                    if name in ("alpha", "magnitude"):
                        self.adapter._parameters[name].copy_(value)
            self._forgets = False
        return first_forward(self)

    patch.setattr(AdaptedLinear, "_load_from_state_dict", broken)
    patch.setattr(AdaptedLinear, "factored_weight", forgetful)


@mutant(properties.dropout_is_the_generators_own, dropouts=(0.1, 0.5), full=False)
def dropout_reaches_the_base_path(patch):  # PEFT's DoRA, LoRA-Dash's DeLoRA
    original = functional.factored_linear

    def broken(x, *arguments, dropout=0.0, **options):
        dropped = F.dropout(x, dropout) if dropout else x
        return original(dropped, *arguments, **options)

    patch.setattr(forms.linear, "factored_linear", broken)


@mutant(properties.gradients_match)
def a_thin_product_is_shared_out_of_no_grad(patch):
    """A wrapper that asks under no_grad is harmless by itself, as the next test shows; sharing its product is not."""
    ask_under_no_grad(patch)
    patch.setattr(factored.RightFactor, "_lacks_graph", lambda self, product: False)


def ask_under_no_grad(patch):
    original = DoRA.condition

    def asks(self, inner, params, site):
        with torch.no_grad():
            inner.row_norms()
        return original(self, inner, params, site)

    patch.setattr(DoRA, "condition", asks)


def test_a_wrapper_may_ask_under_no_grad(monkeypatch):
    ask_under_no_grad(monkeypatch)
    run(properties.gradients_match, {}, monkeypatch)


@mutant(properties.evaluation_follows_training)
def an_evaluation_cache_is_never_refreshed(patch):
    original = AdaptedLinear.factored_weight

    def broken(self):
        if torch.is_grad_enabled():
            return original(self)
        if "_kept" not in self.__dict__:
            self.__dict__["_kept"] = original(self)
        return self.__dict__["_kept"]

    patch.setattr(AdaptedLinear, "factored_weight", broken)


@mutant(properties.evaluation_follows_training)
def an_evaluation_cache_trusts_version_counters(patch):  # fused AdamW leaves them as they are
    original = AdaptedLinear.factored_weight

    def broken(self):
        if torch.is_grad_enabled():
            return original(self)
        key = tuple(parameter._version for parameter in self.adapter.parameters())
        if self.__dict__.get("_kept", (None, None))[0] != key:
            self.__dict__["_kept"] = key, original(self)
        return self.__dict__["_kept"][1]

    patch.setattr(AdaptedLinear, "factored_weight", broken)


@mutant(properties.forward_matches, dtypes=(torch.float64, torch.bfloat16), strengths=(0.3, 10.0))
def the_adapter_is_ignored_in_one_dtype(patch):
    original = AdaptedLinear.forward

    def broken(self, x):
        return F.linear(x, self.weight, self.bias) if x.dtype is torch.bfloat16 else original(self, x)

    patch.setattr(AdaptedLinear, "forward", broken)


@mutant(properties.merge_keeps_forward)
def unmerge_subtracts(patch):  # PEFT: arithmetic instead of a kept copy
    original = AdaptedLinear.unmerge

    def broken(self):
        restored = self.weight.detach() - self.delta_weight().detach()
        original(self)
        self.weight.data.copy_(restored)

    patch.setattr(AdaptedLinear, "unmerge", broken)


@mutant(properties.dropout_is_the_generators_own, dropouts=(0.1, 0.5), full=False)
def dropout_has_another_probability(patch):
    original = functional.factored_linear

    def broken(*arguments, dropout=0.0, **options):
        return original(*arguments, dropout=dropout / 2, **options)

    patch.setattr(forms.linear, "factored_linear", broken)


@mutant(properties.forward_matches)
def damping_is_always_one(patch):
    original = SORA._thin_rotation

    def broken(self, C, D):
        return original(self if self.damping is None else self.model_copy(update={"damping": 1.0}), C, D)

    patch.setattr(SORA, "_thin_rotation", broken)


@mutant(properties.start_is_exact)
def a_zero_row_is_multiplied_by_zero(patch):
    def broken(self, inner, params, site):
        norms = inner.row_norms().detach()
        lives = norms > 0
        return inner.scale_rows(torch.where(lives, params.magnitude / torch.where(lives, norms, 1), 0))

    patch.setattr(DoRA, "condition", broken)


@mutant(properties.forward_is_rounded_once, dtypes=(torch.bfloat16,))
def the_output_is_rounded_twice(patch):
    original = functional.factored_linear

    def broken(x, base, delta=None, U=None, V=None, bias=None, **options):
        y = original(x, base, delta, U, V, **options)
        return y if bias is None else y + bias

    patch.setattr(forms.linear, "factored_linear", broken)


@mutant(properties.start_is_exact)
def a_zero_row_divides_by_zero(patch):  # PEFT 2049
    patch.setattr(
        DoRA, "condition", lambda self, inner, params, site: inner.scale_rows(params.magnitude / inner.row_norms())
    )


@mutant(properties.gradients_match)
def the_norm_is_never_detached(patch):
    def broken(self, inner, params, site):
        norms = inner.row_norms()
        return inner.scale_rows(torch.where(norms > 0, params.magnitude / torch.where(norms > 0, norms, 1), 0))

    patch.setattr(DoRA, "condition", broken)


@mutant(properties.forward_matches)
def the_scale_forgets_the_rank(patch):  # BiDoRA computes a scale and does not use it
    patch.setattr(LoRA, "scale", property(lambda self: 1.0))


@mutant(properties.draws_do_not_depend_on_wrappers)
def depth_is_counted_from_the_outside(patch):
    original = adapter.Adapter.__init__

    def broken(self, spec, site, factor_dtype=None):
        original(self, spec, replace(site, seed=site.seed + spec.depth), factor_dtype)

    patch.setattr(adapter.Adapter, "__init__", broken)


@mutant(properties.draws_do_not_depend_on_wrappers)
def draws_are_made_in_the_layers_dtype(patch):
    def broken(self, parameter, *shape, std):
        draw = torch.empty(shape, dtype=self.dtype).normal_(0.0, std, generator=self._stream(parameter))
        return draw.to(self.base.device)

    patch.setattr(Site, "normal", broken)


@mutant(properties.start_is_exact)
def the_rotation_is_built_from_the_large_factors(patch):
    def broken(self, C, D):
        X = torch.cat([D, -C], dim=1)
        Y = torch.cat([C, D], dim=1).mT
        middle = torch.linalg.inv(torch.eye(X.shape[1], dtype=X.dtype) - Y @ X / 2)
        return X @ middle, Y

    patch.setattr(SORA, "_thin_rotation", broken)


def kernel_with(patch, **others):
    """The gradients of the kernel, with some of them replaced: name=function of (gradient, ctx, arguments)."""
    original = kernel._gradients

    def broken(ctx, *arguments):
        gradients = kernel.Operands(*original(ctx, *arguments))
        changed = {name: change(getattr(gradients, name), ctx, arguments) for name, change in others.items()}
        return tuple(gradients._replace(**changed))

    patch.setattr(kernel, "_gradients", broken)


@mutant(properties.gradients_match)
def the_gradient_of_x_forgets_the_gain(patch):
    def without_gain(dx, ctx, arguments):
        grad, operands = arguments[:2]
        return dx if operands.delta is None else dx - (grad * operands.delta) @ ctx.base.dense()

    kernel_with(patch, x=without_gain)


@mutant(properties.gradients_match)
def the_gradient_of_a_shared_gain_is_scaled_by_the_gain(patch):  # ∂x in the place of ∂y W
    def scaled(d_delta, ctx, arguments):
        delta = arguments[1].delta
        return d_delta if d_delta is None or len(delta) > 1 else d_delta * (1 + delta)

    kernel_with(patch, delta=scaled)


@mutant(properties.gradients_match)
def the_gradient_of_a_gain_sees_y_and_not_z(patch):
    def from_output(d_delta, ctx, arguments):
        operands = arguments[1]
        return d_delta if d_delta is None or len(d_delta) == 1 else d_delta * (1 + operands.delta)

    kernel_with(patch, delta=from_output)


@mutant(properties.gradients_match)
def one_block_of_tokens_is_left_out(patch):
    patch.setattr(kernel, "_BLOCK", 8)
    patch.setattr(kernel, "_total", lambda parts: torch.stack(parts[: max(1, len(parts) - 1)]).sum(dim=0))


@mutant(properties.dropout_is_the_generators_own, dropouts=(0.1, 0.5), full=False)
def the_backward_forgets_the_mask_of_x(patch):
    original = kernel._add_back
    patch.setattr(kernel, "_add_back", lambda dx, dh, V, drop: original(dx, dh, V, None))


@mutant(properties.dropout_is_the_generators_own, dropouts=(0.1, 0.5), full=False)
def the_backward_forgets_the_mask_of_the_factor(patch):
    original = kernel._project_back
    patch.setattr(kernel, "_project_back", lambda dh, x, drop: original(dh, x, None))


@mutant(properties.evaluation_follows_training)
def optimiser_steps_are_not_noted(patch):  # fused optimisers leave versions as they were
    patch.setattr(kept._STEPS, "seen", lambda: 0)


def failures(error):
    """The failures that hypothesis found: one, or a group of distinct ones."""
    return list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]


def run(prop, draws, monkeypatch):
    @settings(max_examples=300, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases(**{"dtypes": BOTH, **draws}))
    def check(case):
        prop(case)

    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, monkeypatch):
    breaks, prop, draws = MUTANTS[name]
    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises((AssertionError, ExceptionGroup)) as caught:
            run(prop, draws, monkeypatch)
    assert all(isinstance(failure, AssertionError) for failure in failures(caught.value)), caught.value


CONTROLS = {(prop, repr(draws)): (prop, draws) for _, prop, draws in MUTANTS.values()}


@pytest.mark.parametrize(("prop", "draws"), CONTROLS.values())
def test_the_same_draws_pass_unbroken(prop, draws, monkeypatch):
    run(prop, draws, monkeypatch)
