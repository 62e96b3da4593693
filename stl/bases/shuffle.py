"""Walsh functions over tokens; features enter one by one and leave as Walsh functions. Any rank from t² to below t³.

Channel (a, b, c) reads the token function χ_a of feature b and writes χ_a of the function χ_c of features: encode_x is
χ_a ⊗ e_b, decode χ_a ⊗ χ_c. All rows have norm 1, and of the pairs e_b ⊗ χ_c, t² for each a, all are orthonormal. So

- r channels reach r of the t³ orthonormal parts of the product: error 1 − r/t³, S = r/t³;
- where t divides r, all a have the same pairs, and a dense weight, encoded, leaves the tokens of a tile apart.

In `hadamard` features enter and leave as the same functions. Its channels then make t groups of features, which linear
layers in a row keep apart, as grouped convolutions do that nothing shuffles between (Zhang, Zhou, Lin, Sun,
"ShuffleNet", CVPR 2018). Here what leaves a layer in one channel enters the next in t of them.
"""

import torch

from stl.bases.frame import orthonormal_transform
from stl.basis import Basis, least_squares_encode_w, register_basis


@register_basis("shuffle", ranks=lambda tile: range(tile**2, tile**3))
def shuffle(tile: int, rank: int) -> Basis:
    functions, single = orthonormal_transform(tile), torch.eye(tile, dtype=torch.float64)
    steps = range(tile)
    channels = [(a, b, (b + d) % tile) for d in steps for b in steps for a in steps][:rank]
    encode_x = torch.stack([torch.kron(functions[a], single[b]) for a, b, _ in channels])
    decode = torch.stack([torch.kron(functions[a], functions[c]) for a, _, c in channels])
    return Basis("shuffle", tile, rank, encode_x, least_squares_encode_w(encode_x, decode), decode)
