"""Encoded weights of trained layers from calibration data: least squares with the measured input covariance.

An STL layer's output is linear in its encoded weight. Let z_K = encoder·vec(x_K) be the encoded tiles of a row of
tiles and y_J the dense layer's output tiles for it. The encoded weight that minimises
E‖Σ_q decoder_q·Σ_K z_qK·weight_qKJ − y_J‖² solves one linear system for every J, all with the same matrix over the r·K
unknowns (q, K):

    A = (decoder·decoderᵀ)_qq' · E[z_qK·z_q'K'],   right-hand side  E[z_qK · ⟨decoder_q, vec(y_J)⟩]

With i.i.d. zero-mean input E[z_qK·z_q'K'] = σ²·(encoder·encoderᵀ)_qq'·δ_KK', and the system falls apart into one per
tile, G⁻¹h with G = (encoder·encoderᵀ) ∘ (decoder·decoderᵀ): `stl.basis.least_squares_encode_w`, which is what encoding
without data amounts to where the basis has the best encode_w. Correlated input couples the tiles of a row. A is too
large to form (r·K is 32768 for 4096 features at r=32, t=4) and singular wherever the data has fewer directions than
unknowns, so that its operator is applied instead: conjugate gradients for least squares (CGLS; Björck, "Numerical
Methods for Least Squares Problems", 1996, §7.4), which never forms A. They run in the coordinates in which i.i.d. input
makes A the identity, start from the uncalibrated weight, and a ridge pulls towards it: what the data leaves open stays
as it was. The ridge and the number of steps are those that lower the error on held-out tiles most, less the standard
error of that; where none does, the uncalibrated weight stays.

Optionally the layer's own encoder and decoder are then fitted too, by Adam on the same objective, and the weight is
solved for again.
"""

from stl.calibration.layer import LayerCalibration as LayerCalibration
from stl.calibration.model import calibrate as calibrate
