"""Operations on whole models: adapt, merge, unmerge, unload, disable. Each one does all of its work or nothing."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from adapterzoo.adapter import Adapter
from adapterzoo.errors import MergedError, TargetError, UnsupportedLayerError, listing
from adapterzoo.forms import form_of
from adapterzoo.layer import AdaptedLinear, adapted_layers
from adapterzoo.merging import MergeReport
from adapterzoo.pieces import Piece, check_is_spec
from adapterzoo.plan import Adapted, LeftAlone, Plan
from adapterzoo.quantised import numbers
from adapterzoo.sharded import reshard, wrapper_of_processes
from adapterzoo.support import check_adapter_dtype, check_seed, unsupported
from adapterzoo.targets import ALL_LINEAR, Pattern, Selection, Targets, is_linear, select


def adapt(
    model: nn.Module,
    spec: Piece | None = None,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Sequence[Pattern] = (),
    train: Sequence[str] = (),
    seed: int = 0,
    adapter_dtype: torch.dtype | None = None,
    lean: bool = False,
) -> Plan:
    """Adapt layers of a model in place, freeze the rest, and say what was done.

    Args:
        model: any PyTorch model; it is changed in place.
        spec: what adapts the layers, such as MAP(DoRA(LoRA(r=8))).
        targets: which layers: "all-linear"; a list of names or tails of names, such as ["q_proj", "v_proj"]; a regular
            expression for full names; a predicate of (name, module); a class, such as nn.Conv2d; or an ordered mapping
            from any of these to a spec, or to None to leave it alone: the first match wins.
        exclude: names, tails of names, expressions, predicates or classes of layers to leave alone.
        train: modules or parameters that stay trainable as they are, such as a new head: ["classifier"].
        seed: seed of the adapters' initial values; every layer has streams of its own.
        adapter_dtype: see AdaptedLinear.
        lean: see AdaptedLinear; it saves memory in training where gains of rows train (DoRA, PreDiag).

    "all-linear" leaves alone, with a reason in the plan: layers with a tied or shared weight, output embeddings of
    Transformers models, layers kept trainable, the insides of nn.MultiheadAttention, and layers that the spec does not
    fit. A layer of that kind that is targeted by name is an error.

    The first call freezes everything that it does not adapt or `train`; a later call, for other layers, leaves what
    trains as it is.

    Returns:
        The plan; `print(plan)` shows it.

    Raises:
        TargetError: an entry that matches nothing or can't be honoured, a layer adapted twice.
        UnsupportedLayerError: the model is itself a layer to be adapted.
        SpecError: no spec, or a bad seed or adapter_dtype.
        MergedError: the model has merged layers. In every case nothing was changed.

    Example:
        >>> import torch
        >>> from adapterzoo import DoRA, LoRA, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> print(adapt(model, DoRA(LoRA(r=2)), exclude=["0"]))
        layer  spec             out x in  parameters
        2      DoRA(LoRA(r=2))    4 x 16          44
        <BLANKLINE>
        left alone: 1 layer, frozen unless trained as they are
          0: excluded
        <BLANKLINE>
        44 of 256 parameters train (17.188%)
    """
    _check_arguments(model, spec, targets)
    check_adapter_dtype(adapter_dtype)
    seed = check_seed(seed)
    selection = select(model, spec, targets, exclude, train)
    merged = [name for name, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise MergedError(f"unmerge before adapting further; these layers are merged:{listing(merged)}")
    first = not adapted_layers(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    built: list[AdaptedLinear] = []
    try:
        for item, layer_spec in selection.chosen:
            layer = AdaptedLinear(
                item.module, layer_spec, seed=seed, name=item.name, adapter_dtype=adapter_dtype, lean=lean
            )
            built.append(layer)
        if first:
            for parameter in flags:
                parameter.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in selection.trained:
                parameter.requires_grad_(True)
    except BaseException:
        for layer in built:
            layer.release()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    for layer, (item, _) in zip(built, selection.chosen, strict=True):
        for name in item.names:
            _replace(model, name, layer)
    return _plan(model, built, selection)


def merge(
    model: nn.Module,
    keep_base: bool = True,
    base_device: torch.device | str | None = None,
    *,
    dequantize: bool = False,
) -> MergeReport:
    """Put every adapted layer's W' in the place of its weight: all layers or none.

    W' is formed in at least float32 and rounded once, to the weight's dtype.

    Args:
        model: a model with adapted layers.
        keep_base: keep the base weights, so that `unmerge` gives them back bit for bit; False saves their memory.
        base_device: where to keep them, such as "cpu".
        dequantize: put an ordinary weight in the place of a quantised one, which can't hold W'.

    Returns:
        The share of each layer's update that was lost to rounding; `print(report)` shows it.

    Raises:
        MergedError: a layer that is merged already, whose W' is not finite, a base_device that can't keep anything, or
            a quantised layer without `dequantize`. Nothing was changed.
        TargetError: no adapted layer.
    """
    layers = _settled(model)
    _check_quantised(layers, dequantize)
    prepared = {name: layer.prepare_merge(keep_base, base_device, dequantize) for name, layer in layers.items()}
    for name, merged in prepared.items():
        layers[name].commit_merge(merged)
    return MergeReport({name: merged.lost for name, merged in prepared.items()})


def unmerge(model: nn.Module) -> None:
    """Put every base weight back, bit for bit: all layers or none.

    Raises:
        MergedError: a layer that is not merged, or that was merged with keep_base=False. Nothing was changed.
        TargetError: no adapted layer.
    """
    layers = list(_settled(model).values())
    for layer in layers:
        layer.check_unmergeable()
    for layer in layers:
        layer.unmerge()


def unload(model: nn.Module, *, merge: bool, dequantize: bool = False) -> nn.Module:
    """Take the adapters off, and give back the same model with plain layers: all layers or none.

    What trains is left as it is: the base stays frozen; `model.requires_grad_(True)` thaws it.

    Args:
        model: a model with adapted layers, or one AdaptedLinear.
        merge: True leaves W' in the plain layers, False the base weights.
        dequantize: see `merge`; a quantised layer becomes an nn.Linear.

    Returns:
        The model itself; for a single AdaptedLinear, its base layer.

    Raises:
        MergedError: a layer whose W' is not finite, whose base weight is gone, or that was pruned or parametrised after
            it was adapted. Nothing was changed.
        TargetError: no adapted layer.
    """
    layers = _settled(model)
    _check_quantised(layers, dequantize or not merge)
    prepared = {
        name: layer.prepare_merge(keep_base=False, dequantize=dequantize)
        for name, layer in layers.items()
        if merge and not layer.merged
    }
    for layer in layers.values():
        layer.check_own_weight()
        if layer.merged and not merge:
            layer.check_unmergeable()
    plain: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if name in prepared:
            layer.commit_merge(prepared[name])
        elif layer.merged and not merge:
            layer.unmerge()
        plain[id(layer)] = layer.release()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in plain and name:
            _replace(model, name, plain[id(module)])
    return plain.get(id(model), model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run with the adapters off: the base weights of every adapted layer, also while merged.

    Layers kept trainable by `train=[...]` stay as trained.

    Raises:
        TargetError: no adapted layer.

    Example:
        >>> import torch
        >>> from adapterzoo import AdaptedLinear, LoRA, disabled
        >>> layer = AdaptedLinear(torch.nn.Linear(4, 3), LoRA(r=2))
        >>> with disabled(layer):
        ...     _ = layer(torch.ones(4))
    """
    before = {layer: layer.disabled for layer in _layers(model).values()}
    try:
        for layer in before:
            layer.disabled = True
        yield
    finally:
        for layer, flag in before.items():
            layer.disabled = flag


