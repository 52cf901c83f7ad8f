"""adapter_config.json as it is read: every field is honoured, without a say in the values, or refused by its name."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterzoo.conditioning import DoRA
from adapterzoo.errors import PeftError, SpecError, did_you_mean
from adapterzoo.interop.peft_names import bars, index_of_layer, is_meant, value_for
from adapterzoo.methods import AdaLoRA, LoRA
from adapterzoo.pieces import Piece

_WITHOUT_A_SAY = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "total_step", "velora_config",
})  # fmt: skip
"""About where an adapter comes from, how it was trained, or about something that another field switches on."""

_REFUSED = {
    "alora_invocation_tokens": "the adapter acts from certain tokens on, not on all",
    "arrow_config": "several adapters are mixed by a router",
    "ensure_weight_tying": "tied layers share an adapter",
    "kasa_config": "the base weights were truncated, and the update has a diagonal between its factors",
    "layer_replication": "the model has copies of its layers",
    "lora_bias": "the update has a bias of its own",
    "megatron_config": "the layers are Megatron's parallel ones",
    "monteclora_config": "the update is sampled",
    "target_parameters": "parameters are adapted that are no layer's weight",
    "trainable_token_indices": "single tokens of an embedding were trained",
    "use_bdlora": "a factor is block-diagonal",
    "use_qalora": "inputs are pooled in groups",
}
_PLAIN_STARTS = ("eva", "gaussian", "mica", "orthogonal")
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Names = list[str] | str | None


class LoraFields(BaseModel):
    """The fields of a LoRA's config that have a say in its values, with PEFT's defaults."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: str | None = None
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    target_modules: _Names = None
    exclude_modules: _Names = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None

    def spec(self, name: str) -> Piece:
        """What adapts a module.

        Raises:
            SpecError: a value that no spec has.
        """
        rank = value_for(self.rank_pattern or {}, name, self.r)
        alpha = float(value_for(self.alpha_pattern or {}, name, self.lora_alpha))
        inner = LoRA(r=rank, alpha=alpha, dropout=float(self.lora_dropout), rslora=self.use_rslora)
        return DoRA(inner) if self.use_dora else inner

    def rank_in_file(self, name: str) -> int:
        """How many ranks of a module the tensors have to have."""
        return value_for(self.rank_pattern or {}, name, self.r)

    def targets(self, name: str) -> bool | None:
        """Whether PEFT would adapt a module of that name; None where its config alone doesn't say."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return None
        if self.exclude_modules and is_meant(self.exclude_modules, name):
            return False
        if self.modules_to_save and bars(self.modules_to_save, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return is_meant(self.target_modules, name)
        return is_meant(self.target_modules, name) and self._is_at_its_index(name)

    def _is_at_its_index(self, name: str) -> bool:
        wanted, patterns = self.layers_to_transform, self.layers_pattern or []
        if wanted is None or wanted == []:
            return True
        index = index_of_layer(name, [patterns] if isinstance(patterns, str) else patterns)
        return index in (wanted if isinstance(wanted, list) else [wanted])

    def problems(self) -> list[str]:
        """Everything in it that can't be honoured."""
        extra = self.model_extra or {}
        found = [
            f"{name}={value!r}: {_REFUSED[name]}, which no composition here does"
            for name, value in extra.items()
            if name in _REFUSED and value
        ]
        known = {*type(self).model_fields, *_WITHOUT_A_SAY, *_REFUSED}
        found += [
            f"{name}={value!r} is a field that is not known here, and it is switched on{did_you_mean(name, known)}"
            for name, value in extra.items()
            if name not in known and value
        ]
        return found + self._bad_expressions() + self._problems_of_start()

    def _bad_expressions(self) -> list[str]:
        fields = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
        texts = {name: getattr(self, name) or () for name in (*fields, "modules_to_save")}
        single = {name: [value] if isinstance(value, str) else list(value) for name, value in texts.items()}
        return [
            f"{name}: {text!r} is no regular expression: {problem}"
            for name, values in single.items()
            for text in values
            if (problem := _flaw(text)) is not None
        ]

    def _problems_of_start(self) -> list[str]:
        start = self.init_lora_weights
        if not isinstance(start, str) or start.lower() in _PLAIN_STARTS:
            return []
        if start.lower().startswith(_CHANGED_BASES):
            return [
                f"init_lora_weights={start!r}: the adapter belongs to a base weight that this start has changed, and "
                "the file does not hold that one; save it again from PEFT with path_initial_model_for_weight_conversion"
            ]
        return [f"init_lora_weights={start!r} is not known here, and it may have changed the base weights"]


class AdaLoraFields(LoraFields):
    """The fields of an AdaLoRA's config that have a say in its values or its training, with PEFT's defaults."""

    peft_type: Literal["ADALORA"]  # type: ignore[assignment]
    init_r: Annotated[int, Field(ge=1)] = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def spec(self, name: str) -> Piece:
        """What adapts a module; without a schedule where ranks have been pruned, or the target is not below them.

        Raises:
            SpecError: a value that no spec has.
        """
        alpha = float(self.lora_alpha) if self.lora_alpha > 0 else None
        schedule: dict[str, Any] = {}
        if not self.rank_pattern and self.target_r < self.init_r:
            schedule = {"target_r": self.target_r, "t_init": self.tinit, "t_final": self.tfinal, "delta_t": self.deltaT,
                        "beta1": self.beta1, "beta2": self.beta2}  # fmt: skip
        dropout, weight = float(self.lora_dropout), float(self.orth_reg_weight)
        return AdaLoRA(r=self.init_r, alpha=alpha, dropout=dropout, orth_weight=weight, **schedule)

    def rank_in_file(self, name: str) -> int:
        """How many ranks are left of a module."""
        kept = self._kept().get(name)
        return self.init_r if kept is None else sum(kept)

    def _kept(self) -> Mapping[str, list[bool]]:
        """Which ranks are left, by module."""
        return {key.rpartition(".lora_E")[0]: kept for key, kept in (self.rank_pattern or {}).items()}

    def problems(self) -> list[str]:
        """Everything in it that can't be honoured."""
        found = super().problems()
        if self.use_dora:
            found.append("use_dora=True: PEFT has no DoRA over AdaLoRA, and no file of one")
        wrong = [name for name, kept in self._kept().items() if len(kept) != self.init_r]
        return found + [f"rank_pattern of {name!r} has not init_r={self.init_r} entries" for name in wrong]


def _flaw(expression: str) -> str | None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


_KINDS: dict[str, Callable[..., LoraFields]] = {"LORA": LoraFields, "ADALORA": AdaLoraFields}


def read_config(raw: Mapping[str, Any]) -> LoraFields:
    """The fields, typed.

    Raises:
        PeftError: another method than LoRA or AdaLoRA, a field of a wrong type, or one that can't be honoured.
    """
    what, method = "this adapter_config.json can't be honoured", raw.get("peft_type")
    if not isinstance(method, str) or method not in _KINDS:
        raise PeftError(what, [f"peft_type is {method!r}; LORA (with or without use_dora) and ADALORA can be read"])
    try:
        config = _KINDS[method](**raw)
        problems = config.problems()
        if not problems:
            config.spec("")
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}={item['input']!r}: {item['msg']}" for item in error.errors()]
    except SpecError as error:
        problems.append(str(error))
    if problems:
        raise PeftError(what, problems)
    return config
