"""Kinds of layers that can be adapted. One file each."""

from torch import nn

from adapterzoo.forms.convolution import Convolution
from adapterzoo.forms.embedding import Embedding
from adapterzoo.forms.form import Form as Form
from adapterzoo.forms.linear import Linear, Transposed
from adapterzoo.forms.quantised import Quantised

FORMS: tuple[type[Form], ...] = (Quantised, Linear, Transposed, Convolution, Embedding)
"""Every kind, in the order in which a module is offered to them."""


def form_of(module: nn.Module) -> type[Form] | None:
    """The kind that a module is of; None if it is of none."""
    return next((form for form in FORMS if form.claims(module)), None)
