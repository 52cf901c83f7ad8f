"""The description of a checkpoint, `adapterzoo.json`: version 1 of the format, as strict data."""

import json
import re
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from adapterzoo.checkpoint.wording import short
from adapterzoo.errors import CheckpointError, did_you_mean

FORMAT = "adapterzoo"
VERSION = 1
"""The version of the format that is written; every version from 1 on can be read."""

TENSOR_FILE = re.compile(r"tensors-[0-9a-f]{12}(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
"""The names that tensor files have: a plain name in the directory, never a path."""

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")

Count = Annotated[int, Field(ge=0, le=2**48)]
Shape = Annotated[list[Count], Field(max_length=16)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Data that is what it says: no unknown fields, nothing converted, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorEntry(Strict):
    """One tensor: what it is and which file holds it.

    Args:
        shape: its shape.
        dtype: its dtype, by torch's name for it.
        file: the tensor file that holds it.
    """

    shape: Shape
    dtype: str
    file: str


class ValueEntry(TensorEntry):
    """A parameter or buffer of an adapter, and what it does there.

    Args:
        role: what it does.
        same_as: the key of the tensor that it shares, which stands in the file once; None if it stands there itself.
    """

    role: str
    same_as: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = write(self)
        return tree if self.same_as is not None else {key: v for key, v in tree.items() if key != "same_as"}


class LayerEntry(Strict):
    """One adapted layer.

    Args:
        names: every name that the layer has in its model.
        composition: which of the adapter's compositions it has.
        kind: what kind of layer it is.
        weight: the shape of its weight, as the layer stores it.
        matrix: the shape [out, in] of its weight as a matrix.
        kernel: the kernel of a convolution, [] for other layers.
        seed: the seed of its initial values.
        factor_dtype: the dtype that `adapter_dtype` asked for, if it did.
        lean: whether it saves memory in training.
        ranks: the rank of every part whose ranks can be removed, as it is now; the part by its names in the adapter.
        norms: for each magnitude, what it is the length of.
        tensors: its values, by their names in the adapter.
    """

    names: Annotated[list[str], Field(min_length=1)]
    composition: Count
    kind: str
    weight: Shape
    matrix: Annotated[list[Count], Field(min_length=2, max_length=2)]
    kernel: Shape
    seed: int
    factor_dtype: str | None
    lean: bool
    ranks: dict[str, Count]
    norms: dict[str, str]
    tensors: dict[str, ValueEntry]

    def key(self, tensor: str) -> str:
        """What a tensor of the layer is called in its file: its name in the model's state_dict."""
        return ".".join(filter(None, (self.names[0], "adapter", tensor)))


class TrainedEntry(TensorEntry):
    """A parameter besides the adapters that trains, or a buffer of a module that has one.

    Args:
        names: every name that it has in its model.
        what: which of the two it is.
    """

    names: Annotated[list[str], Field(min_length=1)]
    what: Literal["parameter", "buffer"]


class FileEntry(Strict):
    """A tensor file: its size and the sha256 of its bytes."""

    bytes: Count
    sha256: Digest


class AdapterEntry(Strict):
    """One adapter of a model: a composition on each of some layers.

    Args:
        compositions: the distinct specs, as `to_json` writes them.
        layers: the adapted layers.
        trained: what else trains.
        files: the tensor files.
    """

    compositions: list[dict[str, Any]]
    layers: Annotated[list[LayerEntry], Field(min_length=1)]
    trained: list[TrainedEntry]
    files: dict[str, FileEntry]

    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by its key in the files."""
        layers: dict[str, TensorEntry] = {
            layer.key(name): entry for layer in self.layers for name, entry in layer.tensors.items()
        }
        return {**layers, **{entry.names[0]: entry for entry in self.trained}}

    def shared(self) -> dict[str, str]:
        """The key under which each shared tensor stands in the files, by its own key."""
        entries = ((layer.key(name), entry) for layer in self.layers for name, entry in layer.tensors.items())
        return {key: entry.same_as for key, entry in entries if entry.same_as is not None}

    def stored(self) -> dict[str, TensorEntry]:
        """Every tensor that stands in the files, by its key there."""
        shared = self.shared()
        return {key: entry for key, entry in self.tensors().items() if key not in shared}


class BaseEntry(Strict):
    """The model under the adapters: its class, and the names and shapes of its parameters with their digest."""

    class_name: str = Field(alias="class")
    digest: Digest
    parameters: dict[str, Shape]


class Manifest(Strict):
    """All of `adapterzoo.json`; its own digest is that of all the rest."""

    format: Literal["adapterzoo"]
    format_version: Literal[1]
    library_version: str
    digest: Digest
    base: BaseEntry
    adapters: Annotated[dict[str, AdapterEntry], Field(min_length=1)]

    def tree(self) -> dict[str, Any]:
        """What is written."""
        return self.model_dump(by_alias=True)

    def files(self) -> set[str]:
        """Every tensor file that is named."""
        return {name for adapter in self.adapters.values() for name in adapter.files}


def digest_of_description(tree: dict[str, Any]) -> str:
    """The sha256 of a description, but for its own digest, with sorted keys."""
    rest = {key: value for key, value in tree.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()


def manifest_of(tree: Any, where: str) -> Manifest:
    """A manifest from JSON that was read, of any version of the format.

    Raises:
        CheckpointError: no manifest, one from the future, or fields that are missing, unknown or wrong: all at once.
    """
    version = _version(tree, where)
    if version > VERSION:
        raise CheckpointError(
            f"{where} has version {short(version)} of the format, written by adapterzoo "
            f"{short(tree.get('library_version', '?'))}; this one reads versions up to {VERSION}: a newer adapterzoo "
            "reads it"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        problems = [_sentence(item) for item in error.errors(include_url=False, include_input=False)]
        what = f"{where} does not describe adapters as version {version} of the format does"
        raise CheckpointError(what, problems) from None


def _version(tree: Any, where: str) -> int:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise CheckpointError(f'{where} is no description of adapters: one is an object with "format": "{FORMAT}"')
    version = tree.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where} has the format_version {short(version)}; it should be a whole number ≥ 1")
    return version


def _sentence(item: Any) -> str:
    """One finding of pydantic's: where, and what."""
    place = ".".join(str(step) for step in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{short(place, 120)}: {item['msg']}"
    fields = {field.alias or name for kind in _KINDS for name, field in kind.model_fields.items()}
    return f"{short(place, 120)}: no such field{did_you_mean(str(item['loc'][-1])[:80], fields)}"


_KINDS = (ValueEntry, TrainedEntry, LayerEntry, FileEntry, AdapterEntry, BaseEntry, Manifest)