def reset_adapters(model: nn.Module, seed: int | None = None) -> None:
    """Set every adapter to its initial values, from the base weights as they are now.

    After `adapt` on the meta device: `model.to_empty(device=...)`, load the base weights, then call this.

    Args:
        model: a model with adapted layers.
        seed: another seed than the one given to `adapt`.

    Raises:
        MergedError, UninitialisedError: a layer that is merged, or still on the meta device. Nothing was changed.
        SpecError: the seed is no whole number.
        TargetError: no adapted layer.
    """
    seed = None if seed is None else check_seed(seed)
    layers = _settled(model).values()
    for layer in layers:
        layer.check_resettable()
    for layer in layers:
        layer.reset(seed)


def refresh(model: nn.Module) -> None:
    """Forget what is kept between calls: call it after writing to weights or parameters where torch can't see it.

    Through `.data`, that is, through numpy, by a collective of torch.distributed, by another process, or by a replayed
    CUDA graph.
    """
    for layer in _settled(model).values():
        layer.refresh()


def _layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"this {type(model).__name__} has no adapted layer; adapt(model, spec) makes them")
    return layers


def _settled(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers, ready to be written to: what FSDP2 has gathered for a forward would be thrown away."""
    layers = _layers(model)
    if wrapper_of_processes(model) == "FullyShardedDataParallel":
        raise TargetError(
            "FullyShardedDataParallel keeps weights flat and in pieces, so they can't be changed here: use fully_shard "
            "(FSDP2), or load a full state_dict into a model that is not wrapped"
        )
    reshard(model)
    return layers


def _check_quantised(layers: Mapping[str, AdaptedLinear], dequantize: bool) -> None:
    names = [f"{name} ({layer.kind})" for name, layer in layers.items() if not (layer.form.is_dense or layer.merged)]
    if names and not dequantize:
        raise MergedError(
            "these layers have quantised weights, which can't hold merged ones; dequantize=True puts ordinary weights "
            f"in their places, which take the memory of such:{listing(names)}"
        )


def _check_arguments(model: nn.Module, spec: Piece | None, targets: Targets) -> None:
    if not isinstance(model, nn.Module):
        raise TargetError(f"adapt changes a torch.nn.Module, not {type(model).__name__}")
    reshard(model)
    wrapper = wrapper_of_processes(model)
    if wrapper is not None:
        raise TargetError(
            f"the model is in a {wrapper} already, which would leave the gradients of new parameters apart in every "
            "process; adapt the model first, then wrap it"
        )
    if spec is not None:
        check_is_spec(spec, "adapt needs a spec")
    if isinstance(targets, Mapping):
        for key, value in targets.items():
            if value is not None:
                check_is_spec(value, f"target {key!r} needs a spec or None")
    foreign = [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")
    ]
    if foreign:
        raise TargetError(
            f"the model has adapters of PEFT's already ({foreign[0]!r}), whose factors would be adapted as if they "
            "were the model's own layers; merge_and_unload() them in PEFT first, or save them there and read them into "
            "the plain model with adapterzoo.import_peft"
        )
    if isinstance(model, AdaptedLinear) or form_of(model) is not None:
        problem = (
            unsupported(model)
            or "it is the model itself, and adapt changes layers inside a model; write AdaptedLinear(layer, spec)"
        )
        raise UnsupportedLayerError("", type(model).__name__, problem)
    if not isinstance(targets, str) and isinstance(targets, Sequence) and "" in targets:
        raise TargetError("the target '' is the model itself, which can't be replaced; name layers inside it")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _other_kinds(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Classes of modules with parameters of their own that are no linear layers and no part of an adapter."""
    kinds = Counter(
        type(module).__name__
        for module in model.modules()
        if module._parameters and not is_linear(module) and not isinstance(module, (AdaptedLinear, Adapter))
    )
    return tuple(kinds.items())


def names_of_what_else_trains(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules, other than adapters, with parameters of their own that train."""
    owned = {id(p) for layer in adapted_layers(model).values() for p in layer.adapter.parameters()}
    return tuple(
        name or "the model's own parameters"
        for name, module in model.named_modules()
        if any(p.requires_grad and id(p) not in owned for p in module.parameters(recurse=False))
    )


def _plan(model: nn.Module, built: list[AdaptedLinear], selection: Selection) -> Plan:
    parameters = list(model.parameters())
    return Plan(
        adapted=tuple(
            Adapted(item.names, layer.spec, layer.shape,
                    sum(p.numel() for p in layer.adapter.parameters()))
            for layer, (item, _) in zip(built, selection.chosen, strict=True)
        ),
        left_alone=tuple(LeftAlone(item.name, reason) for item, reason in selection.skipped),
        others=_other_kinds(model),
        trained=names_of_what_else_trains(model),
        total_parameters=sum(map(numbers, parameters)),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        model=model,
    )  # fmt: skip
