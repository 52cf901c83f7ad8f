"""Models of Transformers: from the hub, a folder or an installed package; with values or without."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from adapterzoo.ablation.tasks.hf.digests import digest_of_files
from adapterzoo.ablation.tasks.hf.heads import head_names
from adapterzoo.ablation.tasks.hf.places import place_of
from adapterzoo.ablation.tasks.hf.quiet import first_line, quiet
from adapterzoo.errors import GridError, listing

Weights = Literal["pretrained", "random"]


@dataclass(frozen=True)
class Named:
    """A model by its name.

    Args:
        name: on the hub, a folder, or "package:NAME/FOLDER" for one that an installed package carries.
        revision: branch, tag or commit on the hub.
        outputs: how many outputs a new head has; 0 for a causal language model, which gets none.
        weights: "random" draws them from the config, once and for all: for costs, and for trying things out.
        dtype: of the base.

    Raises:
        GridError: from its methods: no config, no weights, none that fit.
        MissingPackageError: from its methods: a package that is not installed.
    """

    name: str
    revision: str = "main"
    outputs: int = 0
    weights: Weights = "pretrained"
    dtype: str = "float32"

    def config(self) -> PreTrainedConfig:
        """The model's configuration, with as many labels as it has outputs."""
        found = _config(place_of(self.name), self.revision, self.outputs)
        if isinstance(found, Exception):
            raise self._unreachable("config", found) from found
        return found

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device."""
        with torch.device("meta"):
            return self._class.from_config(self.config())

    def load(self) -> PreTrainedModel:
        """The model with its weights, frozen; what is new in it is drawn from a fixed seed."""
        config = self.config()
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = self._with_weights(config)
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if getattr(model.config, name, False):
                setattr(model.config, name, False)
        model.requires_grad_(False)
        return model

    def fingerprint(self) -> str:
        """A hash of the files of a folder, or the commit of a name on the hub."""
        place = place_of(self.name)
        if Path(place).is_dir():
            return digest_of_files(sorted(path for path in Path(place).iterdir() if _counts(path)))
        self.config()  # says what is wrong where nothing can be had
        return _commit(place, self.revision)

    def _with_weights(self, config: PreTrainedConfig) -> PreTrainedModel:
        if self.weights == "random":
            return self._class.from_config(config, dtype=getattr(torch, self.dtype))
        try:
            model, info = self._class.from_pretrained(
                place_of(self.name), config=config, revision=self.revision, dtype=getattr(torch, self.dtype),
                output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # Transformers raises many kinds; what they say is passed on
            raise self._unreachable("weights", error) from error
        heads = head_names(model) if self.outputs else ()
        missing = [key for key in sorted(info["missing_keys"]) if not key.startswith(tuple(f"{h}." for h in heads))]
        if missing:
            raise GridError(
                f"the weights of {self.name!r} lack what is no head, and would be random and frozen:{listing(missing)}"
            )
        return model

    @property
    def _class(self) -> Any:
        return AutoModelForSequenceClassification if self.outputs else AutoModelForCausalLM

    def _unreachable(self, what: str, error: Exception) -> GridError:
        if Path(place_of(self.name)).is_dir():
            return GridError(f"the folder {self.name!r} gives no {what} for this task ({first_line(error)})")
        return GridError(
            f"{self.name!r} is no folder here, and its {what} can't be had from the hub ({first_line(error)}); "
            "give the name of a folder with config.json, model.safetensors and the tokenizer's files, "
            "or put the model into the hub's cache (hf download NAME) where there is a network"
        )


@cache  # without a network each try takes half a minute, and every cell of a grid asks
def _config(place: str, revision: str, outputs: int) -> PreTrainedConfig | Exception:
    told: Mapping[str, Any] = {"num_labels": outputs} if outputs else {}
    try:
        with quiet():
            return AutoConfig.from_pretrained(place, revision=revision, **told)
    except Exception as error:
        return error


def _commit(name: str, revision: str) -> str:
    """The commit that a file of the hub's cache belongs to: .../snapshots/<commit>/config.json."""
    found = cached_file(name, "config.json", revision=revision)
    return Path(str(found)).parent.name


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")
