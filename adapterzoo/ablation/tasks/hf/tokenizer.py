"""Tokenizers of Transformers, by the name of their model."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapterzoo.ablation.tasks.hf.places import place_of
from adapterzoo.ablation.tasks.hf.quiet import first_line, quiet
from adapterzoo.errors import GridError, MissingPackageError


def tokenizer_of(name: str, revision: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with an id to fill rows up.

    Raises:
        GridError: there is none, or none that says where its tokens stand in a text.
    """
    try:
        with quiet():
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place_of(name), revision=revision)
        if not set(found.get_vocab()) - set(found.all_special_tokens):  # what Transformers makes of no file at all
            raise ValueError("its vocabulary is empty")
    except (GridError, MissingPackageError):
        raise
    except Exception as error:
        raise GridError(
            f"{name!r} gives no tokenizer ({first_line(error)}); name a model that has one: tokenizer=NAME or FOLDER. "
            "Some need a package of their own: pip install sentencepiece tiktoken protobuf"
        ) from error
    if not found.is_fast:
        raise GridError(
            f"the tokenizer of {name!r} is {type(found).__name__}, which does not say where its tokens stand in a "
            "text; name one that has a tokenizer.json: tokenizer=NAME or FOLDER"
        )
    if found.pad_token_id is None:
        found.pad_token = found.eos_token or found.unk_token or found.convert_ids_to_tokens(0)
    return found
