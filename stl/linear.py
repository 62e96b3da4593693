"""STLLinear: a linear layer whose weight is kept encoded."""

import math

import torch
from torch import Tensor, nn

from stl import kernels
from stl.basis import Basis, get_basis
from stl.errors import SettingError
from stl.functional import ROW_AXES, check_arguments, check_residual, encode_weight, stl_linear
from stl.kernels.expanded import is_expanded
from stl.normalisation import Norm
from stl.precision import without_autocast
from stl.stream import Stream

SPEC_BYTES = 96
STARTS = ("independent", "dense")
TRAINED = ("encoded", "dense")
FILLS = ("zeros", "copies")


class STLLinear(nn.Module):
    """Drop-in for `torch.nn.Linear`: encode → r batched GEMMs → decode (arXiv 2503.12211).

    Attributes: `weight` (r, ⌈k/t⌉, ⌈m/t⌉), or with `train_weight="dense"` None and `dense_weight` (k, m); `encoder`
    (r, t²), `decoder` (r, t²), `bias` (m,) or None.

    Input (..., n, k), a residual of the output's shape that is added to it, and a norm that is applied to the input, by
    kernels neither in a pass over memory of its own, unless the layer is narrow; output (..., n, m). The t rows of a
    tile mix where the basis is not exact, so it matters which rows share a tile:

    - `row_axis="tokens"`: neighbours along axis −2. A 2-D input is (batch, features), as everywhere in PyTorch: each
      sample is then one token, alone in its tile, so that samples never mix.
    - `row_axis="batch"`: t samples along axis 0 at the same position; nothing passes between positions. Where t does
      not divide the batch, the last tile is filled with samples of zeros, so that fewer than t cost as much as t; with
      `fill="copies"` with those of the batch again, from the first on, since what is trained beside other samples gives
      something else beside zeros. The output of a sample may depend on its place among the t and on those beside it,
      though not where a dense weight is encoded in an exact basis.

    With a causal basis (`Basis.causal`) row i of a tile depends on rows up to i only, and keeps to it: whatever becomes
    of `encoder` and `decoder`, their entries on the wrong side of the channels' pivots (`Basis.pivots`) count as zero.

    With `train_basis=False` encoder and decoder are buffers and stay as they are. An encoded weight has r numbers where
    a dense one has t², so that a step of training leads away from those that encode a dense one; with
    `train_weight="dense"` that is the parameter, encoded in every pass: what an exact basis computes stays a matrix
    product, and learns what a dense layer learns. `encode_weights` leaves the encoded ones, for inference. `start` says
    how encoded weights are drawn, see `reset_parameters`. The attribute `backend`, "auto", says what computes it, as in
    `stl_linear`. Raises SettingError where no such basis exists or a size is not positive.
    """

    weight: Tensor
    dense_weight: Tensor | None
    encode_w: Tensor | None  # (r, t²), of the dense weight
    encoder: Tensor
    decoder: Tensor
    bias: Tensor | None
    spec: Tensor
    outside: Tensor | None  # (2, r, t²) bool: rows behind the pivot (no encoder), rows before it (no decoder)
    backend = "auto"
    stream: Stream | None = None  # what `stl.Streaming` remembers

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tile: int = 4,
        rank: int = 16,
        basis: str = "hadamard",
        row_axis: str = "tokens",
        train_basis: bool = True,
        start: str = "independent",
        train_weight: str = "encoded",
        fill: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise SettingError(f"in_features={in_features} out_features={out_features} must both be positive")
        if row_axis not in ROW_AXES:
            raise SettingError(f"row_axis={row_axis!r} is unknown; choose one of {', '.join(ROW_AXES)}")
        if start not in STARTS:
            raise SettingError(f"start={start!r} is unknown; choose one of {', '.join(STARTS)}")
        if train_weight not in TRAINED:
            raise SettingError(f"train_weight={train_weight!r} is unknown; choose one of {', '.join(TRAINED)}")
        if fill not in FILLS:
            raise SettingError(f"fill={fill!r} is unknown; choose one of {', '.join(FILLS)}")
        matrices = get_basis(basis, tile, rank)
        self.in_features, self.out_features = in_features, out_features
        self.tile, self.rank, self.basis, self.row_axis, self.start = tile, rank, basis, row_axis, start
        self.fill = fill
        like = torch.empty(0, device=device, dtype=dtype)
        trains_dense = train_weight == "dense"
        tiles = math.ceil(in_features / tile), math.ceil(out_features / tile)
        self.register_parameter("weight", None if trains_dense else nn.Parameter(like.new_empty(rank, *tiles)))
        dense = nn.Parameter(like.new_empty(in_features, out_features)) if trains_dense else None
        self.register_parameter("dense_weight", dense)
        for role, matrix in (("encoder", matrices.encode_x), ("decoder", matrices.decode)):
            if train_basis:
                self.register_parameter(role, nn.Parameter(matrix.to(like, copy=True)))
            else:
                self.register_buffer(role, matrix.to(like, copy=True))
        self.register_parameter("bias", nn.Parameter(like.new_empty(out_features)) if bias else None)
        # Goes with the weights in every file format, so that a checkpoint of other settings is told apart by name.
        self.register_buffer("spec", self._encode_spec().to(like.device))
        # In files too, for loaders that know nothing but tensors.
        outside = None if matrices.pivots is None else like.new_empty(2, rank, tile**2, dtype=torch.bool)
        self.register_buffer("outside", outside)
        self.register_buffer("encode_w", matrices.encode_w.to(like, copy=True) if trains_dense else None)
        self.reset_parameters()

    @property
    def train_basis(self) -> bool:
        return isinstance(self.encoder, nn.Parameter)

    @property
    def train_weight(self) -> str:
        return "encoded" if self.dense_weight is None else "dense"

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the weight so that the output has the variance of a dense layer drawn with this standard deviation.

        `std` defaults to that of `torch.nn.Linear`, √(1/3k). Encoder and decoder go back to the basis, the bias to
        zero. With start="independent" each encoded number is drawn by itself. A channel's GEMM sums over k/t encoded
        values only, so it has t³ / Σ_q |encode_x_q|²·|decode_q|² times the dense variance: t times for an orthonormal
        basis of rank t². With start="dense" a dense weight is drawn and encoded, and scaled to make up for the share of
        ‖T‖² that the basis does not reach: the tokens of a tile then begin as little mixed as it allows. So it is where
        the dense weight is trained, whatever `start` says.
        """
        matrices = self._reset_basis()
        std = (1 / (3 * self.in_features)) ** 0.5 if std is None else std
        with torch.no_grad():
            if self.start == "dense" or self.dense_weight is not None:
                dense = self.encoder.new_empty(self.in_features, self.out_features).normal_(std=std)
                self._set_dense(dense.double() / (1 - matrices.error) ** 0.5, matrices)
            else:
                energy = (matrices.encode_x.square().sum(1) * matrices.decode.square().sum(1)).sum().item()
                self.weight.normal_(std=std * (self.tile**3 / energy) ** 0.5)
            if self.bias is not None:
                self.bias.zero_()

    def load_dense(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Start from a dense layer: weight (m, k) as in `torch.nn.Linear` is encoded with the basis's encode_w.

        Encoder and decoder go back to the basis. Raises SettingError for a weight of another size.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise SettingError(f"dense weight {tuple(weight.shape)}, needed {(self.out_features, self.in_features)}")
        matrices = self._reset_basis()
        with torch.no_grad():
            self._set_dense(weight.detach().T.double(), matrices)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def _set_dense(self, dense: Tensor, basis: Basis) -> None:
        """From a dense weight (k, m), float64."""
        if self.dense_weight is not None:
            self.dense_weight.copy_(dense)
        else:
            self.weight.copy_(encode_weight(dense, basis.encode_w.to(dense.device)))

    @torch.no_grad()
    def _reset_basis(self) -> Basis:
        basis = get_basis(self.basis, self.tile, self.rank)
        self.encoder.copy_(basis.encode_x)
        self.decoder.copy_(basis.decode)
        self._reset_constants()
        return basis

    def _reset_constants(self) -> None:
        """From the basis, whatever a file says."""
        basis = get_basis(self.basis, self.tile, self.rank)
        if self.outside is not None and basis.pivots is not None:
            rows = torch.arange(self.tile, device=basis.pivots.device).repeat_interleave(self.tile)
            self.outside.copy_(torch.stack([rows > basis.pivots[:, None], rows < basis.pivots[:, None]]))
        if self.encode_w is not None:
            self.encode_w.copy_(basis.encode_w)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, from_dense: bool = True, **settings) -> "STLLinear":
        """An STLLinear of the same sizes, device and dtype, frozen where `linear` is; `settings` as in the constructor.

        With `from_dense` it starts from the dense weight (exact bases then give the same outputs), otherwise from a
        fresh draw that takes over the dense weight's standard deviation and the bias, as for training from scratch.
        Raises SettingError where `linear` is no nn.Linear, and for settings that the constructor refuses.
        """
        if not isinstance(linear, nn.Linear):
            raise SettingError(f"a {type(linear).__name__} is no nn.Linear, and cannot become an STLLinear")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **settings,
        )
        if from_dense:
            layer.load_dense(linear.weight, linear.bias)
        elif not linear.weight.is_meta:
            layer.reset_parameters(std=linear.weight.std(correction=0).item())
            if layer.bias is not None:
                layer.bias.data.copy_(linear.bias)
        if not linear.weight.requires_grad:
            layer.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        rows, added = self.with_rows(x), self.with_rows_of(x, residual)
        stream = self.stream_of(x)
        if self.lacks_samples(rows):
            y = self._compute(self.with_copies(rows), None if added is None else self.with_copies(added), norm)
            y = y[: rows.shape[0]]
        else:
            y = self._compute(rows, added, norm) if stream is None else stream(rows, added, norm, self._compute)
        return y.view(*x.shape[:-1], self.out_features)

    def stream_of(self, x: Tensor) -> Stream | None:
        """What remembers the rows of this x."""
        return None if self.row_axis == "batch" or self.has_lone_rows(x) else self.stream

    def lacks_samples(self, x: Tensor) -> bool:
        """Whether copies of the samples of x, (B, …, k), fill its last tile."""
        if self.fill != "copies" or self.row_axis != "batch":  # else the batch is no matter, nor one of an export
            return False
        return x.ndim == 1 or x.shape[0] % self.tile != 0

    def with_copies(self, x: Tensor) -> Tensor:
        """x (B, …), its samples one after the other, and again, in all places of ⌈B/t⌉ tiles."""
        samples, whole = x.shape[0], math.ceil(x.shape[0] / self.tile) * self.tile
        if samples == 1:
            return x.expand(whole, *x.shape[1:])  # one token at a time, what is launched counts
        return torch.cat([x] * math.ceil(whole / samples))[:whole]

    def _compute(self, rows: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
        layer, axis, features = self.tensors(), self.row_axis, self.out_features
        if norm is not None and self.normalises(norm, rows):
            from stl.kernels.norm import norm_linear  # needs triton

            check_arguments(rows, *layer, axis, features)
            return norm_linear(rows, norm, layer, axis, features, residual)
        if norm is not None:
            rows = norm.apply(rows)
        return stl_linear(rows, *layer, row_axis=axis, out_features=features, backend=self.backend, residual=residual)

    def normalises(self, norm: Norm, x: Tensor) -> bool:
        """Whether kernels apply the norm as they encode x.

        Raises SettingError where it asks for kernels that there are not.
        """
        if not (self.uses_kernels(x) and self.holds(norm, x)):
            return False
        k, m = self.in_features, self.out_features
        return self.has_lone_rows(x) or not is_expanded(x, self.tile, self.rank, [(k, m)], self.row_axis, beside=k)

    def holds(self, norm: Norm, x: Tensor) -> bool:
        """Whether kernels that encode x have room for the norm."""
        return kernels.holds_rows(self.tile, self.in_features) and norm.goes_with(x)

    def with_rows(self, x: Tensor) -> Tensor:
        """x as `stl_linear` takes it: where its rows are samples of one token each, every row a matrix of its own.

        Raises SettingError for another number of features; within its padding, stl_linear would take it.
        """
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise SettingError(f"x has shape {tuple(x.shape)}; in_features={self.in_features} must be its last size")
        return x.unsqueeze(-2) if self.has_lone_rows(x) else x

    def with_rows_of(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The residual as `stl_linear` takes it beside `with_rows(x)`. Raises SettingError where it does not fit."""
        check_residual(residual, x, self.out_features)
        return residual if residual is None or not self.has_lone_rows(x) else residual.unsqueeze(-2)

    def has_lone_rows(self, x: Tensor) -> bool:
        """Whether every row of x is a sample of one token, alone in its tile."""
        return x.ndim < 2 or (x.ndim == 2 and self.row_axis == "tokens")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What it computes with: weight, encoder, decoder and bias."""
        return self.encoded_weight(), *self.within_pivots(self.encoder, self.decoder), self.bias

    def encoded_weight(self) -> Tensor:
        """(r, ⌈k/t⌉, ⌈m/t⌉)."""
        if self.dense_weight is None or self.encode_w is None:
            return self.weight
        with without_autocast(self.dense_weight):  # rounded once, behind it
            return encode_weight(self.dense_weight, self.encode_w)

    def within_pivots(self, encoder: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
        """An encoder and a decoder (r, t²), with zeros where a causal basis must have them; others as they are."""
        if self.outside is None:
            return encoder, decoder
        return encoder.masked_fill(self.outside[0], 0), decoder.masked_fill(self.outside[1], 0)

    def uses_kernels(self, x: Tensor) -> bool:
        """Whether kernels compute it for this x, and may do so together with its neighbours.

        Raises SettingError where it asks for kernels that there are not.
        """
        return kernels.use_triton(self.backend, x, self.tile, self.rank, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tile={self.tile}, rank={self.rank}, basis={self.basis!r}, row_axis={self.row_axis!r}, "
            f"train_basis={self.train_basis}, train_weight={self.train_weight!r}"
            + (f", fill={self.fill!r}" if self.row_axis == "batch" else "")
        )

    def _encode_spec(self) -> Tensor:
        sizes = f"in={self.in_features} out={self.out_features}"
        text = f"{sizes} tile={self.tile} rank={self.rank} basis={self.basis} row_axis={self.row_axis}"
        return torch.tensor(list(text.encode().ljust(SPEC_BYTES)), dtype=torch.uint8)

    def reset_spec(self) -> None:
        """For loaders that leave `spec` as memory was where they have none; `load_state_dict` leaves it as it is."""
        self.spec = self._encode_spec().to(self.weight.device)

    def check_spec(self, name: str) -> None:
        """For loaders that put tensors in their places, as transformers' do; `load_state_dict` sees to it itself.

        Raises SettingError, with both sides, where what was loaded is of another tile, rank, basis or row axis.
        """
        if not torch.equal(self.spec.cpu(), own := self._encode_spec()):
            raise SettingError(f"{name}: the checkpoint has {_decode_spec(self.spec)}, the model {_decode_spec(own)}")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix.removesuffix(".") or "layer"
        saved, own = state_dict.get(prefix + "spec"), self._encode_spec()
        if saved is not None and not torch.equal(saved.cpu(), own):
            error_msgs.append(f"{name}: the checkpoint has {_decode_spec(saved)}, the model {_decode_spec(own)}")
            return
        weight = state_dict.get(prefix + "weight")
        trained = "dense" if prefix + "dense_weight" in state_dict else "encoded"
        if saved is not None and trained != self.train_weight:
            error_msgs.append(
                f"{name}: the checkpoint has train_weight={trained!r}, the model train_weight={self.train_weight!r}; "
                "convert it alike"
            )
            return
        if saved is None and weight is not None and weight.ndim == 2:
            error_msgs.append(
                f"{name}: the checkpoint has a dense weight {tuple(weight.shape)}, the model {_decode_spec(own)}; "
                "load it into the dense model and convert that with from_dense=True"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._reset_constants()


def check_is_stl(*layers: nn.Module) -> None:
    """Raises SettingError where one of them is no STLLinear."""
    for layer in layers:
        if not isinstance(layer, STLLinear):
            got = type(layer).__name__
            raise SettingError(f"{got} is no STLLinear; STLLinear.from_linear makes one of a dense layer")


def _decode_spec(spec: Tensor) -> str:
    return bytes(spec.tolist()).decode("ascii", "replace").strip()


def encode_weights(model: nn.Module) -> list[str]:
    """Leave encoded weights in the place of the dense ones that STL layers of `model` train, in place, as inference
    wants them. Returns the names of these layers; they then are as with `train_weight="encoded"`, and the parameters of
    an optimizer no longer theirs."""
    encoded = []
    for name, layer in model.named_modules():
        if isinstance(layer, STLLinear) and layer.dense_weight is not None:
            layer.weight = nn.Parameter(layer.encoded_weight().detach(), layer.dense_weight.requires_grad)
            layer.dense_weight = layer.encode_w = None
            encoded.append(name)
    return encoded
