"""From a thin skew matrix P = X₀ Y₀ to a rotation R = I + X₀ φ(Y₀ X₀) Y₀: the middle φ of the Cayley map and of exp."""

import torch
from torch import Tensor


def cayley_middle(Z: Tensor) -> Tensor:
    """(I − Z/2)⁻¹: [2k, 2k]."""
    # There always is one: Z has the eigenvalues of a skew matrix. `inv` would stop a GPU to ask whether there is.
    inverse: Tensor = torch.linalg.inv_ex(torch.eye(len(Z), dtype=Z.dtype, device=Z.device) - Z / 2).inverse
    return inverse


# Note [Not torch.linalg.matrix_exp]
# φ is a block of exp([[Z, I], [0, 0]]), but torch's matrix exponential is off by up to 1e-10 in float64 for small
# norms, and its backward loses digits in proportion to the size of the incoming gradient. So: the series of φ at
# Z/2^12, then twelve doublings of φ and of M = exp(Z) − I, from which nothing cancels:
# φ(2Z) = φ(Z) + M φ(Z)/2 and M(2Z) = 2M + M². Exact to round-off for turns by up to 3000 rad.
def exp_middle(Z: Tensor, halvings: int = 12, terms: int = 16) -> Tensor:
    """φ(Z) = Σ Zⁿ / (n + 1)!: [2k, 2k]."""
    identity = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    small = Z / 2**halvings
    phi = identity
    for n in range(terms + 1, 1, -1):
        phi = identity + small @ phi / n
    change = small @ phi
    for _ in range(halvings):
        phi = phi + change @ phi / 2
        change = 2 * change + change @ change
    return phi
