"""What SEGA-FURN's paper (arXiv 2211.10532, tables 1 and 3) and RLSE's poster print: facts to stand beside ours.

No targets: protocols are not stated, and the competitors' rows coincide with those of earlier papers under others.
"""

from sega_dist.config import Config

Printed = dict[int, tuple[float | None, ...]]  # scale -> PSNR dB, SSIM; of the poster also LPIPS and NIQE

OURS = "SEGA-FURN"
TABLE_1: dict[str, Printed] = {
    "Bicubic": {4: (26.50, 0.79), 8: (22.90, 0.65)},
    "Yang [30]": {8: (21.35, 0.60)},
    "SRCNN": {4: (28.93, 0.79), 8: (23.11, 0.65)},
    "Ma": {8: (23.12, 0.64)},
    "CSGM-BP": {4: (26.44, None), 8: (22.71, None)},
    "DIP": {4: (27.35, None), 8: (23.45, None)},
    "Yang [27]": {8: (23.07, 0.65)},
    "CBN": {4: (29.37, 0.79), 8: (18.77, 0.54)},
    "URDGN": {4: (29.10, 0.79), 8: (24.82, 0.70)},
    "IAGAN": {4: (27.16, None), 8: (23.49, None)},
    "TDN": {8: (22.66, 0.66)},
    "FSRFCH": {8: (23.14, 0.82)},
    "SRGAN": {4: (26.76, 0.82), 8: (20.64, 0.62)},
    "ESRGAN": {4: (23.82, 0.71), 8: (20.32, 0.57)},
    "TDAE": {4: (29.49, 0.81), 8: (20.40, 0.57)},
    "FaceAttr": {4: (29.78, 0.82), 8: (21.82, 0.62)},
    "WGAN-GP": {4: (23.28, 0.69)},
    "VDSR": {8: (19.58, 0.57)},
    "Liu": {8: (21.60, 0.66)},
    OURS: {4: (30.14, 0.87), 8: (25.21, 0.73)},
}
TABLE_3: dict[str, Printed] = {
    "RIDB-Net": {4: (28.64, 0.8514), 8: (24.25, 0.7177)},
    "RIDB-RaLS-Net": {4: (28.71, 0.8526), 8: (24.37, 0.7218)},
    "RIDB-SE-Net": {4: (29.60, 0.8607), 8: (24.44, 0.7181)},
    OURS: {4: (30.14, 0.8682), 8: (25.21, 0.7250)},
}
RLSE, PULSE, MGANPRIOR = "RLSE", "PULSE", "mGANprior"
POSTER_1: dict[str, Printed] = {
    "Bilinear": {8: (25.84, 0.73, 0.57, 15.01), 16: (22.73, 0.56, 0.65, 18.44)},
    MGANPRIOR: {8: (21.29, 0.53, 0.32, 13.28), 16: (20.53, 0.50, 0.36, 14.55)},
    PULSE: {8: (22.54, 0.54, 0.28, 9.81), 16: (21.43, 0.48, 0.30, 11.98)},
    RLSE: {8: (23.52, 0.56, 0.25, 8.94), 16: (21.74, 0.49, 0.27, 10.55)},
    "VDSR": {8: (23.18, 0.76, 0.28, 15.12), 16: (22.42, 0.59, 0.33, 16.95)},
    "ESRGAN": {8: (23.74, 0.63, 0.30, 16.84), 16: (21.83, 0.46, 0.31, 15.64)},
    "FSRNet": {8: (25.08, 0.56, 0.23, 16.53), 16: (23.04, 0.62, 0.28, 15.90)},
}
POSTER_2: dict[str, Printed] = {  # other images or another GAN than in table 1, whose RLSE at x16 is another
    PULSE: {16: (22.66, 0.54, 0.24), 32: (19.93, 0.42, 0.27), 64: (18.93, 0.33, 0.30)},
    RLSE: {16: (23.04, 0.55, 0.20), 32: (20.78, 0.44, 0.24), 64: (19.15, 0.34, 0.29)},
}


def method_name(config: Config) -> str:
    """What the literature calls the method of a configuration; "" for one that is nobody's."""
    kind, has_d = config.generator.kind, config.has_discriminator
    if kind == "sega":
        if not has_d or config.loss.w_pixel or config.encoder.kind == "trainable" or config.loss.adv == "ragan":
            return ""
        has_semantics = config.encoder.kind != "none"
        return {("bce", False): "RIDB-Net", ("rals", False): "RIDB-RaLS-Net", ("bce", True): "RIDB-SE-Net",
                ("rals", True): OURS}[config.loss.adv, has_semantics]  # fmt: skip
    with_d = {"srresnet": "SRGAN", "esrgan": "ESRGAN", "urdgn": "URDGN", "fsrnet": "FSRGAN"}
    without = {"srcnn": "SRCNN", "vdsr": "VDSR", "srresnet": "SRResNet", "esrgan": "RRDBNet", "fsrnet": "FSRNet"}
    return (with_d if has_d else without).get(kind, "")
